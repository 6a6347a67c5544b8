"""Template method: values predicted inside a range of training and at levels outside it.

NASA's airfoil self-noise is the measured data that is split so: sound levels in a wind tunnel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from it3_lightning.data.base import (
    ShiftedData,
    check_choice,
    check_deviation,
    check_integer,
    check_share,
)
from it3_lightning.data.sampling import Rows, held_out, seeded
from it3_lightning.utils.messages import unknown

LEVELS = 5
BEYOND = "beyond"
Column = Literal["frequency", "angle", "chord", "velocity", "thickness", "level"]
FILE = "airfoil_self_noise.dat"
_ROWS = 1503
_MISSING, _GAIN = 0.1, 0.2
_RANGES = {  # of the published file, in Hz, degrees, m, m/s, m, dB
    "frequency": (200, 20000),
    "angle": (0, 22.2),
    "chord": (0.0254, 0.3048),
    "velocity": (31.7, 71.3),
    "thickness": (0.0004, 0.0585),
    "level": (103.3, 141.0),
}


@dataclass(frozen=True)
class Pool:
    """All samples, by where they lie."""

    inside: Rows
    levels: Mapping[str, Rows]

    @classmethod
    def of(cls, samples: Rows, levels: Mapping[str, Tensor]) -> Pool:
        """Return samples of which ``levels`` has the indices of those outside."""
        inside = torch.ones(len(samples), dtype=torch.bool)
        inside[torch.cat(list(levels.values()))] = False
        outside = {name: samples.select(indices) for name, indices in levels.items()}
        return cls(samples.select(inside.nonzero()[:, 0]), outside)


@dataclass(eq=False)
class RangedData(ShiftedData, ABC):
    """Samples with a real-valued target; what lies outside a range is held out, level by level.

    A subclass says in :meth:`load` where samples come from, in :meth:`perturbed` what perturbations
    do, and in ``dataset`` what a network sees. There are three kinds of test names: ``clean``,
    held-out samples inside the range; perturbations of the same samples; and levels, which are
    *other* samples, kept for testing: with ``evaluate_on="validation"``, choose under
    ``TUNING_SHIFTS``, and under ``beyond`` where some of these samples are set apart for it. Each
    batch is ``(inputs, targets)``, the targets ``(B, 1)``, float32.
    ``stream="unequal"`` makes three of the ten deciles of the target ten times as frequent.

    Args:
        val_size: Samples inside the range taken for validation.
        test_size: Samples inside the range taken for testing.
        beyond_size: Samples outside the range set apart for choosing, as many of each level; no
            level has them any more. 0: all are tested on.
    """

    LEVELS: ClassVar[tuple[str, ...]]
    needed_sizes = ("val_size", "test_size")
    shift_settings = ("noise",)

    _: KW_ONLY
    batch_size: int = 32
    eval_batch_size: int = 50
    val_size: int = 100
    test_size: int = 150
    beyond_size: int = 0

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of the perturbations to choose under, and of the samples beyond the range."""
        return (*self.TUNING_SHIFTS, *([BEYOND] if self.beyond_size else []))

    def source(self) -> tuple[object, ...]:
        """Return the settings of its own that the samples depend on."""
        return (*super().source(), self.beyond_size)

    @abstractmethod
    def load(self) -> Pool:
        """Return all samples."""

    @abstractmethod
    def perturbed(self, inputs: Tensor, name: str, generator: Generator) -> Tensor:
        """Return perturbed inputs; the targets stay."""

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        super().check()
        check_integer("beyond_size", self.beyond_size, 0)
        if 0 < self.beyond_size < len(self.LEVELS):
            raise ValueError(
                f"Expected beyond_size=0, or at least {len(self.LEVELS)}, as many of each level, "
                f"got {self.beyond_size}."
            )
        if self.severity is not None:
            raise ValueError(
                f"Expected no severity, got {self.severity!r}: levels are shifts of their own, and "
                f"perturbations have one size. Name the levels: shifts={list(self.SHIFTS)}."
            )

    def check_shift(self, name: str) -> None:
        """Refuse an unknown shift, and a level of the validation samples."""
        known = (*self.SHIFTS, *self.tuning_shifts)
        if name not in known:
            raise ValueError(unknown("shift", name, known))
        if self.evaluate_on == "validation" and name in self.LEVELS:
            raise ValueError(
                "Expected no levels among the shifts with evaluate_on='validation', got "
                f"{name!r}. They are kept for testing: set shifts={list(self.TUNING_SHIFTS)}."
            )

    def split(self) -> dict[str, Rows]:
        """Return the samples to train, validate and test on, and those of each level."""
        pool = self.load()
        test, others = held_out(pool.inside, self.test_size, self.seed, "test_size")
        return {**self.parted(others, test), **self._set_apart(pool.levels)}

    def _set_apart(self, levels: Mapping[str, Rows]) -> dict[str, Rows]:
        """Return the levels less the samples set apart, and these."""
        size = self.beyond_size // len(levels)
        if not size:
            return dict(levels)
        parts = {name: held_out(own, size, self.seed, name) for name, own in levels.items()}
        apart = [own for own, _ in parts.values()]
        inputs, targets = (torch.cat([getattr(p, n) for p in apart]) for n in ("inputs", "targets"))
        return {
            **{name: others for name, (_, others) in parts.items()},
            BEYOND: Rows(inputs, targets),
        }

    def shifted(self, name: str) -> Rows:
        """Return the samples of a level, or those inside the range under a perturbation."""
        beyond = name in (*self.LEVELS, BEYOND)
        samples: Rows = self._splits[name if beyond else self.evaluate_on]
        if beyond:
            return samples
        generator = seeded(self.seed, name, self.evaluate_on)
        return Rows(self.perturbed(samples.inputs, name, generator), samples.targets)

    def groups(self, samples: Rows) -> Tensor:
        """Return the tenths of the targets."""
        return deciles(samples.targets[:, 0])


def deciles(values: Tensor) -> Tensor:
    """Return which tenth of the values each of them belongs to, ``(N,)``, 0 to 9.

    >>> deciles(torch.tensor([5.0, 1.0, 3.0, 4.0, 2.0]))
    tensor([8, 0, 4, 6, 2])
    """
    ranks = values.argsort(stable=True).argsort()
    return 10 * ranks // len(values)


def level_names(what: str) -> tuple[str, ...]:
    """Return the names of all levels."""
    return tuple(f"{what}_{level}" for level in range(1, LEVELS + 1))


def outside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return how far samples lie outside a box: 0 inside, else in widths of the box."""
    excess = (low - values).clamp_min(0) + (values - high).clamp_min(0)
    distance: Tensor = (excess / (high - low)).norm(dim=1)
    return distance


def levels(distance: Tensor, what: str, need: str) -> dict[str, Tensor]:
    """Return the samples outside a range by level, from near to far."""
    indices = distance.argsort(stable=True)
    indices = indices[distance[indices] > 0]
    if len(indices) < LEVELS:
        raise ValueError(
            f"Expected at least {LEVELS} samples outside the range of {what}, one for each level, "
            f"got {len(indices)}. {need}"
        )
    parts = indices.tensor_split(LEVELS)
    return {name: part.sort().values for name, part in zip(level_names(what), parts, strict=True)}


@dataclass(eq=False)
class AirfoilSelfNoiseDataModule(RangedData):
    """The 1,503 measurements of UCI's "Airfoil Self-Noise": five features, sound level in dB.

    The features are frequency (Hz), angle of attack (degrees), chord (m), velocity (m/s) and
    displacement thickness on the suction side (m); a network sees them, ``(B, 5)``, with mean 0 and
    standard deviation 1 in the training set. What has the highest values of one column is held out.
    Tested are

    - ``clean``: held-out measurements below that;
    - ``high_1`` to ``high_5``: those held out, from the least beyond the range to the most;
    - ``noise``: the clean ones, with Gaussian noise on every feature;
    - for choosing settings only: ``missing`` (one feature in ten unknown, its training mean in its
      place) and ``gain`` (each feature's deviation from its mean off by a factor, drawn once).

    Args:
        root: Folder of ``airfoil_self_noise.dat``: lines of six numbers, apart by tabs.
        column: Whose highest values are held out: a feature, or ``"level"``, the target.
        held: Part of the measurements that is held out; equal values stay together.
        noise: Standard deviation of ``noise``, in those of the training features.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is empty, cut off, damaged or another, or a setting is out of its range.

    Source: T. F. Brooks et al., "Airfoil self-noise and prediction", NASA RP-1218 (1989); UCI
    Machine Learning Repository, data set 291.
    """

    LEVELS = level_names("high")
    SHIFTS = (*LEVELS, "noise")
    TUNING_SHIFTS = ("missing", "gain")
    sample_settings = ("root", "column", "held")

    root: str | Path = "data/airfoil_self_noise"
    _: KW_ONLY
    column: Column = "thickness"
    held: float = 0.3
    noise: float = 0.2

    def check(self) -> None:
        """Refuse settings out of their range, before the file is read."""
        super().check()
        check_choice("column", self.column, get_args(Column))
        check_share("held", self.held)
        check_deviation("noise", self.noise, "standard deviations")

    def prepare_data(self) -> None:
        """Make sure that the file is there and whole: nothing is downloaded."""
        read(Path(self.root) / FILE)

    def load(self) -> Pool:
        """Return the measurements below the range that is held out, and those in it by level."""
        rows = read(Path(self.root) / FILE)
        samples = Rows(rows[:, :5], rows[:, 5:])
        values = rows[:, get_args(Column).index(self.column)]
        above = (values - values.quantile(1 - self.held)).clamp_min(0)
        need = "Raise held, or hold out another column."
        return Pool.of(samples, levels(above, "high", need))

    def perturbed(self, inputs: Tensor, name: str, generator: Generator) -> Tensor:
        """Return perturbed features."""
        mean, std = self._scale()
        if name == "missing":
            lost = torch.rand(inputs.shape, generator=generator) < _MISSING
            return torch.where(lost, mean, inputs)
        if name == "gain":
            factors = torch.randn(inputs.shape[1], generator=generator, dtype=inputs.dtype)
            return mean + (inputs - mean) * (1 + _GAIN * factors)
        draws = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
        return inputs + self.noise * std * draws

    def dataset(self, samples: Rows) -> Dataset[Any]:
        """Return the features on the scale of the training set."""
        mean, std = self._scale()
        return Rows(((samples.inputs - mean) / std).float(), samples.targets.float())

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the training features, 1 for a constant one."""
        inputs = self._splits["train"].inputs
        std = inputs.std(dim=0, correction=0)
        return inputs.mean(dim=0), torch.where(std > 0, std, 1.0)


def read(file: Path) -> Tensor:
    """Read UCI's ``airfoil_self_noise.dat``, ``(1503, 6)``, float64: features and sound level.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is empty, cut off, damaged or another file.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected {file.resolve()}, got no such file. Get 'Airfoil Self-Noise' of the UCI "
            f"Machine Learning Repository, and place {FILE} there, or set root to its folder."
        )
    rows: list[list[float]] = []
    for line in filter(str.strip, file.read_text(errors="replace").splitlines()):
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            row = []
        fits = [low <= v <= high for v, (low, high) in zip(row, _RANGES.values(), strict=False)]
        if len(row) != len(_RANGES) or not all(fits):
            ranges = ", ".join(f"{name} {low} to {high}" for name, (low, high) in _RANGES.items())
            raise ValueError(
                f"Expected six numbers ({ranges}) in line {len(rows) + 1} of {file}, got "
                f"{line[:80]!r}. It is damaged or another file: put the published one in its place."
            )
        rows.append(row)
    if len(rows) != _ROWS:
        raise ValueError(
            f"Expected {_ROWS} measurements in {file}, got {len(rows)}. It is empty, cut off or "
            "another file: put the published one in its place."
        )
    return torch.tensor(rows, dtype=torch.float64)
