"""Means over seeds with their spread; intervals of differences by bootstrap over samples too."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
LEVEL = 0.95
_REPLICATES = 2000
_GROUPS = 1000  # more samples are drawn in so many groups: as precise, and as fast for any number


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


@dataclass(frozen=True)
class Interval:
    """A mean difference between two rows, and what it lies within.

    Args:
        mean: of the difference.
        low: end of the interval.
        high: the other end.

    >>> print(Interval(2.34, 2.0, 2.66))
    +2.3 [+2.0, +2.7]
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, replicates: Values, level: float = LEVEL) -> Interval:
        """Return the percentile interval of bootstrap replicates."""
        low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
        return cls(mean, float(low), float(high))

    def __format__(self, spec: str) -> str:
        """Write the mean and both ends so, all with their signs."""
        spec = f"+{spec.lstrip('+') or '.1f'}"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return f"{self}"


def resampled(values: Sequence[NDArray[Any]], replicates: int = _REPLICATES) -> Values:
    """Return bootstrap replicates of the mean over seeds of the mean over samples.

    Each replicate draws as many seeds as there are, with replacement, and for each draw as many
    samples of that seed as it has (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
    Columns share their draws, so that replicates of several columns may be averaged: those of
    the same samples under several shifts. Equal numbers give equal draws.

    Args:
        values: for each seed ``(N, C)``, a row for each sample.
        replicates: their number ``R``.

    Returns:
        ``(R, C)``.

    >>> gains = [np.array([[1.0], [0.0], [1.0], [0.0]])]
    >>> print(Interval.of(0.5, resampled(gains)[:, 0]))
    +0.5 [+0.0, +1.0]
    """
    groups = [_grouped(each) for each in values]
    draws = _draws(tuple(len(each) for each in groups), replicates)
    total = np.zeros((replicates, groups[0].shape[1]))
    for weights, group, each in zip(draws, groups, values, strict=True):
        total += weights @ group * (len(group) / len(each) / len(values))
    return total


def _grouped(values: NDArray[Any]) -> Values:
    """Return sums ``(G, C)`` of every G-th sample; the samples themselves where they are few."""
    number = min(len(values), _GROUPS)
    sums = np.zeros((number, values.shape[1]))
    for start in range(0, len(values), number):
        part = values[start : start + number]
        sums[: len(part)] += part
    return sums


@lru_cache(maxsize=16)
def _draws(sizes: tuple[int, ...], replicates: int) -> list[NDArray[np.float32]]:
    """Return for each seed how often each of its samples is drawn ``(R, N)``, over ``N``."""
    random = np.random.default_rng(0)
    seeds = random.multinomial(len(sizes), [1 / len(sizes)] * len(sizes), size=replicates)
    drawn = []
    for size, times in zip(sizes, seeds.T, strict=True):
        counts = random.multinomial(times * size, np.full(size, 1 / size))
        drawn.append((counts / size).astype(np.float32))
    return drawn
