"""The base of all data modules here: their settings, what follows a change of them, loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, cast, get_args

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from it3_lightning.data.contract import ShiftedData
from it3_lightning.data.loading import loader
from it3_lightning.data.sampling import seeded
from it3_lightning.data.settings import Split, Stream, check_choice, check_integer, check_names
from it3_lightning.data.splits import S


class HeldOutData(ShiftedData, ABC, Generic[S]):
    """Samples for training, and held-out ones clean and under shifts for testing.

    ``test_dataloader`` and ``predict_dataloader`` return a list of loaders, in the order of
    ``test_names``: clean first, then one for each shift. All settings are attributes that may be
    changed between runs; the next ``setup`` (every loader calls it) follows them, and does again
    only what they touch. The same seed gives bitwise the same samples, with any number of workers.

    A subclass sets what settings it has of its own, then calls this constructor, which checks them
    all. It defines the hooks below.

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
        self._splits: dict[str, S] = {}
        self._shifted: dict[str, S] = {}
        self._splits_key = self._shifted_key = ""
        self.check()

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return self.SHIFTS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return self.TUNING_SHIFTS

    # Hooks of a subclass

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

    def source(self) -> tuple[object, ...]:
        """Return the settings of its own that the samples depend on."""
        return ()

    def strength(self) -> tuple[object, ...]:
        """Return the settings of its own that the shifts depend on, and the samples do not."""
        return ()

    def training(self, samples: S) -> Dataset[Any]:
        """Return the samples as they are trained on."""
        return self.dataset(samples)

    def dataset(self, samples: S) -> Dataset[Any]:
        """Return the samples as a network sees them, a whole batch at a time."""
        return cast(Dataset[Any], samples)

    @abstractmethod
    def check_shift(self, name: str) -> None:
        """Refuse a shift that is unknown, or cannot be tested on with these settings."""

    @abstractmethod
    def split(self) -> dict[str, S]:
        """Return the samples by what they are for: ``"train"``, ``"validation"``, ``"test"``."""

    @abstractmethod
    def shifted(self, name: str) -> S:
        """Return what one of the ``test_names`` after the first stands for."""

    @abstractmethod
    def frequent(self, samples: S) -> Tensor:
        """Return which samples, in which order, make a stream of unequal frequencies."""

    # What Lightning calls

    def setup(self, stage: str) -> None:
        """Load and split the samples, and shift them for the stages ``test`` and ``predict``."""
        self.check()
        sizes = self.seed, self.val_size, self.train_size, self.test_size
        key = repr((*sizes, *self.source()))
        if self._splits_key != key:
            self._splits, self._splits_key = self.split(), key
        if stage in ("test", "predict"):
            self._shift()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, in an order that is new in every epoch."""
        self.setup("fit")
        return self._loader(self.training(self._splits["train"]), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the clean validation samples."""
        self.setup("validate")
        return self._loader(self.dataset(self._splits["validation"]), self.eval_batch_size)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each of ``test_names``."""
        self.setup("test")
        sets = [self._splits[self.evaluate_on], *map(self._shifted.__getitem__, self._changed)]
        if self.stream == "unequal":
            sets = [samples.select(self.frequent(samples)) for samples in sets]
        return [self._loader(self.dataset(samples), self.eval_batch_size) for samples in sets]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return the loaders of :meth:`test_dataloader`."""
        return self.test_dataloader()

    # How it works

    @property
    def _changed(self) -> list[str]:
        return self.test_names[1:]

    def _shift(self) -> None:
        """Compute the shifts that are missing; those of other settings make room."""
        key = repr((self._splits_key, self.evaluate_on, *self.strength()))
        if self._shifted_key != key:
            self._shifted, self._shifted_key = {}, key
        for name in self._changed:
            if name not in self._shifted:
                self._shifted[name] = self.shifted(name)

    def _loader(
        self,
        source: Dataset[Any],
        size: int,
        *,
        shuffle: bool = False,
        sampler: Sampler[int] | None = None,
    ) -> DataLoader[Any]:
        """Return a loader whose order depends on the seed and the epoch it is built in."""
        return loader(
            source,
            size,
            generator=seeded(self.seed, "loader", self._epoch),
            shuffle=shuffle,
            sampler=sampler,
            num_workers=self.num_workers,
        )

    @property
    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0
