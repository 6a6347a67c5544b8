"""A data module of values: trained inside a range, tested inside it and at levels outside it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Generator, Tensor
from torch.utils.data import Dataset

from it3_lightning.data.airfoils.samples import Pool, Samples, deciles
from it3_lightning.data.held_out import HeldOutData
from it3_lightning.data.sampling import seeded, unequal_stream
from it3_lightning.data.splits import held_out
from it3_lightning.utils.messages import unknown


class RangedData(HeldOutData[Samples]):
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
        kwargs: Settings of :class:`~it3_lightning.data.held_out.HeldOutData`.

    Raises:
        ValueError: A setting is out of its range, or there are too few samples for it.
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
    def dataset(self, samples: Samples) -> Dataset[Any]:
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

    def split(self) -> dict[str, Samples]:
        """Return the samples to train, validate and test on, and those of each level."""
        pool = self.load()
        test, others = held_out(pool.inside, self.test_size, self.seed, "test_size")
        return {**self.parted(others, test), **pool.levels}

    def shifted(self, name: str) -> Samples:
        """Return the samples of a level, or those inside the range under a perturbation."""
        if name in self.LEVELS:
            return self._splits[name]
        samples = self._splits[self.evaluate_on]
        generator = seeded(self.seed, name, self.evaluate_on)
        return Samples(self.perturbed(samples.inputs, name, generator), samples.targets)

    def frequent(self, samples: Samples) -> Tensor:
        """Return an order of samples in which three deciles are ten times as frequent."""
        return unequal_stream(deciles(samples.targets[:, 0]), self.seed)
