"""Turns a table into features: standardised numbers, one-hot categories, nothing missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from it3_lightning.data.tabular.table import MISSING, Schema, Table


@dataclass(frozen=True)
class Preprocessing:
    r"""What the training rows tell of the columns, and the features made with it.

    A number becomes :math:`(x - \mu) / \sigma` with mean and standard deviation (of the population)
    of the training rows in which it is present; a constant column is only centred. A missing number
    takes the training median, a missing category the most frequent one, the first in the schema
    where several are. Categories are one-hot; one that no training row has, or that the schema does
    not know, is all zeros, so it meets no weight that was never trained.

    Features ``(N, F)``: the numbers in the schema's order, then a block for each category.

    Args:
        schema: of the tables.
        mean: ``(n,)`` float64.
        std: ``(n,)`` float64, positive.
        median: ``(n,)`` float64.
        mode: ``(k,)`` int64, the code that stands for a missing one.
        seen: ``(F - n,)`` booleans: which categories occur among the training rows.

    Example:
        >>> rows = torch.tensor([[1.0], [3.0], [float("nan")]], dtype=torch.float64)
        >>> schema = Schema(("age",), {}, None)
        >>> table = Table(schema, rows, torch.empty(3, 0).long(), torch.zeros(3, 1))
        >>> Preprocessing.fit(table)(table).flatten()  # mean and median are 2, the deviation is 1
        tensor([-1.,  1.,  0.])
    """

    schema: Schema
    mean: Tensor
    std: Tensor
    median: Tensor
    mode: Tensor
    seen: Tensor

    @classmethod
    def fit(cls, table: Table) -> Preprocessing:
        """Measure the training rows.

        Raises:
            ValueError: a column has no value in any of them.
        """
        numbers = table.numeric.numpy()
        names = [*table.schema.numeric, *table.schema.categorical]
        absent = [*np.isnan(numbers).all(axis=0), *(table.codes < 0).all(dim=0).tolist()]
        empty = [name for name, none in zip(names, absent, strict=True) if none]
        if empty:
            raise ValueError(
                f"Expected at least one value of every column among the {len(table)} training "
                f"rows, got none of {', '.join(map(repr, empty))}. Leave such columns out with "
                "exclude=[...], or train on more rows."
            )
        constant = np.nanmax(numbers, axis=0) == np.nanmin(numbers, axis=0)
        std = np.where(constant, 1.0, np.nanstd(numbers, axis=0))  # which rounding may make 1e-17
        counts = [
            torch.bincount(column[column >= 0], minlength=len(categories))
            for column, categories in zip(
                table.codes.unbind(1), table.schema.categorical.values(), strict=True
            )
        ]
        return cls(
            table.schema,
            mean=torch.from_numpy(np.nanmean(numbers, axis=0)),
            std=torch.from_numpy(std),
            median=torch.from_numpy(np.nanmedian(numbers, axis=0)),
            mode=torch.tensor([int(count.argmax()) for count in counts], dtype=torch.int64),
            seen=torch.cat([torch.empty(0, dtype=torch.bool), *(count > 0 for count in counts)]),
        )

    def __call__(self, table: Table) -> Tensor:
        """Return the features of a table, float32 ``(N, F)``."""
        present = torch.where(table.numeric.isnan(), self.median, table.numeric)
        codes = torch.where(table.codes == MISSING, self.mode, table.codes)
        blocks = [
            column[:, None] == torch.arange(len(categories))
            for column, categories in zip(
                codes.unbind(1), self.schema.categorical.values(), strict=True
            )
        ]
        one_hot = torch.cat([torch.empty(len(table), 0, dtype=torch.bool), *blocks], dim=1)
        return torch.cat([(present - self.mean) / self.std, one_hot & self.seen], dim=1).float()

    @property
    def layout(self) -> Layout:
        """Which features belong together, and what stands for a missing one."""
        widths = [1] * len(self.schema.numeric) + [*map(len, self.schema.categorical.values())]
        variable = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths).long())
        nothing = Table(
            self.schema,
            numeric=torch.full((1, len(self.schema.numeric)), float("nan"), dtype=torch.float64),
            codes=torch.full((1, len(self.schema.categorical)), MISSING),
            target=torch.zeros(1, 1),
        )
        return Layout(variable, variable < len(self.schema.numeric), missing=self(nothing)[0])


@dataclass(frozen=True)
class Layout:
    """How features make up the variables of a table.

    Args:
        variable: ``(F,)`` int64: number of the variable that each feature belongs to, from 0 up.
        numeric: ``(F,)`` booleans: which features are numbers, the others being of categories.
        missing: ``(F,)``: the features of a row in which everything is missing.
    """

    variable: Tensor
    numeric: Tensor
    missing: Tensor

    @property
    def variables(self) -> int:
        """Number of variables ``V``: columns of the table, before categories became features."""
        return 1 + int(self.variable.max())
