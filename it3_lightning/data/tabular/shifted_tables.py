"""A LightningDataModule that tests on the clean rows of a table and on every shift of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch.utils.data import DataLoader

from it3_lightning.data.contract import ShiftedData
from it3_lightning.data.images import Batch
from it3_lightning.data.loading import loader
from it3_lightning.data.sampling import seeded
from it3_lightning.data.settings import (
    Split,
    Stream,
    check_choices,
    check_integer,
    check_share,
    check_shifts,
)
from it3_lightning.data.tabular.preprocessing import Layout, Preprocessing
from it3_lightning.data.tabular.row_set import RowSet
from it3_lightning.data.tabular.shifts import TABULAR_SHIFTS, TABULAR_TUNING_SHIFTS, TabularShift
from it3_lightning.data.tabular.splitting import split, unequal_rows
from it3_lightning.data.tabular.table import Schema, Table

_SIZES = ("test_share", "val_size", "train_size", "test_size", "seed")


class ShiftedTables(ShiftedData):
    """Rows for training, and the same held-out rows clean and under shifts for testing.

    A subclass says in :meth:`load` where its rows come from. ``test_dataloader`` and
    ``predict_dataloader`` return a list of loaders, in the order of ``test_names``: clean first,
    then one for each shift. Each batch is ``(features, target)``: float32 ``(B, F)``, as
    :class:`~it3_lightning.data.tabular.Preprocessing` makes them of the training rows alone, and
    int64 ``(B,)`` classes or float32 ``(B, 1)`` values in their own units. All settings are
    attributes that may be changed between runs; the next ``setup`` (every loader calls it) follows
    them, and does again only what they touch. The same seed gives bitwise the same features.

    Args:
        batch_size: rows in a training batch.
        eval_batch_size: rows in a validation, test or prediction batch.
        shifts: names of shifts (see ``TABULAR_SHIFTS`` and ``TABULAR_TUNING_SHIFTS``); may be
            empty.
        severity: 1 (weak) to 5 (strong).
        stream: ``"equal"`` keeps the rows and their order; ``"unequal"`` makes some classes, or
            some tenths of the values, ten times as frequent: see
            :func:`~it3_lightning.data.tabular.splitting.unequal_rows`.
        evaluate_on: ``"validation"`` has the test loaders hold the validation rows, for choosing
            settings without a look at the test rows.
        test_share: share of the rows held out for testing, where no test file has them.
        val_size: rows taken from the training rows for validation; ``None`` for a tenth.
        train_size: rows to train on, a seeded subset; ``None`` for all that validation leaves.
        test_size: rows to test on, a seeded subset; ``None`` for all.
        seed: of the split, the subsets, the shifts, the stream and the training order.
        num_workers: worker processes of each loader.

    Raises:
        ValueError: a setting is out of its range, or the data has too few rows for it.
    """

    source: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that say where the rows come from."""

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        shifts: Sequence[str] = TABULAR_SHIFTS,
        severity: int = 3,
        stream: Stream = "equal",
        evaluate_on: Split = "test",
        test_share: float = 0.2,
        val_size: int | None = None,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.shifts = shifts
        self.severity = severity
        self.stream: Stream = stream
        self.evaluate_on: Split = evaluate_on
        self.test_share = test_share
        self.val_size = val_size
        self.train_size = train_size
        self.test_size = test_size
        self.seed = seed
        self.num_workers = num_workers
        self._splits: dict[str, RowSet] = {}
        self._splits_key: tuple[str, ...] = ()
        self._shifted: dict[str, RowSet] = {}
        self._shifted_key: tuple[object, ...] = ()
        self._schema: Schema
        self._layout: Layout
        self._check()

    def load(self) -> tuple[Table, Table | None]:
        """Return the rows to train on and those to test on; ``None``: a share is held out."""
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define load(self) -> tuple[Table, Table | None]. "
            "Return the training rows and the test rows."
        )

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return TABULAR_SHIFTS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return TABULAR_TUNING_SHIFTS

    @property
    def num_features(self) -> int:
        """Number of features ``F``; it depends on the columns and categories, not on the rows."""
        self.setup("fit")
        return self._schema.num_features

    @property
    def num_outputs(self) -> int:
        """Number of outputs that a network needs: the classes, or 1 for a value."""
        self.setup("fit")
        return self._schema.num_outputs

    @property
    def num_classes(self) -> int | None:
        """Number of classes; ``None`` where the target is a value."""
        self.setup("fit")
        return None if self._schema.classes is None else len(self._schema.classes)

    def setup(self, stage: str) -> None:
        """Load, split and prepare the rows, and shift them for the stages ``test``, ``predict``."""
        self._check()
        self._split()
        if stage in ("test", "predict"):
            self._shift()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training rows, in an order that is new in every epoch."""
        self.setup("fit")
        return self._loader(self._splits["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the clean validation rows."""
        self.setup("validate")
        return self._loader(self._splits["validation"], self.eval_batch_size)

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Return one loader for each of ``test_names``, all of the same rows."""
        self.setup("test")
        clean = self._splits[self.evaluate_on]
        sets = [clean, *(self._shifted[name] for name in self.shifts)]
        if self.stream == "unequal":
            order = unequal_rows(clean.target, self.seed)
            sets = [rows.select(order) for rows in sets]
        return [self._loader(rows, self.eval_batch_size) for rows in sets]

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """Return the loaders of :meth:`test_dataloader`."""
        return self.test_dataloader()

    def _loader(self, rows: RowSet, size: int, shuffle: bool = False) -> DataLoader[Batch]:
        """Return a loader whose order depends on the seed and the epoch it is built in."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        generator = seeded(self.seed, "loader", epoch)
        return loader(
            rows, size, generator=generator, shuffle=shuffle, num_workers=self.num_workers
        )

    def _split(self) -> None:
        """Load the rows, split and prepare them, unless this has been done for these settings."""
        sizes = {name: getattr(self, name) for name in _SIZES}
        key = (repr(sizes), *(repr(getattr(self, name)) for name in self.source))
        if self._splits_key == key:
            return
        tables = split(*self.load(), **sizes)
        preprocessing = Preprocessing.fit(tables["train"])
        self._schema, self._layout = preprocessing.schema, preprocessing.layout
        self._splits = {k: RowSet(preprocessing(t), t.target) for k, t in tables.items()}
        self._splits_key = key

    def _shift(self) -> None:
        """Compute the shifts that are missing; those of other settings make room."""
        key = (*self._splits_key, self.evaluate_on, self.severity)
        if self._shifted_key != key:
            self._shifted, self._shifted_key = {}, key
        clean = self._splits[self.evaluate_on]
        for name in self.shifts:
            if name not in self._shifted:
                shift = TabularShift(name, self.severity)
                generator = seeded(self.seed, name, self.severity)
                features = shift(clean.features, self._layout, generator)
                self._shifted[name] = RowSet(features, clean.target)

    def _check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        for name in ("batch_size", "eval_batch_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("val_size", "train_size", "test_size"):
            check_integer(name, getattr(self, name), 1, optional=True)
        for name in ("num_workers", "seed"):
            check_integer(name, getattr(self, name), 0)
        check_share("test_share", self.test_share)
        check_choices(self.stream, self.evaluate_on)
        check_shifts(self.shifts, self.severity, TabularShift, example="zeroed")
