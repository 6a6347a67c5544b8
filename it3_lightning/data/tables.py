"""Pipeline of tables: rows become features of the training rows' scale, and features shift.

A shift function takes features ``(N, F)``, a ``level``, the layout of the features, a generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from it3_lightning.data.base import ShiftedData, check_share
from it3_lightning.data.sampling import Rows, held_out, seeded
from it3_lightning.data.shifts import KindOfShift, Kinds, Severity
from it3_lightning.utils.messages import undefined

MISSING, UNKNOWN = -1, -2  # codes of a category that is missing, or that the schema does not have
_TENTHS = torch.arange(1, 10, dtype=torch.float64) / 10


@dataclass(frozen=True)
class Schema:
    """Which columns a table has; it fixes the number of features, whatever rows are drawn.

    Args:
        numeric: Names of the numeric columns.
        categorical: Categories of each other column by its name, in the order of the codes.
        classes: Names of the classes; ``None`` where the target is a value.
    """

    numeric: tuple[str, ...]
    categorical: Mapping[str, tuple[str, ...]]
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class Table:
    """Rows as three tensors.

    Args:
        schema: Of their columns.
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
        parts = self.numeric, self.codes, self.target
        return Table(self.schema, *(part[indices] for part in parts))


@dataclass(frozen=True)
class Layout:
    """How features make up the variables of a table.

    Args:
        variable: ``(F,)`` int64: number of the variable that each feature belongs to, from 0 up.
        numeric: ``(F,)`` booleans: which features are numbers, not categories.
        missing: ``(F,)``: the features of a row in which everything is missing.
    """

    variable: Tensor
    numeric: Tensor
    missing: Tensor

    @property
    def variables(self) -> int:
        """Number of variables: columns of the table."""
        return 1 + int(self.variable.max())


@dataclass(frozen=True)
class Preprocessing:
    r"""What the training rows tell of the columns, and the features made with it.

    A number becomes :math:`(x - \mu) / \sigma` with mean and standard deviation (of the population)
    of the training rows in which it is present; a constant column is only centred. A missing number
    takes the training median, a missing category the most frequent one, the first in the schema
    where several are. Categories are one-hot; one that no training row has, or that the schema does
    not know, is all zeros, so it meets no weight that was never trained.

    Features ``(N, F)``: the numbers in the schema's order, then a block for each category.
    """

    schema: Schema
    mean: Tensor  # (n,) float64, as std, which is positive, and median
    std: Tensor
    median: Tensor
    mode: Tensor  # (k,) int64: the code that stands for a missing one
    seen: Tensor  # (F - n,): which categories occur among the training rows

    @classmethod
    def fit(cls, table: Table) -> Preprocessing:
        """Measure the training rows; ValueError where a column has no value in any of them."""
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
        counts = [block.sum(0) for block in _blocks(table.codes, table.schema)]
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
        blocks = [torch.empty(len(table), 0, dtype=torch.bool), *_blocks(codes, self.schema)]
        known = torch.cat(blocks, dim=1) & self.seen
        return torch.cat([(present - self.mean) / self.std, known], dim=1).float()

    @property
    def layout(self) -> Layout:
        """Which features belong together, and what stands for a missing one."""
        numbers, categories = len(self.schema.numeric), self.schema.categorical
        widths = torch.tensor([1] * numbers + [*map(len, categories.values())]).long()
        variable = torch.arange(len(widths)).repeat_interleave(widths)
        nothing = Table(
            self.schema,
            numeric=torch.full((1, numbers), float("nan"), dtype=torch.float64),
            codes=torch.full((1, len(categories)), MISSING),
            target=torch.zeros(1, 1),
        )
        return Layout(variable, variable < numbers, missing=self(nothing)[0])


def _blocks(codes: Tensor, schema: Schema) -> list[Tensor]:
    """Return codes ``(N, k)`` one-hot, ``(N, categories)`` each; MISSING and UNKNOWN are none."""
    pairs = zip(codes.unbind(1), schema.categorical.values(), strict=True)
    return [column[:, None] == torch.arange(len(categories)) for column, categories in pairs]


def zeroed(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Zero each cell with probability ``level``: a number becomes the mean, a category none."""
    cells = torch.rand(len(features), layout.variables, generator=generator) < level
    return torch.where(cells[:, layout.variable], 0.0, features)


def missing(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Impute a share ``level`` of the variables, at least one, in all rows."""
    count = max(1, round(level * layout.variables))
    gone = torch.randperm(layout.variables, generator=generator)[:count]
    return torch.where(torch.isin(layout.variable, gone), layout.missing, features)


def gaussian_noise(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Add normal noise of ``level`` standard deviations to the numbers."""
    return features + level * torch.randn(features.shape, generator=generator) * layout.numeric


def uniform_noise(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Add uniform noise of at most ``level`` standard deviations to the numbers."""
    noise = 2 * torch.rand(features.shape, generator=generator) - 1
    return features + level * noise * layout.numeric


def scaled(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Multiply each numeric column by a factor, log-uniform in ``1 / level`` to ``level``."""
    factors = level ** (2 * torch.rand(features.shape[1], generator=generator) - 1)
    return features * torch.where(layout.numeric, factors, 1.0)


def rounded(features: Tensor, level: float, layout: Layout, _: Generator) -> Tensor:
    """Round the numbers to multiples of ``level`` standard deviations from the mean."""
    return torch.where(layout.numeric, (features / level).round() * level, features)


def swapped(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Choose each cell with probability ``level``; the chosen ones of a column change places."""
    order = torch.arange(len(features))[:, None].repeat(1, layout.variables)
    chosen = torch.rand(order.shape, generator=generator) < level
    for rows, picked in zip(order.unbind(1), chosen.unbind(1), strict=True):
        some = picked.nonzero()[:, 0]
        rows[some] = some[torch.randperm(len(some), generator=generator)]
    return features.gather(0, order[:, layout.variable])


_EVALUATION: Kinds = {
    "zeroed": (zeroed, (0.05, 0.1, 0.2, 0.3, 0.4)),
    "missing": (missing, (0.05, 0.1, 0.2, 0.3, 0.4)),
    "gaussian_noise": (gaussian_noise, (0.1, 0.2, 0.4, 0.7, 1.0)),
}
_TUNING: Kinds = {
    "uniform_noise": (uniform_noise, (0.2, 0.4, 0.7, 1.2, 1.7)),
    "scaled": (scaled, (1.2, 1.5, 2.0, 3.0, 4.0)),
    "rounded": (rounded, (0.25, 0.5, 1.0, 1.5, 2.0)),
    "swapped": (swapped, (0.05, 0.1, 0.2, 0.3, 0.4)),
}
TABULAR_SHIFTS: tuple[str, ...] = tuple(_EVALUATION)
"""The shifts of tables that results are reported on."""
TABULAR_TUNING_SHIFTS: tuple[str, ...] = tuple(_TUNING)
"""Other shifts of tables, only for choosing settings: no result is reported on them."""


@dataclass(frozen=True)
class TabularShift(KindOfShift):
    """One kind of shift at one severity, a pure function of the features and a generator.

    Features zeroed at random, ``x * (rand > p)``, are the shift of Durasov et al., "IT3" (ICML
    2025) on Boston housing.

    Args:
        name: One of ``TABULAR_SHIFTS`` or ``TABULAR_TUNING_SHIFTS``.
        severity: 1 (weak) to 5 (strong).

    Raises:
        ValueError: The name or the severity is unknown.

    Example:
        >>> number = Layout(torch.tensor([0]), torch.tensor([True]), missing=torch.zeros(1))
        >>> TabularShift("rounded", severity=2)(torch.tensor([[0.3], [-1.8]]), number).flatten()
        tensor([ 0.5000, -2.0000])
    """

    KINDS: ClassVar[Kinds] = {**_EVALUATION, **_TUNING}

    @torch.no_grad()
    def __call__(
        self, features: Tensor, layout: Layout, generator: Generator | None = None
    ) -> Tensor:
        """Return shifted features ``(N, F)`` of a whole set, of the same dtype.

        Args:
            features: ``(N, F)``, standardised and one-hot. They are not changed.
            layout: Which features make up a variable; ValueError if it tells of others.
            generator: On the CPU; ``None`` for a new one with seed 0, so that a call repeats.
        """
        if features.ndim != 2 or features.shape[1] != len(layout.variable):
            raise ValueError(
                f"Expected features (N, {len(layout.variable)}), got {tuple(features.shape)}. "
                "Pass the layout of the Preprocessing that made them."
            )
        source = torch.Generator().manual_seed(0) if generator is None else generator
        shifted: Tensor = self.KINDS[self.name][0](features, self.level, layout, source)
        return shifted.to(features.dtype)


@dataclass(eq=False)
class ShiftedTables(ShiftedData):
    """Rows for training, and the same held-out rows clean and under shifts for testing.

    A subclass says in :meth:`load` where its rows come from, and in ``sample_settings`` what that
    depends on. Each batch is ``(features, target)``: float32 ``(B, F)``, as :class:`Preprocessing`
    makes them of the training rows alone, and int64 ``(B,)`` classes or float32 ``(B, 1)`` values
    in their own units. The shifts are ``TABULAR_SHIFTS``, and ``TABULAR_TUNING_SHIFTS`` for
    choosing settings.

    Args:
        test_share: Share of the rows held out for testing, where no test file has them.
    """

    SHIFTS = TABULAR_SHIFTS
    TUNING_SHIFTS = TABULAR_TUNING_SHIFTS
    sample_settings: ClassVar[tuple[str, ...]] = ("test_share",)

    _: KW_ONLY
    severity: Severity = 3
    test_share: float = 0.2

    def load(self) -> tuple[Table, Table | None]:
        """Return the rows to train on and those to test on; ``None``: a share is held out."""
        what = "load(self) -> tuple[Table, Table | None]"
        raise undefined(self, what, "Return the training rows and the test rows.")

    @property
    def num_features(self) -> int:
        """Number of features ``F``, whatever rows are drawn."""
        self.setup("fit")
        return len(self._layout.variable)

    @property
    def num_outputs(self) -> int:
        """Number of outputs a network needs: classes, or 1 for a value."""
        return self.num_classes or 1

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

    def split(self) -> dict[str, Rows]:
        """Return the rows to train, validate and test on, as features."""
        train, test = self.load()
        if test is None:
            size = max(1, round(self.test_share * len(train)))
            test, train = held_out(train, size, self.seed, "test rows")
        tables = self.parted(train, test)
        preprocessing = Preprocessing.fit(tables["train"])
        self._schema, self._layout = preprocessing.schema, preprocessing.layout
        return {part: Rows(preprocessing(table), table.target) for part, table in tables.items()}

    def shifted(self, name: str) -> Rows:
        """Return the held-out rows under a shift."""
        kind, severity = self.wanted()[name]
        clean, generator = self._splits[self.evaluate_on], seeded(self.seed, kind, severity)
        features = self.change(kind, severity)(clean.inputs, self._layout, generator)
        return Rows(features, clean.targets)

    def groups(self, samples: Rows) -> Tensor:
        """Return the classes ``(N,)``; of values, the tenths between their deciles."""
        return tenths(samples.targets)


def tenths(target: Tensor) -> Tensor:
    """Return classes ``(N,)`` as they are, and of values ``(N, 1)`` the tenth they belong to."""
    if not target.is_floating_point():
        return target
    values = target.flatten().double()
    return torch.bucketize(values, values.quantile(_TENTHS), right=True)
