"""What every data module can be told, and the refusal of what it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, get_args

from it3_lightning.data.checks import check_choice, check_integer, check_names
from it3_lightning.data.contract import ShiftedData, Split, Stream


class DataSettings(ShiftedData, ABC):
    """Settings of all data modules here, attributes that may be changed.

    A subclass sets what settings it has of its own, then calls this constructor, which checks them
    all.

    Args:
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a validation, test or prediction batch.
        shifts: Names of shifts to test on; may be empty. None for those that results are reported
            on.
        stream: ``"equal"`` keeps the samples and their order; ``"unequal"`` makes some classes, or
            some tenths of the values, ten times as frequent, see
            :func:`~it3_lightning.data.unequal_stream`.
        evaluate_on: ``"validation"`` has the test loaders hold the validation samples, for
            choosing settings without a look at the test samples.
        val_size: Samples to validate on; None for a tenth of those to train on, or for all that
            the data sets apart for it.
        train_size: Samples to train on, a seeded subset; None for all that are left.
        test_size: Samples to test on, a seeded subset; None for all.
        seed: Seed of the split, the subsets, the shifts, the stream and the training order.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: A setting is out of its range, or the data has too few samples for it.
    """

    SHIFTS: ClassVar[tuple[str, ...]]
    TUNING_SHIFTS: ClassVar[tuple[str, ...]]
    needed_sizes: ClassVar[tuple[str, ...]] = ()
    """Which of ``val_size``, ``train_size`` and ``test_size`` must not be None."""

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        shifts: Sequence[str] | None = None,
        stream: Stream = "equal",
        evaluate_on: Split = "test",
        val_size: int | None = None,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.shifts: Sequence[str] = self.reporting_shifts if shifts is None else shifts
        self.stream: Stream = stream
        self.evaluate_on: Split = evaluate_on
        self.val_size = val_size
        self.train_size = train_size
        self.test_size = test_size
        self.seed = seed
        self.num_workers = num_workers
        self.check()

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return self.SHIFTS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return self.TUNING_SHIFTS

    def check(self) -> None:
        """Refuse settings out of their range, before any work; a subclass adds its own."""
        for name in ("batch_size", "eval_batch_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("val_size", "train_size", "test_size"):
            check_integer(name, getattr(self, name), 1, optional=name not in self.needed_sizes)
        for name in ("num_workers", "seed"):
            check_integer(name, getattr(self, name), 0)
        check_choice("stream", self.stream, get_args(Stream))
        check_choice("evaluate_on", self.evaluate_on, get_args(Split))
        check_names(self.shifts, self.reporting_shifts[0])
        for name in self.shifts:
            self.check_shift(name)

    @abstractmethod
    def check_shift(self, name: str) -> None:
        """Refuse a shift that is unknown, or cannot be tested on with these settings."""
