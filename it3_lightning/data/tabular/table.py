"""A table in memory: numbers, categories as codes, a target, and the schema they follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

MISSING = -1
"""Code of a category that is missing."""
UNKNOWN = -2
"""Code of a category that the schema does not have."""


@dataclass(frozen=True)
class Schema:
    """Which columns a table has; it fixes the number of features, whatever rows are drawn.

    Args:
        numeric: names of the numeric columns.
        categorical: categories of each categorical column by its name, in the order of the codes.
        classes: names of the classes; ``None`` where the target is a value.

    >>> Schema(("age",), {"colour": ("blue", "red")}, None).num_features
    3
    """

    numeric: tuple[str, ...]
    categorical: Mapping[str, tuple[str, ...]]
    classes: tuple[str, ...] | None

    @property
    def num_features(self) -> int:
        """Number of features ``F``: one for each number and one for each category."""
        return len(self.numeric) + sum(map(len, self.categorical.values()))

    @property
    def num_outputs(self) -> int:
        """Number of outputs a network needs: one for each class, or 1 for a value."""
        return 1 if self.classes is None else len(self.classes)


@dataclass(frozen=True)
class Table:
    """Rows as three tensors.

    Args:
        schema: which columns there are.
        numeric: ``(N, n)`` float64; NaN where a number is missing.
        codes: ``(N, k)`` int64, positions in the schema's categories, ``MISSING`` or ``UNKNOWN``.
        target: ``(N,)`` int64 classes, or ``(N, 1)`` float32 values.
    """

    schema: Schema
    numeric: Tensor
    codes: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def select(self, indices: Tensor) -> Table:
        """Return the rows at ``indices`` ``(M,)``, in their order."""
        rows = (part[indices] for part in (self.numeric, self.codes, self.target))
        return Table(self.schema, *rows)
