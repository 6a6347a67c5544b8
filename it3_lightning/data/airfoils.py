"""Reader of computed wing profiles: NACA contours, lift-to-drag ratio, shapes outside the range.

``examples/datasets/compute_airfoils.py`` computes the lift and drag in the files read here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Generator, Tensor
from torch.utils.data import Dataset

from it3_lightning.data.base import check_choice, check_deviation, check_integer, check_share
from it3_lightning.data.contours import PERTURBATIONS, ContourGraphs, contours, noise
from it3_lightning.data.files import read_npz
from it3_lightning.data.ranges import Pool, RangedData, level_names, levels, outside
from it3_lightning.data.sampling import Rows, seeded
from it3_lightning.utils.messages import unknown

Representation = Literal["graph", "contour"]
ModelSize = Literal[
    "xxsmall", "xsmall", "small", "medium", "large", "xlarge", "xxlarge", "xxxlarge"
]


@dataclass(frozen=True)
class Polars:
    """Profiles and the forces on them, all float64.

    Args:
        parameters: ``(N, 3)``: camber, position and thickness, see :func:`contours`.
        lift: ``(N,)`` lift coefficients.
        drag: ``(N,)`` drag coefficients.
        confidence: ``(N,)``: the solver's own, between 0 and 1.
    """

    parameters: Tensor
    lift: Tensor
    drag: Tensor
    confidence: Tensor

    def __len__(self) -> int:
        return len(self.lift)

    def good(self, least: float) -> Tensor:
        """Return ``(N,)``: lift finite, drag finite and positive, confidence at least ``least``."""
        finite = self.lift.isfinite() & self.drag.isfinite()
        return finite & (self.drag > 0) & (self.confidence >= least)


POLAR_NAMES = tuple(field.name for field in fields(Polars))
"""Names of the arrays in a file, beside ``settings``."""


@dataclass(frozen=True, kw_only=True)
class ProfileSet:
    """Profiles drawn uniformly from a box of parameters, all in the same stream of air.

    Args:
        count: Number of profiles.
        seed: Of the draw.
        low: Least camber, position of the camber and thickness, as parts of the chord.
        high: The largest ones.
        angle: Of attack, in degrees.
        reynolds: Reynolds number, by the chord.
        model_size: Of NeuralFoil's network: the larger, the more exact and the slower.
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

    @property
    def settings(self) -> str:
        """All settings as text: they name the file, and stand in it."""
        return json.dumps(asdict(self), sort_keys=True)

    def parameters(self) -> Tensor:
        """Return camber, its position and thickness of all profiles, ``(N, 3)``, float64."""
        low, high = (torch.tensor(end, dtype=torch.float64) for end in (self.low, self.high))
        generator = seeded(self.seed, "profiles")
        return low + (high - low) * torch.rand(self.count, 3, dtype=low.dtype, generator=generator)

    def file(self, root: str | Path) -> Path:
        """Return where the forces are kept."""
        digest = hashlib.sha256(self.settings.encode()).hexdigest()
        return Path(root) / f"naca_{digest[:16]}.npz"

    def known(self, root: str | Path) -> Polars:
        """Return the forces on the first profiles, as many as the file in ``root`` has.

        Raises:
            ValueError: The file is damaged, or holds the forces of other profiles or settings.
        """
        file = self.file(root)
        if not file.is_file():
            return Polars(*(torch.empty(shape, dtype=torch.float64) for shape in ((0, 3), 0, 0, 0)))
        remedy = f"Delete it, and run {self._script(root)}"
        forces, theirs = read_npz(file, POLAR_NAMES, remedy)
        polars = Polars(*forces)
        counts = {len(getattr(polars, name)) for name in POLAR_NAMES}
        ours = self.parameters()[: len(polars)]
        if theirs != self.settings or len(counts) > 1 or not torch.equal(polars.parameters, ours):
            raise ValueError(
                f"Expected {file} to hold profiles of {self.settings}, got {sorted(counts)} values "
                f"of {theirs}, or other profiles. {remedy}"
            )
        return polars

    def polars(self, root: str | Path) -> Polars:
        """Return the forces on all profiles.

        Raises:
            FileNotFoundError: The file lacks some, or there is none.
            ValueError: The file is damaged, or holds the forces of other profiles or settings.
        """
        known = self.known(root)
        if len(known) < self.count:
            raise FileNotFoundError(
                f"Expected lift and drag of {self.count} profiles in {self.file(root).resolve()}, "
                f"got {len(known) or 'no such file'}. Compute them: {self._script(root)}"
            )
        return known

    def _script(self, root: str | Path) -> str:
        return (
            f"python examples/datasets/compute_airfoils.py --root {root} --profiles {self.count} "
            f"--angle {self.angle} --reynolds {self.reynolds} --model-size {self.model_size}"
        )


class AirfoilDataModule(RangedData):
    """NACA 4-digit wing profiles and their lift-to-drag ratio at one angle of attack.

    Camber (0 to 8 % of the chord), its position (20 to 70 %) and thickness (6 to 24 %) are drawn
    uniformly; lift and drag are those that ``examples/datasets/compute_airfoils.py`` computes with
    NeuralFoil into ``root``: a few seconds, once.
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
            :class:`ContourGraphs`; ``"contour"``: rows
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
        kwargs: Settings of :class:`~it3_lightning.data.ranges.RangedData`.

    Raises:
        FileNotFoundError: Lift and drag of these settings are not in ``root``.
        ImportError: torch_geometric is needed and not installed.
        ValueError: A setting is out of its range, there are too few profiles for it, or a file in
            ``root`` is damaged.
    """

    LEVELS = (*level_names("shape"), *level_names("ratio"))
    SHIFTS = (*LEVELS, "noise")
    TUNING_SHIFTS = tuple(PERTURBATIONS)
    sample_settings = ("_profiles", "root", "nodes", "min_confidence", "inner", "held_ratio")

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
        **kwargs: Any,
    ) -> None:
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
        super().__init__(**kwargs)

    def check(self) -> None:
        """Refuse settings out of their range, before anything is computed."""
        super().check()
        check_choice("representation", self.representation, get_args(Representation))
        check_share("inner", self.inner)
        check_share("held_ratio", self.held_ratio)
        check_deviation("noise", self.noise, "chords")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(
                f"Expected min_confidence in [0, 1], got {self.min_confidence}. Set "
                "min_confidence=0 to keep all profiles."
            )
        contours(torch.tensor([self._profiles.low]), self.nodes)

    def prepare_data(self) -> None:
        """Refuse missing or damaged files of lift and drag before any work."""
        self.check()
        self._profiles.polars(self.root)

    @property
    def dropped(self) -> int:
        """Number of profiles without usable lift and drag."""
        self.setup("fit")
        return self._dropped

    def strength(self) -> tuple[object, ...]:
        """Return the deviation of the noise."""
        return (self.noise,)

    def load(self) -> Pool:
        """Return the profiles inside the range of training, and those outside it by level."""
        profiles = self._profiles
        polars = profiles.polars(self.root)
        good = polars.good(self.min_confidence)
        self._dropped = int((~good).sum())
        rank_zero_info(f"{int(good.sum())} of {profiles.count} profiles, {self._dropped} dropped.")
        parameters, ratios = polars.parameters[good], (polars.lift / polars.drag)[good]
        samples = Rows(contours(parameters, self.nodes), ratios[:, None])
        return Pool.of(samples, self._levels(parameters, ratios))

    def perturbed(self, inputs: Tensor, name: str, generator: Generator) -> Tensor:
        """Return contours with perturbed nodes."""
        if name == "noise":
            return noise(inputs, self.noise, generator)
        perturbation, size = PERTURBATIONS[name]
        return perturbation(inputs, size, generator)

    def dataset(self, samples: Rows) -> Dataset[Any]:
        """Return the profiles as graphs or as rows."""
        if self.representation == "graph":
            return ContourGraphs(samples.inputs, samples.targets)
        mean = self._splits["train"].inputs.mean(dim=0)
        spread = (self._splits["train"].inputs - mean).square().mean().sqrt()
        rows = ((samples.inputs - mean) / spread).flatten(1).float()
        return Rows(rows, samples.targets.float())

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
