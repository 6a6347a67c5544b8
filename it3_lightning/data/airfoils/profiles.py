"""Seeded NACA 4-digit profiles, and lift and drag of each from NeuralFoil, computed once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from it3_lightning.data.airfoils import polars
from it3_lightning.data.airfoils.naca import contours
from it3_lightning.data.airfoils.polars import Polars
from it3_lightning.data.checks import check_integer
from it3_lightning.data.sampling import seeded
from it3_lightning.utils.messages import not_installed, unknown

ModelSize = Literal[
    "xxsmall", "xsmall", "small", "medium", "large", "xlarge", "xxlarge", "xxxlarge"
]

_CHUNK = 100  # profiles between two writes of the file
_NODES = 200  # of the contour that is analysed, whatever a network sees of it


@dataclass(frozen=True, kw_only=True)
class ProfileSet:
    """Profiles drawn uniformly from a box of parameters, all in the same stream of air.

    Args:
        count: number of profiles.
        seed: of the draw.
        low: least camber, position of the camber and thickness, as parts of the chord.
        high: the largest ones.
        angle: of attack, in degrees.
        reynolds: Reynolds number, by the chord.
        model_size: of NeuralFoil's network: the larger, the more exact and the slower.

    Raises:
        ValueError: a setting is out of its range.

    >>> ProfileSet(count=2).parameters().shape
    torch.Size([2, 3])
    """

    count: int = 2000
    seed: int = 0
    low: tuple[float, float, float] = (0.0, 0.2, 0.06)
    high: tuple[float, float, float] = (0.08, 0.7, 0.24)
    angle: float = 5.0
    reynolds: float = 1e6
    model_size: ModelSize = "xlarge"

    def __post_init__(self) -> None:
        check_integer("profiles", self.count, 1)
        check_integer("seed", self.seed, 0)
        if self.model_size not in get_args(ModelSize):
            raise ValueError(unknown("model_size", self.model_size, get_args(ModelSize)))
        for name, low, high in (("angle", -20, 20), ("reynolds", 1e4, 1e8)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"Expected {name} from {low:g} to {high:g}, where NeuralFoil knows its way, "
                    f"got {getattr(self, name)}."
                )
        if any(high <= low for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"Expected low < high, got {self.low} and {self.high}.")

    def parameters(self) -> Tensor:
        """Return camber, its position and thickness of all profiles, ``(N, 3)``, float64."""
        low, high = (torch.tensor(end, dtype=torch.float64) for end in (self.low, self.high))
        generator = seeded(self.seed, "profiles")
        return low + (high - low) * torch.rand(self.count, 3, dtype=low.dtype, generator=generator)

    def polars(self, root: str | Path) -> Polars:
        """Return the forces on all profiles, computing those that the file in ``root`` lacks.

        The settings name the file. It is replaced after every hundred profiles, so that an
        interrupted computation goes on where it stopped, to the same bits.

        Args:
            root: folder of the file.

        Raises:
            ImportError: there is something to compute, and NeuralFoil is not installed.
            ValueError: the file is damaged, or holds something else.
        """
        file, settings, parameters = self.file(root), self._text(), self.parameters()
        known = polars.read(file, settings, parameters)
        if len(known) == self.count:
            return known
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("NeuralFoil", total=self.count, completed=len(known))
            for chunk in torch.split(parameters[len(known) :], _CHUNK):
                known = known.joined(self._analysed(chunk))
                polars.write(file, settings, known)
                progress.advance(task, len(chunk))
        return known

    def file(self, root: str | Path) -> Path:
        """Return where the forces are kept."""
        digest = hashlib.sha256(self._text().encode()).hexdigest()
        return Path(root) / f"naca_{digest[:16]}.npz"

    def _text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def _analysed(self, parameters: Tensor) -> Polars:
        """Return the forces on profiles, one after the other: a profile's do not know its chunk."""
        try:
            from neuralfoil import get_aero_from_coordinates
        except ImportError as error:
            message = not_installed("neuralfoil", "which computes lift and drag", "airfoils", error)
            raise ImportError(message) from error
        rows = []
        for profile in contours(parameters, _NODES):
            closed = torch.cat([profile, profile[:1]]).numpy()
            aero = get_aero_from_coordinates(
                closed, alpha=self.angle, Re=self.reynolds, model_size=self.model_size
            )
            rows.append([aero[name].item() for name in ("CL", "CD", "analysis_confidence")])
        return Polars(parameters, *torch.tensor(rows, dtype=torch.float64).unbind(1))
