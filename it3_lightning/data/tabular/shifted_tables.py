"""A LightningDataModule that tests on the clean rows of a table and on every shift of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from it3_lightning.data.checks import check_share
from it3_lightning.data.graded import GradedData
from it3_lightning.data.sampling import seeded
from it3_lightning.data.splits import held_out
from it3_lightning.data.tabular.frequencies import unequal_rows
from it3_lightning.data.tabular.preprocessing import Layout, Preprocessing
from it3_lightning.data.tabular.row_set import RowSet
from it3_lightning.data.tabular.shifts import TABULAR_SHIFTS, TABULAR_TUNING_SHIFTS, TabularShift
from it3_lightning.data.tabular.table import Schema, Table
from it3_lightning.utils.messages import undefined


class ShiftedTables(GradedData[RowSet]):
    """Rows for training, and the same held-out rows clean and under shifts for testing.

    A subclass says in :meth:`load` where its rows come from, and in ``source`` what that depends
    on. Each batch is ``(features, target)``: float32 ``(B, F)``, as
    :class:`~it3_lightning.data.tabular.Preprocessing` makes them of the training rows alone, and
    int64 ``(B,)`` classes or float32 ``(B, 1)`` values in their own units. The shifts are
    ``TABULAR_SHIFTS``, and ``TABULAR_TUNING_SHIFTS`` for choosing settings; ``stream="unequal"``
    makes some classes, or some tenths of the values, ten times as frequent: see
    :func:`~it3_lightning.data.tabular.frequencies.unequal_rows`.

    Args:
        test_share: share of the rows held out for testing, where no test file has them.
        kwargs: settings of :class:`~it3_lightning.data.graded.GradedData`.

    Raises:
        ValueError: a setting is out of its range, or the data has too few rows for it.
    """

    SHIFTS = TABULAR_SHIFTS
    TUNING_SHIFTS = TABULAR_TUNING_SHIFTS

    _schema: Schema
    _layout: Layout

    def __init__(self, *, test_share: float = 0.2, **kwargs: Any) -> None:
        self.test_share = test_share
        super().__init__(**kwargs)

    def load(self) -> tuple[Table, Table | None]:
        """Return the rows to train on and those to test on; ``None``: a share is held out."""
        raise undefined(
            self,
            "load(self) -> tuple[Table, Table | None]",
            "Return the training rows and the test rows.",
        )

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

    # What the base asks for

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        super().check()
        check_share("test_share", self.test_share)

    def change(self, name: str, severity: int) -> TabularShift:
        """Return the shift of a name."""
        return TabularShift(name, severity)

    def source(self) -> tuple[object, ...]:
        """Return the settings that the rows depend on; a subclass adds its own."""
        return (self.test_share,)

    def split(self) -> dict[str, RowSet]:
        """Return the rows to train, validate and test on, as features."""
        train, test = self.load()
        if test is None:
            size = max(1, round(self.test_share * len(train)))
            test, train = held_out(train, size, self.seed, "test rows")
        tables = self.parted(train, test)
        preprocessing = Preprocessing.fit(tables["train"])
        self._schema, self._layout = preprocessing.schema, preprocessing.layout
        return {part: RowSet(preprocessing(table), table.target) for part, table in tables.items()}

    def shifted(self, name: str) -> RowSet:
        """Return the held-out rows under a shift."""
        kind, severity = self._wanted()[name]
        clean, generator = self._splits[self.evaluate_on], seeded(self.seed, kind, severity)
        features = self.change(kind, severity)(clean.features, self._layout, generator)
        return RowSet(features, clean.target)

    def frequent(self, samples: RowSet) -> Tensor:
        """Return an order of rows in which some classes or values are ten times as frequent."""
        return unequal_rows(samples.target, self.seed)
