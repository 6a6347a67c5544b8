"""Data modules whose shifts come in five severities, one of them or all tested on."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from it3_lightning.data.held_out import HeldOutData
from it3_lightning.data.severities import SEVERITIES, Severity, by_severity, check_severity
from it3_lightning.data.splits import S


class GradedData(HeldOutData[S]):
    """Held-out samples, clean and under shifts of a severity.

    Args:
        severity: 1 (weak) to 5 (strong), or ``"all"``: each in turn, a loader for each, whose test
            names end in ``/1`` to ``/5``.
        kwargs: Settings of :class:`~it3_lightning.data.held_out.HeldOutData`.

    Raises:
        ValueError: A setting is out of its range, or the data has too few samples for it.
    """

    severity: Severity

    def __init__(self, *, severity: Severity = 3, **kwargs: Any) -> None:
        self.severity = severity
        super().__init__(**kwargs)

    def strength(self) -> tuple[object, ...]:
        """Return the severity."""
        return (self.severity,)

    @abstractmethod
    def change(self, name: str, severity: int) -> Any:
        """Return the function behind a shift's name.

        Raises:
            ValueError: The name or the severity is unknown.
        """

    def check(self) -> None:
        """Refuse settings out of their range."""
        if self.severity != "all":
            check_severity(self.severity)
        super().check()

    def check_shift(self, name: str) -> None:
        """Refuse an unknown shift."""
        self.change(name, SEVERITIES[0] if self.severity == "all" else self.severity)

    def _wanted(self) -> dict[str, tuple[str, int]]:
        """Return name and severity of every shift to test on, by the name of its loader."""
        return by_severity(self.shifts, self.severity)
