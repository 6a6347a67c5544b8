"""Seeded shifts of tables in five severities: three to evaluate on, four others to tune on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from it3_lightning.data.tabular import shift_functions as functions
from it3_lightning.data.tabular.preprocessing import Layout
from it3_lightning.messages import unknown

_Function = Callable[[Tensor, float, Layout, Generator], Tensor]
_Levels = tuple[float, float, float, float, float]

_EVALUATION: Mapping[str, tuple[_Function, _Levels]] = MappingProxyType(
    {
        "zeroed": (functions.zeroed, (0.05, 0.1, 0.2, 0.3, 0.4)),
        "missing": (functions.missing, (0.05, 0.1, 0.2, 0.3, 0.4)),
        "gaussian_noise": (functions.gaussian_noise, (0.1, 0.2, 0.4, 0.7, 1.0)),
    }
)

_TUNING: Mapping[str, tuple[_Function, _Levels]] = MappingProxyType(
    {
        "uniform_noise": (functions.uniform_noise, (0.2, 0.4, 0.7, 1.2, 1.7)),
        "scaled": (functions.scaled, (1.2, 1.5, 2.0, 3.0, 4.0)),
        "rounded": (functions.rounded, (0.25, 0.5, 1.0, 1.5, 2.0)),
        "swapped": (functions.swapped, (0.05, 0.1, 0.2, 0.3, 0.4)),
    }
)

TABULAR_SHIFTS: tuple[str, ...] = tuple(_EVALUATION)
"""The shifts of tables that results are reported on."""

TABULAR_TUNING_SHIFTS: tuple[str, ...] = tuple(_TUNING)
"""Other shifts of tables, only for choosing settings: no result is reported on them."""

_ALL = MappingProxyType({**_EVALUATION, **_TUNING})


@dataclass(frozen=True)
class TabularShift:
    """One kind of shift at one severity, a pure function of the features and a generator.

    Features zeroed at random are the shift of Durasov et al., "IT3" (ICML 2025) on tables.

    Args:
        name: one of ``TABULAR_SHIFTS`` or ``TABULAR_TUNING_SHIFTS``.
        severity: 1 (weak) to 5 (strong).

    Raises:
        ValueError: the name is unknown, or the severity is not one of 1, 2, 3, 4, 5.

    Example:
        >>> number = Layout(torch.tensor([0]), torch.tensor([True]), missing=torch.zeros(1))
        >>> TabularShift("rounded", severity=2)(torch.tensor([[0.3], [-1.8]]), number).flatten()
        tensor([ 0.5000, -2.0000])
    """

    name: str
    severity: int = 3

    def __post_init__(self) -> None:
        """Refuse an unknown name and a severity that is not an integer from 1 to 5."""
        if self.name not in _ALL:
            raise ValueError(unknown("shift", self.name, _ALL))
        if type(self.severity) is not int or not 1 <= self.severity <= 5:
            raise ValueError(
                f"Expected severity to be one of 1, 2, 3, 4, 5, got {self.severity!r}. "
                "Give an integer: 1 is the weakest, 5 the strongest."
            )

    @property
    def level(self) -> float:
        """Strength at this severity, in the unit of the shift (share, deviations, factor)."""
        return _ALL[self.name][1][self.severity - 1]

    @torch.no_grad()
    def __call__(
        self, features: Tensor, layout: Layout, generator: Generator | None = None
    ) -> Tensor:
        """Shift the features of a whole set.

        Args:
            features: ``(N, F)``, standardised and one-hot. They are not changed.
            layout: which features make up a variable.
            generator: source of all randomness, on the CPU; the global random state is never
                touched. ``None`` stands for a new one with seed 0, so that a call repeats.

        Returns:
            New features ``(N, F)`` of the same dtype.

        Raises:
            ValueError: there are other features than the layout tells of.
        """
        if features.ndim != 2 or features.shape[1] != len(layout.variable):
            raise ValueError(
                f"Expected features (N, {len(layout.variable)}), got {tuple(features.shape)}. "
                "Pass the layout of the Preprocessing that made them."
            )
        source = torch.Generator().manual_seed(0) if generator is None else generator
        return _ALL[self.name][0](features, self.level, layout, source).to(features.dtype)
