"""Template method: values predicted inside a range of training and at levels outside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from it3_lightning.data.base import ShiftedData
from it3_lightning.data.sampling import Rows, held_out, seeded, unequal_stream
from it3_lightning.utils.messages import unknown

LEVELS = 5


@dataclass(frozen=True)
class Pool:
    """All samples."""

    inside: Rows
    levels: Mapping[str, Rows]

    @classmethod
    def of(cls, samples: Rows, levels: Mapping[str, Tensor]) -> Pool:
        """Return samples by where they lie: ``levels`` has the indices of those outside."""
        inside = torch.ones(len(samples), dtype=torch.bool)
        inside[torch.cat(list(levels.values()))] = False
        outside = {name: samples.select(indices) for name, indices in levels.items()}
        return cls(samples.select(inside.nonzero()[:, 0]), outside)


class RangedData(ShiftedData, ABC):
    """Samples with a real-valued target; what lies outside a range is held out, level by level.

    A subclass says in :meth:`load` where samples come from, in :meth:`perturbed` what perturbations
    do, and in :meth:`dataset` what a network sees. There are three kinds of test names: ``clean``,
    held-out samples inside the range; perturbations of the same samples; and levels, which are
    *other* samples, since a shape outside the range is another shape. Each batch is
    ``(inputs, targets)``, the targets ``(B, 1)``, float32. ``stream="unequal"`` makes three of the
    ten deciles of the target ten times as frequent as the others. The levels are kept for testing:
    with ``evaluate_on="validation"``, choose under the class's ``TUNING_SHIFTS``.

    Args:
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a validation, test or prediction batch.
        val_size: Samples inside the range taken for validation.
        test_size: Samples inside the range taken for testing.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedData`.
    """

    LEVELS: ClassVar[tuple[str, ...]]
    needed_sizes = ("val_size", "test_size")
    test_size: int

    def __init__(
        self,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 50,
        val_size: int = 100,
        test_size: int = 150,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            test_size=test_size,
            **kwargs,
        )

    # What a subclass defines

    @abstractmethod
    def load(self) -> Pool:
        """Return all samples."""

    @abstractmethod
    def perturbed(self, inputs: Tensor, name: str, generator: Generator) -> Tensor:
        """Return perturbed inputs; the targets stay."""

    @abstractmethod
    def dataset(self, samples: Rows) -> Dataset[Any]:
        """Return what a network sees, a dataset of whole batches (``__getitems__``)."""

    # What the base asks for

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read; a subclass adds its own."""
        super().check()
        if self.severity is not None:
            raise ValueError(
                f"Expected no severity, got {self.severity!r}: levels are shifts of their own, and "
                f"perturbations have one size. Name the levels: shifts={list(self.SHIFTS)}."
            )

    def check_shift(self, name: str) -> None:
        """Refuse an unknown shift, and a level of the validation samples."""
        known = (*self.SHIFTS, *self.TUNING_SHIFTS)
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
        return {**self.parted(others, test), **pool.levels}

    def shifted(self, name: str) -> Rows:
        """Return the samples of a level, or those inside the range under a perturbation."""
        if name in self.LEVELS:
            level: Rows = self._splits[name]
            return level
        samples = self._splits[self.evaluate_on]
        generator = seeded(self.seed, name, self.evaluate_on)
        return Rows(self.perturbed(samples.inputs, name, generator), samples.targets)

    def frequent(self, samples: Rows) -> Tensor:
        """Return an order of samples in which three deciles are ten times as frequent."""
        return unequal_stream(deciles(samples.targets[:, 0]), self.seed)


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
