"""A kind of shift at one severity, by name: what each family of shifts has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from it3_lightning.data.severities import check_severity
from it3_lightning.utils.messages import unknown

Levels = tuple[float, float, float, float, float]
Kinds = Mapping[str, tuple[Callable[..., Any], Levels]]
"""What each kind does, and its level at each severity, by name."""


@dataclass(frozen=True)
class KindOfShift:
    """One kind of shift at one severity.

    Args:
        name: of the kind.
        severity: 1 (weak) to 5 (strong).

    Raises:
        ValueError: the name is unknown, or the severity is not one of 1, 2, 3, 4, 5.
    """

    KINDS: ClassVar[Kinds]

    name: str
    severity: int = 3

    def __post_init__(self) -> None:
        """Refuse an unknown name and a severity that is not an integer from 1 to 5."""
        if self.name not in self.KINDS:
            raise ValueError(unknown("shift", self.name, self.KINDS))
        check_severity(self.severity)

    @property
    def level(self) -> float:
        """Strength at this severity, in the unit of the shift (degrees, deviation, share)."""
        return self.KINDS[self.name][1][self.severity - 1]
