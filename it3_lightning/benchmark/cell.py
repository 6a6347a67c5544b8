"""A score in a table: its mean over seeds, and how far the seeds are apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """Mean over seeds and standard deviation over seeds (0 for one seed).

    >>> print(Cell.of([1.0, 3.0]))
    2.0 ± 1.4
    """

    mean: float
    std: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Cell:
        """Summarise one value per seed."""
        numbers = list(values)
        spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return cls(statistics.fmean(numbers), spread)

    def __format__(self, spec: str) -> str:
        """Write both numbers so; a sign in front of the mean alone."""
        return f"{self.mean:{spec or '.1f'}} ± {self.std:{spec.lstrip('+') or '.1f'}}"

    def __str__(self) -> str:
        return f"{self}"
