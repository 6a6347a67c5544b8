"""Distances line by line: pooled over shifts, their medians, and the share beyond the usual ones.

A line is a line of the figure: training, validation or clean samples, a severity with all of its
shifts together, or another shift by itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from it3_lightning.benchmark.cell import Cell
from it3_lightning.benchmark.distances import Distances
from it3_lightning.data.ranges import LEVELS
from it3_lightning.data.shifts import parted

LEVEL = 0.95  # of the validation samples lie within the usual distances
_FIRST = {"train": "training samples", "validation": "validation", "clean": "clean"}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Line:
    """The distances of a line with the weights of a row, over seeds.

    Args:
        training: which trained model.
        row: what happens at test time.
        name: of the line.
        median: in units of the distance.
        beyond: samples whose distance exceeds that of 95 % of the validation samples, with the same
            weights and the same seed, in percent.
    """

    training: str
    row: str
    name: str
    median: Cell
    beyond: Cell


def name_of(split: str) -> str:
    """Return the line that a split belongs to.

    >>> [name_of(split) for split in ("train", "fog/3", "shape_2")]
    ['training samples', 'severity 3', 'shape 2']
    """
    _, severity = parted(split)
    if severity is not None:
        return f"severity {severity}"
    return _FIRST.get(split, split.replace("_", " "))


def names(distances: Iterable[Distances]) -> list[str]:
    """Return the lines in their order: training to clean, severities, what has none."""

    def place(split: str) -> tuple[int, int]:
        severity = parted(split)[1]
        first = [*_FIRST].index(split) if split in _FIRST else len(_FIRST)
        return first, LEVELS + 1 if severity is None else severity

    splits = sorted(dict.fromkeys(each.split for each in distances), key=place)
    return list(dict.fromkeys(map(name_of, splits)))


def pooled(distances: Iterable[Distances]) -> dict[tuple[str, str, str], dict[int, list[float]]]:
    """Return the distances by training, row and line, and within these by seed."""
    found: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for each in distances:
        if each.values:
            seeds = found.setdefault((each.training, each.row, name_of(each.split)), {})
            seeds.setdefault(each.seed, []).extend(each.values)
    return found


def limit(values: Sequence[float]) -> float:
    """Return what 95 % of some distances lie within.

    >>> limit([0.0, 1.0])
    0.95
    """
    return float(torch.tensor(values, dtype=torch.float64).quantile(LEVEL))


def lines(distances: Sequence[Distances]) -> list[Line]:
    """Return all lines with every row, by row."""
    groups, order = pooled(distances), names(distances)
    found = []
    for training, row in dict.fromkeys((each.training, each.row) for each in distances):
        known = groups.get((training, row, _FIRST["validation"]), {})
        limits = {seed: limit(values) for seed, values in known.items()}
        for name in order:
            seeds = groups.get((training, row, name), {})
            both = [(v, limits[seed]) for seed, v in seeds.items() if seed in limits]
            if both:
                median = Cell.of(statistics.median(values) for values, _ in both)
                beyond = Cell.of(_percent(v > most for v in values) for values, most in both)
                found.append(Line(training, row, name, median, beyond))
    return found


def median_table(found: Sequence[Line]) -> tuple[list[list[str]], str]:
    """Return the medians, with titles, and the power of ten that they are multiples of.

    It is the one that makes the smallest of them a number from 1 to 1,000: they span decades.
    """
    known = [line.median.mean for line in found if line.median.mean > 0]
    power = _power(min(known, default=1.0))
    unit = 10.0**power
    cells = _table(
        found, lambda line: f"{Cell(line.median.mean / unit, line.median.std / unit):.1f}"
    )
    return cells, "1" if power == 0 else f"10{str(power).translate(_RAISED)}"


def beyond_table(found: Sequence[Line]) -> list[list[str]]:
    """Return the samples beyond the usual distances, in percent, with titles."""
    return _table(found, lambda line: f"{line.beyond:.1f}")


def _table(found: Sequence[Line], cell: Callable[[Line], str]) -> list[list[str]]:
    order = list(dict.fromkeys(line.name for line in found))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in found:
        rows.setdefault((line.training, line.row), {})[line.name] = cell(line)
    body = [[*key, *(cells.get(name, "") for name in order)] for key, cells in rows.items()]
    return [["training", "at test time", *order], *body]


def _percent(true: Iterable[bool]) -> float:
    return 100 * statistics.fmean(true)


def _power(number: float) -> int:
    """Return the power of ten, a multiple of three, in whose units a number is 1 to 1,000.

    >>> _power(0.041)
    -3
    """
    return 3 * math.floor(math.log10(number) / 3)
