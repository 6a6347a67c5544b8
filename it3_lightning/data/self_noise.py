"""Reader of NASA's airfoil self-noise: sound levels of wing sections in a wind tunnel, from UCI."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from it3_lightning.data.base import check_choice, check_deviation, check_share
from it3_lightning.data.ranges import Pool, RangedData, level_names, levels
from it3_lightning.data.sampling import Rows

Column = Literal["frequency", "angle", "chord", "velocity", "thickness", "level"]
FILE = "airfoil_self_noise.dat"
_ROWS = 1503
_RANGES = {  # of the published file, in Hz, degrees, m, m/s, m, dB
    "frequency": (200, 20000),
    "angle": (0, 22.2),
    "chord": (0.0254, 0.3048),
    "velocity": (31.7, 71.3),
    "thickness": (0.0004, 0.0585),
    "level": (103.3, 141.0),
}
_MISSING, _GAIN = 0.1, 0.2


class AirfoilSelfNoiseDataModule(RangedData):
    """The 1,503 measurements of UCI's "Airfoil Self-Noise": five features, sound level in dB.

    The features are frequency (Hz), angle of attack (degrees), chord (m), velocity (m/s) and
    displacement thickness on the suction side (m). What has the highest values of one column is
    held out. Tested are

    - ``clean``: held-out measurements below that;
    - ``high_1`` to ``high_5``: those held out, from the least beyond the range to the most;
    - ``noise``: the clean ones, with Gaussian noise on every feature;
    - for choosing settings only: ``missing`` (one feature in ten unknown, its training mean in its
      place) and ``gain`` (each feature's deviation from its mean off by a factor, drawn once).

    The features a network sees, ``(B, 5)``, have mean 0 and standard deviation 1 in the training
    set; the sound level stays in dB.

    Args:
        root: Folder of ``airfoil_self_noise.dat``: lines of six numbers, apart by tabs.
        column: Whose highest values are held out: a feature, or ``"level"``, the target.
        held: Part of the measurements that is held out; equal values stay together.
        noise: Standard deviation of ``noise``, in those of the training features.
        kwargs: Settings of :class:`~it3_lightning.data.ranges.RangedData`.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is empty, cut off, damaged or another, or a setting is out of its range.

    Source: T. F. Brooks, D. S. Pope and M. A. Marcolini, "Airfoil self-noise and prediction", NASA
    RP-1218 (1989); UCI Machine Learning Repository, data set 291.
    """

    LEVELS = level_names("high")
    SHIFTS = (*LEVELS, "noise")
    TUNING_SHIFTS = ("missing", "gain")
    sample_settings = ("root", "column", "held")

    def __init__(
        self,
        root: str | Path = "data/airfoil_self_noise",
        *,
        column: Column = "thickness",
        held: float = 0.3,
        noise: float = 0.2,
        **kwargs: Any,
    ) -> None:
        self.root = root
        self.column: Column = column
        self.held = held
        self.noise = noise
        super().__init__(**kwargs)

    def check(self) -> None:
        """Refuse settings out of their range, before the file is read."""
        super().check()
        check_choice("column", self.column, get_args(Column))
        check_share("held", self.held)
        check_deviation("noise", self.noise, "standard deviations")

    def prepare_data(self) -> None:
        """Make sure that the file is there and whole: nothing is downloaded."""
        read(Path(self.root) / FILE)

    def strength(self) -> tuple[object, ...]:
        """Return the deviation of the noise."""
        return (self.noise,)

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
    """Read the measurements, ``(1503, 6)``, float64: the five features and the sound level.

    Args:
        file: ``airfoil_self_noise.dat``, as UCI publishes it.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is empty, cut off, damaged or another file.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected {file.resolve()}, got no such file. Get 'Airfoil Self-Noise' of the UCI "
            f"Machine Learning Repository, and place {FILE} there, or set root to its folder."
        )
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    rows = [_row(file, number, line) for number, line in enumerate(lines, 1)]
    if len(rows) != _ROWS:
        raise ValueError(
            f"Expected {_ROWS} measurements in {file}, got {len(rows)}. It is empty, cut off or "
            "another file: put the published one in its place."
        )
    return torch.tensor(rows, dtype=torch.float64)


def _row(file: Path, number: int, line: str) -> list[float]:
    """Return the numbers of a line; refuse others than six, each in its published range."""
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        values = []
    pairs = zip(values, _RANGES.values(), strict=False)
    fits = [low <= value <= high for value, (low, high) in pairs]
    if len(values) != len(_RANGES) or not all(fits):
        ranges = ", ".join(f"{name} {low} to {high}" for name, (low, high) in _RANGES.items())
        raise ValueError(
            f"Expected six numbers ({ranges}) in line {number} of {file}, got {line[:80]!r}. It is "
            "damaged or another file: put the published one in its place."
        )
    return values
