"""Reader of computed wing profiles: NACA contours, lift-to-drag ratio, shapes outside the range.

A perturbation takes contours ``(B, N, 2)``, a size and a generator: a poor measurement of the same
profile, so the target stays. ``examples/datasets/compute_airfoils.py`` computes lift and drag.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Generator, Tensor
from torch.utils.data import Dataset

from it3_lightning.data.base import (
    check_choice,
    check_deviation,
    check_integer,
    check_share,
    read_npz,
)
from it3_lightning.data.ranges import Pool, RangedData, level_names, levels, outside
from it3_lightning.data.sampling import Rows, Samples, seeded
from it3_lightning.utils.messages import not_installed

Representation = Literal["graph", "contour"]
ModelSize = Literal[
    "xxsmall", "xsmall", "small", "medium", "large", "xlarge", "xxlarge", "xxxlarge"
]
_THICKNESS = (0.2969, -0.1260, -0.3516, 0.2843, -0.1036)  # of the square root of x, x, x^2, ...
_WAVES = 4  # along the contour


def contours(parameters: Tensor, nodes: int = 64) -> Tensor:
    r"""Return contours of NACA 4-digit profiles with real-valued digits, ``(B, N, 2)`` in chords.

    With the chord from (0, 0) to (1, 0), camber :math:`m` at :math:`x = p` and thickness :math:`t`,

    .. math::
        y_t &= 5 t (0.2969 \sqrt{x} - 0.1260 x - 0.3516 x^2 + 0.2843 x^3 - 0.1036 x^4) \\
        y_c &= \tfrac{m}{p^2} (2 p x - x^2) \text{ before } p, \quad
               \tfrac{m}{(1-p)^2} (1 - 2 p + 2 p x - x^2) \text{ behind it}

    the surfaces are :math:`(x \mp y_t \sin\theta, y_c \pm y_t \cos\theta)` with
    :math:`\tan\theta = dy_c / dx`. The nodes have cosine spacing,
    :math:`x_i = (1 + \cos(2 \pi i / N)) / 2`: from the trailing edge over the upper surface to the
    leading edge, and back along the lower one. The last node joins the first.

    Args:
        parameters: ``(B, 3)``: camber :math:`m \ge 0`, its position :math:`0 < p < 1` and thickness
            :math:`t > 0`, all as parts of the chord: NACA 2412 is ``(0.02, 0.4, 0.12)``.
        nodes: An even number ``N`` of at least 8.

    Source: I. H. Abbott and A. E. von Doenhoff, "Theory of Wing Sections" (1959), section 6.4. The
    last coefficient there is -0.1015, which leaves the trailing edge open by 0.0021 t on each side.

    >>> profile = contours(torch.tensor([[0.02, 0.4, 0.12]]), nodes=8)[0]
    >>> round((profile[2, 1] - profile[6, 1]).item(), 4)  # upper less lower, at half the chord
    0.1057
    """
    if type(nodes) is not int or nodes < 8 or nodes % 2:
        raise ValueError(f"Expected an even number of nodes, 8 or more, got {nodes!r}.")
    if parameters.shape[1:] != (3,) or not parameters.is_floating_point():
        raise ValueError(
            "Expected floating-point parameters (B, 3): camber, position, thickness; got "
            f"{tuple(parameters.shape)} of {parameters.dtype}."
        )
    m, p, t = (column[:, None] for column in parameters.unbind(1))
    right = ((m >= 0) & (p > 0) & (p < 1) & (t > 0))[:, 0]
    if not bool(right.all()):
        raise ValueError(
            "Expected camber >= 0, 0 < position < 1 and thickness > 0, as parts of the chord, got "
            f"{parameters[~right][0].tolist()}. NACA 2412 is [0.02, 0.4, 0.12]."
        )
    index = torch.arange(nodes, device=parameters.device)
    turns = torch.minimum(index, nodes - index).to(parameters) / nodes  # the same on both sides
    x = ((1 + torch.cos(2 * math.pi * turns)) / 2).expand(len(parameters), nodes)
    powers = (x.sqrt(), x, x**2, x**3, x**4)
    half = 5 * t * sum(c * power for c, power in zip(_THICKNESS, powers, strict=True))
    side = torch.where(index <= nodes // 2, half, -half)
    line = torch.where(x < p, m / p**2, m / (1 - p) ** 2)
    camber = line * torch.where(x < p, 2 * p * x - x**2, 1 - 2 * p + 2 * p * x - x**2)
    angle = torch.atan(2 * line * (p - x))
    return torch.stack([x - side * angle.sin(), camber + side * angle.cos()], dim=2)


def normals(profiles: Tensor) -> Tensor:
    """Return outward unit normals of contours ``(B, N, 2)``, from each node's two neighbours."""
    along = profiles.roll(-1, dims=1) - profiles.roll(1, dims=1)
    outward = torch.stack([along[..., 1], -along[..., 0]], dim=2)
    units: Tensor = outward / outward.norm(dim=2, keepdim=True).clamp_min(1e-12)
    return units


def noise(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Add Gaussian noise of standard deviation ``size``, in chords, to every node."""
    draws = torch.randn(contours.shape, generator=generator, dtype=contours.dtype)
    return contours + size * draws


def rotation(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Turn each profile around its quarter chord by an angle from ``U(-size, size)`` degrees."""
    draws = torch.rand(len(contours), generator=generator, dtype=contours.dtype)
    angles = math.radians(size) * (2 * draws - 1)
    cosine, sine = angles.cos(), angles.sin()
    turn = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    centre = torch.tensor([0.25, 0.0], dtype=contours.dtype)
    return (contours - centre) @ turn.mT + centre


def roughness(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Bend the contour in a few smooth waves of root mean square ``size``, in chords."""
    count, nodes = contours.shape[:2]
    turns = 2 * math.pi * torch.arange(nodes, dtype=contours.dtype) / nodes
    phases = turns[:, None] * torch.arange(1, _WAVES + 1)
    waves = torch.cat([phases.cos(), phases.sin()], dim=1)  # (N, 2 * _WAVES)
    draws = torch.randn((count, 2 * _WAVES), generator=generator, dtype=contours.dtype)
    amplitudes = draws / math.sqrt(_WAVES)
    return contours + size * (amplitudes @ waves.T)[..., None] * normals(contours)


def resampling(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Move each node towards the next one, by a part of the way from ``U(0, size)``."""
    parts = torch.rand((*contours.shape[:2], 1), generator=generator, dtype=contours.dtype)
    return contours + size * parts * (contours.roll(-1, dims=1) - contours)


PERTURBATIONS: Mapping[str, tuple[Callable[[Tensor, float, Generator], Tensor], float]] = {
    "rotation": (rotation, 2.0),
    "roughness": (roughness, 0.003),
    "resampling": (resampling, 0.8),
}
"""For choosing settings alone, each with its size: no result is reported on them."""


class ContourGraphs(Samples):
    """Closed contours as graphs of torch_geometric, and a target for each.

    Each node has the features x, y and the two parts of its outward normal; each edge, one in each
    direction between neighbours, the way from its first node to its second in mean steps of the
    contour. A batch is ``(Batch, (B, 1))``; graphs themselves hold no target.
    """

    def __init__(self, contours: Tensor, targets: Tensor) -> None:
        try:
            from torch_geometric.data import Batch, Data
        except ImportError as error:
            reason = "which holds graphs (representation='contour' needs none)"
            raise ImportError(not_installed("torch_geometric", reason, "graphs", error)) from error
        nodes = torch.cat([contours, normals(contours)], dim=2).float()
        here = torch.arange(contours.shape[1])
        ends = torch.cat([here, here.roll(-1)])  # each edge forth, then each edge back
        edges = torch.stack([ends, ends.roll(len(here))])
        mean = (contours.roll(-1, dims=1) - contours).norm(dim=2).mean(dim=1)[:, None, None]
        ways = ((contours[:, edges[1]] - contours[:, edges[0]]) / mean).float()
        self.graphs = [
            Data(x=x, edge_index=edges, edge_attr=way) for x, way in zip(nodes, ways, strict=True)
        ]
        self.targets = targets.float()
        self._batch = Batch

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, indices: list[int]) -> tuple[Any, Tensor]:
        chosen = [self.graphs[index] for index in indices]
        return self._batch.from_data_list(chosen), self.targets[torch.as_tensor(indices)]


@dataclass(frozen=True)
class Polars:
    """Profiles and the coefficients of the forces on them, ``(N,)``, all float64."""

    parameters: Tensor  # (N, 3): camber, position and thickness, see contours
    lift: Tensor
    drag: Tensor
    confidence: Tensor  # the solver's own, between 0 and 1

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
    """Profiles drawn uniformly from a box of parameters, all in the same stream of air."""

    LOW: ClassVar = (0.0, 0.2, 0.06)  # camber, position and thickness, as parts of the chord
    HIGH: ClassVar = (0.08, 0.7, 0.24)

    count: int = 2000
    seed: int = 0
    angle: float = 5.0  # of attack, in degrees
    reynolds: float = 1e6  # by the chord
    model_size: ModelSize = "xlarge"  # of NeuralFoil: the larger, the more exact and the slower

    def __post_init__(self) -> None:
        check_integer("profiles", self.count, 1)
        check_integer("seed", self.seed, 0)
        check_choice("model_size", self.model_size, get_args(ModelSize))
        for name, low, high in (("angle", -20, 20), ("reynolds", 1e4, 1e8)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"Expected {name} from {low:g} to {high:g}, where NeuralFoil knows its way, "
                    f"got {getattr(self, name)}."
                )

    @property
    def settings(self) -> str:
        """All settings as text: they name the file, and stand in it."""
        return json.dumps({**asdict(self), "low": self.LOW, "high": self.HIGH}, sort_keys=True)

    def parameters(self) -> Tensor:
        """Return camber, its position and thickness of all profiles, ``(N, 3)``, float64."""
        low, high = torch.tensor([self.LOW, self.HIGH], dtype=torch.float64)
        generator = seeded(self.seed, "profiles")
        draws = torch.rand(self.count, 3, dtype=torch.float64, generator=generator)
        drawn: Tensor = low + (high - low) * draws
        return drawn

    def file(self, root: str | Path) -> Path:
        """Return where the forces are kept."""
        digest = hashlib.sha256(self.settings.encode()).hexdigest()
        return Path(root) / f"naca_{digest[:16]}.npz"

    def known(self, root: str | Path) -> Polars:
        """Return the forces on the first profiles, as many as the file in ``root`` has.

        ValueError where it is damaged, or holds the forces of other profiles or settings.
        """
        file, ours = self.file(root), self.parameters()
        if not file.exists():
            return Polars(ours[:0], *torch.empty(3, 0, dtype=torch.float64))
        remedy = f"Delete it, and run {self._script(root)}"
        (parameters, *forces), theirs = read_npz(file, POLAR_NAMES, remedy)
        ours = ours[: parameters.numel() // 3]
        kinds = {(force.shape, force.dtype) for force in forces}
        same = parameters.dtype == ours.dtype and torch.equal(parameters, ours)
        if theirs != self.settings or not same or kinds != {(ours[:, 0].shape, ours.dtype)}:
            raise ValueError(
                f"Expected {file} to hold {', '.join(POLAR_NAMES)} of profiles of {self.settings}, "
                f"got {theirs[:400]}, or arrays of another number or type. {remedy}"
            )
        return Polars(parameters, *forces)

    def polars(self, root: str | Path) -> Polars:
        """Return the forces on all profiles; FileNotFoundError where the file lacks some."""
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


@dataclass(eq=False)
class AirfoilDataModule(RangedData):
    """NACA 4-digit wing profiles and their lift-to-drag ratio at one angle of attack.

    Camber (0 to 8 % of the chord), its position (20 to 70 %) and thickness (6 to 24 %) are drawn
    uniformly; ``examples/datasets/compute_airfoils.py`` computes lift and drag with NeuralFoil into
    ``root`` in a few seconds, once. Profiles without usable values, or of which NeuralFoil is not
    sure enough, are dropped; :attr:`dropped` counts them. Training, validation and the clean test
    samples come from the inner part of the range of all three parameters, less the profiles of
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
        representation: ``"graph"``: batches of graphs, see :class:`ContourGraphs`; ``"contour"``:
            rows ``(B, 2 * nodes)`` of x, y, x, y, ..., less the mean training contour, divided by
            the spread about it. Both see the same nodes, and neither the parameters.
        profiles: How many are drawn.
        nodes: Of each contour, an even number.
        angle: Of attack, in degrees.
        reynolds: Reynolds number.
        model_size: Of NeuralFoil's network.
        min_confidence: Least confidence of NeuralFoil, 0 to 1.
        inner: Part of each parameter's range to train on, in its middle.
        held_ratio: Part of the inner profiles that is held out for its lift-to-drag ratio.
        noise: Standard deviation of ``noise``, in chords.

    Raises:
        FileNotFoundError: Lift and drag of these settings are not in ``root``.
        ImportError: torch_geometric is needed and not installed.
        ValueError: A setting is out of its range, profiles are too few, or their file is damaged.
    """

    LEVELS = (*level_names("shape"), *level_names("ratio"))
    SHIFTS = (*LEVELS, "noise")
    TUNING_SHIFTS = tuple(PERTURBATIONS)
    sample_settings = ("_profiles", "root", "nodes", "min_confidence", "inner", "held_ratio")

    root: str | Path = "data/airfoils"
    _: KW_ONLY
    representation: Representation = "graph"
    profiles: int = 2000
    nodes: int = 64
    angle: float = 5.0
    reynolds: float = 1e6
    model_size: ModelSize = "xlarge"
    min_confidence: float = 0.8
    inner: float = 0.85
    held_ratio: float = 0.15
    noise: float = 0.002

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
        contours(torch.tensor([self._profiles.LOW]), self.nodes)

    def prepare_data(self) -> None:
        """Refuse missing or damaged files of lift and drag before any work."""
        self.check()
        self._profiles.polars(self.root)

    @property
    def dropped(self) -> int:
        """Number of profiles without usable lift and drag."""
        self.setup("fit")
        return self._dropped

    def load(self) -> Pool:
        """Return the profiles inside the range of training, and those outside it by level."""
        polars = self._profiles.polars(self.root)
        good = polars.good(self.min_confidence)
        self._dropped = int((~good).sum())
        rank_zero_info(f"{int(good.sum())} of {self.profiles} profiles, {self._dropped} dropped.")
        parameters, ratios = polars.parameters[good], (polars.lift / polars.drag)[good]
        samples = Rows(contours(parameters, self.nodes), ratios[:, None])
        return Pool.of(samples, self._levels(parameters, ratios))

    def perturbed(self, inputs: Tensor, name: str, generator: Generator) -> Tensor:
        """Return contours with perturbed nodes."""
        perturbation, size = {**PERTURBATIONS, "noise": (noise, self.noise)}[name]
        return perturbation(inputs, size, generator)

    def dataset(self, samples: Rows) -> Dataset[Any]:
        """Return the profiles as graphs or as rows."""
        if self.representation == "graph":
            return ContourGraphs(samples.inputs, samples.targets)
        train = self._splits["train"].inputs
        mean = train.mean(dim=0)
        spread = (train - mean).square().mean().sqrt()
        rows = ((samples.inputs - mean) / spread).flatten(1).float()
        return Rows(rows, samples.targets.float())

    def _levels(self, parameters: Tensor, ratios: Tensor) -> dict[str, Tensor]:
        """Return the profiles outside the range of training, by level."""
        low, high = torch.tensor([ProfileSet.LOW, ProfileSet.HIGH], dtype=torch.float64)
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
        stream = {name: getattr(self, name) for name in ("angle", "reynolds", "model_size")}
        return ProfileSet(count=self.profiles, **stream)
