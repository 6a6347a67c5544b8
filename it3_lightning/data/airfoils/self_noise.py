"""NASA's airfoil self-noise: sound levels of wing sections in a wind tunnel, from the UCI file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from it3_lightning.data.airfoils.levels import level_names, levels
from it3_lightning.data.airfoils.ranged import RangedData
from it3_lightning.data.airfoils.samples import Pool, Rows, Samples
from it3_lightning.data.airfoils.self_noise_file import FILE, Column, read
from it3_lightning.data.checks import check_choice, check_deviation, check_share

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
        kwargs: Settings of :class:`~it3_lightning.data.airfoils.ranged.RangedData`.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is empty, cut off, damaged or another, or a setting is out of its range.

    Source: T. F. Brooks, D. S. Pope and M. A. Marcolini, "Airfoil self-noise and prediction", NASA
    RP-1218 (1989); UCI Machine Learning Repository, data set 291.
    """

    LEVELS = level_names("high")
    SHIFTS = (*LEVELS, "noise")
    TUNING_SHIFTS = ("missing", "gain")

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

    def source(self) -> tuple[object, ...]:
        """Return the settings that :meth:`load` depends on."""
        return self.root, self.column, self.held

    def strength(self) -> tuple[object, ...]:
        """Return the deviation of the noise."""
        return (self.noise,)

    def load(self) -> Pool:
        """Return the measurements below the range that is held out, and those in it by level."""
        rows = read(Path(self.root) / FILE)
        samples = Samples(rows[:, :5], rows[:, 5:])
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

    def dataset(self, samples: Samples) -> Dataset[Any]:
        """Return the features on the scale of the training set."""
        mean, std = self._scale()
        return Rows(Samples((samples.inputs - mean) / std, samples.targets))

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the training features, 1 for a constant one."""
        inputs = self._splits["train"].inputs
        std = inputs.std(dim=0, correction=0)
        return inputs.mean(dim=0), torch.where(std > 0, std, 1.0)
