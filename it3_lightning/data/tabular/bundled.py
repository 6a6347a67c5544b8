"""The small tables that scikit-learn ships: data that needs no download."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch

from it3_lightning.data.tabular.reading import needed
from it3_lightning.data.tabular.shifted_tables import ShiftedTables
from it3_lightning.data.tabular.table import Schema, Table
from it3_lightning.messages import unknown

Bundled = Literal["iris", "wine", "breast_cancer", "diabetes", "digits"]


class BundledDataModule(ShiftedTables):
    """A table of scikit-learn: all columns numeric, nothing missing, the test rows held out.

    | name | rows | features | target |
    |---|---|---|---|
    | ``iris`` | 150 | 4 | 3 classes |
    | ``wine`` | 178 | 13 | 3 classes |
    | ``breast_cancer`` | 569 | 30 | 2 classes |
    | ``diabetes`` | 442 | 10 | value, 25 to 346 |
    | ``digits`` | 1,797 | 64 | 10 classes |

    Args:
        name: of the table.
        kwargs: settings of :class:`~it3_lightning.data.tabular.ShiftedTables`.

    Raises:
        ImportError: scikit-learn is not installed (when the data is loaded).
        ValueError: the name is unknown, or a setting is out of its range.

    Example:
        >>> features, labels = next(iter(BundledDataModule("wine").test_dataloader()[0]))
        >>> features.shape, labels.bincount()
        (torch.Size([36, 13]), tensor([10, 19,  7]))
    """

    source: ClassVar[tuple[str, ...]] = ("name",)

    def __init__(self, name: Bundled = "breast_cancer", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if name not in get_args(Bundled):
            raise ValueError(unknown("table", name, get_args(Bundled)))
        self.name: Bundled = name

    def load(self) -> tuple[Table, None]:
        """Return all rows."""
        raw = {"scaled": False} if self.name == "diabetes" else {}  # else scaled by all its rows
        bunch = getattr(needed("sklearn.datasets"), f"load_{self.name}")(**raw)
        classes = tuple(map(str, bunch.target_names)) if self.name != "diabetes" else None
        target = torch.from_numpy(bunch.target)
        schema = Schema(tuple(map(str, bunch.feature_names)), {}, classes)
        table = Table(
            schema,
            torch.from_numpy(bunch.data).double(),
            torch.empty(len(target), 0, dtype=torch.int64),
            target.float()[:, None] if classes is None else target.long(),
        )
        return table, None
