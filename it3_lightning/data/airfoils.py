"""Wing profiles and their lift-to-drag ratio; shapes outside the training range are the shift."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Generator, Tensor
from torch.utils.data import Dataset

from it3_lightning.data import contour_shifts
from it3_lightning.data.contour_graphs import ContourGraphs
from it3_lightning.data.levels import level_names, levels, outside
from it3_lightning.data.naca import contours
from it3_lightning.data.profiles import ModelSize, ProfileSet
from it3_lightning.data.ranged import RangedData
from it3_lightning.data.samples import Pool, Rows, Samples
from it3_lightning.messages import unknown

Representation = Literal["graph", "contour"]

AIRFOIL_LEVELS = (*level_names("shape"), *level_names("ratio"))

AIRFOIL_SHIFTS = (*AIRFOIL_LEVELS, "noise")
"""The shifts that results are reported on."""

_TUNING = MappingProxyType(
    {
        "rotation": (contour_shifts.rotation, 2.0),
        "roughness": (contour_shifts.roughness, 0.003),
        "resampling": (contour_shifts.resampling, 0.8),
    }
)

AIRFOIL_TUNING_SHIFTS = tuple(_TUNING)
"""Other shifts, only for choosing settings: no result is reported on them."""


class AirfoilDataModule(RangedData):
    """NACA 4-digit wing profiles and their lift-to-drag ratio at one angle of attack.

    Camber (0 to 8 % of the chord), its position (20 to 70 %) and thickness (6 to 24 %) are drawn
    uniformly, lift and drag computed with NeuralFoil and kept in ``root``: a few seconds, once.
    Profiles whose lift or drag is not finite, whose drag is not positive, or of which NeuralFoil is
    not sure enough, are dropped; :attr:`dropped` counts them. Training, validation and the clean
    test samples come from the inner part of the range of all three parameters, less the profiles of
    highest lift-to-drag ratio there. Tested are

    - ``clean``: held-out profiles inside both ranges;
    - ``shape_1`` to ``shape_5``: a parameter outside the inner part, from near to far;
    - ``ratio_1`` to ``ratio_5``: all parameters inside it, the lift-to-drag ratio higher than any
      that is trained on, from the next best to the best;
    - ``noise``: the clean profiles with Gaussian noise on every node;
    - for choosing settings only: ``rotation`` (measured up to 2 degrees askew), ``roughness``
      (smooth waves of 0.003 chords) and ``resampling`` (nodes slid along the contour).

    Args:
        root: Folder of the computed lift and drag.
        representation: ``"graph"``: batches of graphs, see
            :class:`~it3_lightning.data.contour_graphs.ContourGraphs`; ``"contour"``: rows
            ``(B, 2 * nodes)`` of x, y, x, y, ..., less those of the mean training contour and
            divided by their spread about it. Both see the same nodes, and neither the parameters.
        profiles: How many are drawn.
        nodes: Of each contour, an even number.
        angle: Of attack, in degrees.
        reynolds: Reynolds number.
        model_size: Of NeuralFoil's network.
        min_confidence: Least confidence of NeuralFoil, 0 to 1.
        inner: Part of each parameter's range to train on, in its middle.
        held_ratio: Part of the inner profiles that is held out for its lift-to-drag ratio.
        noise: Standard deviation of ``noise``, in chords.
        kwargs: Settings of :class:`~it3_lightning.data.ranged.RangedData`.

    Raises:
        ImportError: NeuralFoil or torch_geometric is needed and not installed.
        ValueError: A setting is out of its range, there are too few profiles for it, or a file in
            ``root`` is damaged.
    """

    LEVELS = AIRFOIL_LEVELS
    SHIFTS = AIRFOIL_SHIFTS
    TUNING_SHIFTS = AIRFOIL_TUNING_SHIFTS

    def __init__(
        self,
        root: str | Path = "data/airfoils",
        *,
        representation: Representation = "graph",
        profiles: int = 2000,
        nodes: int = 64,
        angle: float = 5.0,
        reynolds: float = 1e6,
        model_size: ModelSize = "xlarge",
        min_confidence: float = 0.8,
        inner: float = 0.85,
        held_ratio: float = 0.15,
        noise: float = 0.002,
        shifts: Sequence[str] = AIRFOIL_SHIFTS,
        **kwargs: Any,
    ) -> None:
        super().__init__(shifts=shifts, **kwargs)
        self.root = root
        self.representation: Representation = representation
        self.profiles = profiles
        self.nodes = nodes
        self.angle = angle
        self.reynolds = reynolds
        self.model_size: ModelSize = model_size
        self.min_confidence = min_confidence
        self.inner = inner
        self.held_ratio = held_ratio
        self.noise = noise
        self._dropped = 0
        self.check()

    def check(self) -> None:
        """Refuse settings out of their range, before anything is computed."""
        super().check()
        known = get_args(Representation)
        if self.representation not in known:
            raise ValueError(unknown("representation", self.representation, known))
        for name in ("inner", "held_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"Expected {name} between 0 and 1, got {getattr(self, name)}.")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"Expected min_confidence in [0, 1], got {self.min_confidence}.")
        if self.noise < 0:
            raise ValueError(f"Expected noise >= 0 chords, got {self.noise}.")
        contours(torch.tensor([self._profiles.low]), self.nodes)

    def prepare_data(self) -> None:
        """Compute the lift and drag that is not there yet."""
        self.check()
        self._profiles.polars(self.root)

    @property
    def dropped(self) -> int:
        """Number of profiles without usable lift and drag."""
        self.setup("fit")
        return self._dropped

    @property
    def pool_key(self) -> tuple[object, ...]:
        """The settings that :meth:`load` depends on."""
        ranges = self.min_confidence, self.inner, self.held_ratio
        return self._profiles, str(self.root), self.nodes, *ranges

    def load(self) -> Pool:
        """Return the profiles inside the range of training, and those outside it by level."""
        profiles = self._profiles
        polars = profiles.polars(self.root)
        good = polars.good(self.min_confidence)
        self._dropped = int((~good).sum())
        rank_zero_info(f"{int(good.sum())} of {profiles.count} profiles, {self._dropped} dropped.")
        parameters, ratios = polars.parameters[good], (polars.lift / polars.drag)[good]
        samples = Samples(contours(parameters, self.nodes), ratios[:, None])
        return Pool.of(samples, self._levels(parameters, ratios))

    def perturbed(self, inputs: Tensor, name: str, generator: Generator) -> Tensor:
        """Return contours with perturbed nodes."""
        if name == "noise":
            return contour_shifts.noise(inputs, self.noise, generator)
        perturbation, size = _TUNING[name]
        return perturbation(inputs, size, generator)

    def dataset(self, samples: Samples) -> Dataset[Any]:
        """Return the profiles as graphs or as rows."""
        if self.representation == "graph":
            return ContourGraphs(samples.inputs, samples.targets)
        mean = self._splits["train"].inputs.mean(dim=0)
        spread = (self._splits["train"].inputs - mean).square().mean().sqrt()
        return Rows(Samples((samples.inputs - mean) / spread, samples.targets))

    def _levels(self, parameters: Tensor, ratios: Tensor) -> dict[str, Tensor]:
        """Return the profiles outside the range of training, by level."""
        low, high = torch.tensor([self._profiles.low, self._profiles.high], dtype=torch.float64)
        margin = (high - low) * (1 - self.inner) / 2
        shape = outside(parameters, low + margin, high - margin)
        need = "Draw more profiles, or change inner and held_ratio."
        far = levels(shape, "shape", need)
        inner = torch.where(shape == 0, ratios, -torch.inf)
        held = int(self.held_ratio * (shape == 0).sum())
        above = inner - inner.sort(descending=True).values[held]
        return {**far, **levels(above.clamp_min(0), "ratio", need)}

    @property
    def _profiles(self) -> ProfileSet:
        """The profiles of these settings; refuses those out of range."""
        return ProfileSet(
            count=self.profiles,
            angle=self.angle,
            reynolds=self.reynolds,
            model_size=self.model_size,
        )
