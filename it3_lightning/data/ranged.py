"""A data module of values: trained inside a range, tested inside it and at levels outside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from it3_lightning.data.contract import ShiftedData
from it3_lightning.data.loading import loader
from it3_lightning.data.samples import Pool, Samples, deciles
from it3_lightning.data.sampling import seeded, subset, unequal_stream
from it3_lightning.data.settings import Split, Stream, check_choices, check_integer
from it3_lightning.messages import unknown


class RangedData(ShiftedData):
    """Samples with a real-valued target; what lies outside a range is held out, level by level.

    A subclass says in :meth:`load` where samples come from, in :meth:`perturbed` what perturbations
    do, and in :meth:`dataset` what a network sees. There are three kinds of test names: ``clean``,
    held-out samples inside the range; perturbations of the same samples; and levels, which are
    *other* samples, since a shape outside the range is another shape. Each batch is
    ``(inputs, targets)``, the targets ``(B, 1)``, float32. All settings are attributes that may be
    changed between runs; the next ``setup`` (every loader calls it) follows them.

    Args:
        shifts: Names among the class's ``SHIFTS`` and ``TUNING_SHIFTS``; may be empty.
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a validation, test or prediction batch.
        stream: ``"equal"``: the samples as they are; ``"unequal"``: three of the ten deciles of the
            target are ten times as frequent as the others, see
            :func:`~it3_lightning.data.unequal_stream`.
        evaluate_on: ``"validation"`` has the test loaders hold the validation samples, for choosing
            settings; the levels are kept for testing, so choose under ``TUNING_SHIFTS``.
        val_size: Samples inside the range taken for validation.
        test_size: Samples inside the range taken for testing.
        train_size: Samples to train on, a seeded subset; None for all that are left.
        seed: Seed of the split, the subset, the perturbations, the stream and the training order.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: A setting is out of its range, or there are too few samples for it.
    """

    LEVELS: ClassVar[tuple[str, ...]]
    SHIFTS: ClassVar[tuple[str, ...]]
    TUNING_SHIFTS: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        *,
        shifts: Sequence[str],
        batch_size: int = 32,
        eval_batch_size: int = 50,
        stream: Stream = "equal",
        evaluate_on: Split = "test",
        val_size: int = 100,
        test_size: int = 150,
        train_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.shifts = shifts
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.stream: Stream = stream
        self.evaluate_on: Split = evaluate_on
        self.val_size = val_size
        self.test_size = test_size
        self.train_size = train_size
        self.seed = seed
        self.num_workers = num_workers
        self._splits: dict[str, Samples] = {}
        self._splits_key: tuple[object, ...] = ()

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return self.SHIFTS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return self.TUNING_SHIFTS

    # What a subclass defines

    @property
    @abstractmethod
    def pool_key(self) -> tuple[object, ...]:
        """The settings that :meth:`load` depends on."""

    @abstractmethod
    def load(self) -> Pool:
        """Return all samples."""

    @abstractmethod
    def perturbed(self, inputs: Tensor, name: str, generator: Generator) -> Tensor:
        """Return perturbed inputs; the targets stay."""

    @abstractmethod
    def dataset(self, samples: Samples) -> Dataset[Any]:
        """Return what a network sees, a dataset of whole batches (``__getitems__``)."""

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read; a subclass adds its own."""
        for name in ("batch_size", "eval_batch_size", "val_size", "test_size"):
            check_integer(name, getattr(self, name), 1)
        check_integer("train_size", self.train_size, 1, optional=True)
        for name in ("num_workers", "seed"):
            check_integer(name, getattr(self, name), 0)
        check_choices(self.stream, self.evaluate_on)
        self._check_shifts()

    # What Lightning calls

    def setup(self, stage: str) -> None:
        """Load and split the samples, unless this has been done for these settings."""
        self.check()
        key = (*self.pool_key, self.seed, self.val_size, self.test_size, self.train_size)
        if self._splits_key != key:
            self._splits, self._splits_key = self._split(self.load()), key

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, in an order that is new in every epoch."""
        self.setup("fit")
        return self._loader(self._splits["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the clean validation samples."""
        self.setup("validate")
        return self._loader(self._splits["validation"], self.eval_batch_size)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each of ``test_names``."""
        self.setup("test")
        return [self._loader(self._tested(name), self.eval_batch_size) for name in self.test_names]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return the loaders of :meth:`test_dataloader`."""
        return self.test_dataloader()

    # How it works

    def _check_shifts(self) -> None:
        """Refuse unknown and repeated shifts, and levels on the validation samples."""
        known = (*self.SHIFTS, *self.TUNING_SHIFTS)
        if isinstance(self.shifts, str) or len(set(self.shifts)) != len(self.shifts):
            raise ValueError(
                f"Expected shifts to be a list of different names, got {self.shifts!r}. "
                f"Write for example shifts={[self.SHIFTS[0]]}."
            )
        for name in self.shifts:
            if name not in known:
                raise ValueError(unknown("shift", name, known))
            if self.evaluate_on == "validation" and name in self.LEVELS:
                raise ValueError(
                    "Expected no levels among the shifts with evaluate_on='validation', got "
                    f"{name!r}. They are kept for testing: set shifts={list(self.TUNING_SHIFTS)}."
                )

    def _split(self, pool: Pool) -> dict[str, Samples]:
        """Return the samples to train, validate and test on, and those of each level."""
        test, others = subset(len(pool.inside), self.test_size, self.seed, "test_size")
        taken, left = subset(len(others), self.val_size, self.seed, "val_size")
        size = max(len(left), 1) if self.train_size is None else self.train_size
        kept, _ = subset(len(left), size, self.seed, "train_size")
        inside = {"train": others[left[kept]], "validation": others[taken], "test": test}
        chosen = {name: pool.inside.select(indices) for name, indices in inside.items()}
        return {**chosen, **pool.levels}

    def _tested(self, name: str) -> Samples:
        """Return the samples of a test name, perturbed, in the order of the stream."""
        samples = self._splits[name if name in self.LEVELS else self.evaluate_on]
        if name != "clean" and name not in self.LEVELS:
            generator = seeded(self.seed, name, self.evaluate_on)
            samples = Samples(self.perturbed(samples.inputs, name, generator), samples.targets)
        if self.stream == "equal":
            return samples
        return samples.select(unequal_stream(deciles(samples.targets[:, 0]), self.seed))

    def _loader(self, samples: Samples, size: int, shuffle: bool = False) -> DataLoader[Any]:
        """Return a loader whose order depends on the seed and the epoch it is built in."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return loader(
            self.dataset(samples),
            size,
            generator=seeded(self.seed, "loader", epoch),
            shuffle=shuffle,
            num_workers=self.num_workers,
        )
