"""Idempotence distances line by line: medians, and the share beyond what is usual.

A line is one of their figure: training, validation or clean samples, a severity with all of its
shifts together, or another shift by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from it3_lightning.benchmark.intervals import Cell
from it3_lightning.data.shifts import SEVERITIES, parted

LEVEL = 0.95  # of the validation samples lie within the usual distances
_FIRST = {"train": "training samples", "validation": "validation", "clean": "clean"}


@dataclass(frozen=True)
class Distances:
    """Distances of the samples of one split, with the weights of one row.

    Args:
        training: which trained model.
        row: what happens at test time: ``"source"``, ``"batch statistics"`` (where there are
            BatchNorm layers) or ``"default objective, episodic"``.
        seed: of training, split and shifts.
        split: ``"train"``, ``"validation"``, or the name of a test with its severity, ``"fog/3"``.
        values: one distance per sample, in units of the recipe's distance; those that are not
            finite are left out.
    """

    training: str
    row: str
    seed: int
    split: str
    values: tuple[float, ...]


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


def _name_of(split: str) -> str:
    """Return the line that a split belongs to.

    >>> [_name_of(split) for split in ("train", "fog/3", "shape_2")]
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
        return first, len(SEVERITIES) + 1 if severity is None else severity

    splits = sorted(dict.fromkeys(each.split for each in distances), key=place)
    return list(dict.fromkeys(map(_name_of, splits)))


def pooled(distances: Iterable[Distances]) -> dict[tuple[str, str, str], dict[int, list[float]]]:
    """Return the distances by training, row and line, and within these by seed."""
    found: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for each in distances:
        if each.values:
            seeds = found.setdefault((each.training, each.row, _name_of(each.split)), {})
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


def _percent(true: Iterable[bool]) -> float:
    return 100 * statistics.fmean(true)
