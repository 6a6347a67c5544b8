"""Results of a benchmark: scores and distances as records, their means over seeds, and files.

A line of distances is a line of their figure: training, validation or clean samples, a severity
with all of its shifts together, or another shift by itself.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from it3_lightning.benchmark.rows import FEWER, Row
from it3_lightning.data import mean_corruption_error
from it3_lightning.data.shifts import SEVERITIES, parted
from it3_lightning.utils.files import write, write_json

LEVEL = 0.95  # of the validation samples lie within the usual distances
_FIRST = {"train": "training samples", "validation": "validation", "clean": "clean"}


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
class Record:
    """One score.

    Args:
        training: which trained model.
        row: what happened at test time.
        stream: its name, with its own size of batches after a slash, as in ``"equal/16"``.
        seed: of training, split and shifts.
        shift: its name; ``"clean"`` for none.
        score: in the units of the metric.
        ms_per_sample: milliseconds per sample, of the whole test: its loaders and metrics too.
        adapted: number of weights that adapt.
        forwards: passes for each batch, or sample where each is by itself; the step's own too.
        backwards: the same of backward passes.
    """

    training: str
    row: str
    stream: str
    seed: int
    shift: str
    score: float
    ms_per_sample: float
    adapted: int
    forwards: float = 1.0
    backwards: float = 0.0


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


@dataclass
class Results:
    """All records of a benchmark, and what they were made with.

    Args:
        metric: name of the score.
        rows: in the order of the table.
        records: the scores.
        separations: records of how well a score tells shifted samples from clean ones.
        distances: of the samples of every split, before and after adaptation.
        about: versions, settings, seeds.
        higher_is_better: whether a larger score is the better one; gains are improvements.
        decimals: of scores and gains in tables.
        baseline_errors: see :class:`~it3_lightning.data.ShiftedData`.
    """

    metric: str
    rows: list[Row]
    records: list[Record] = field(default_factory=list)
    separations: list[Record] = field(default_factory=list)
    distances: list[Distances] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    higher_is_better: bool = True
    decimals: int = 1
    baseline_errors: Mapping[str, float] | None = None

    @property
    def title(self) -> str:
        """The name of the score, and its direction where smaller is better."""
        return self.metric + (" (lower is better)" if not self.higher_is_better else "")

    @property
    def seeds(self) -> list[int]:
        """Seeds that have records."""
        return sorted({record.seed for record in self.records})

    @property
    def streams(self) -> list[str]:
        """Streams that have records, in their order."""
        return list(dict.fromkeys(record.stream for record in self.records))

    @property
    def shifts(self) -> list[str]:
        """Shifts in the order of the records, ``"clean"`` first."""
        return list(dict.fromkeys(record.shift for record in self.records))

    def shifts_of(self, stream: str) -> list[str]:
        """Shifts of the records of a stream, without ``"clean"``."""
        found = dict.fromkeys(r.shift for r in self.records if r.stream == stream)
        return [shift for shift in found if shift != "clean"]

    def has(self, row: Row, stream: str) -> bool:
        """Whether a row was scored on a stream."""
        wanted = row.training, row.name, stream
        return any((r.training, r.row, r.stream) == wanted for r in self.records)

    def scores(self, row: Row, stream: str, shifts: Iterable[str]) -> list[float]:
        """Return one score per seed: the mean over these shifts."""
        wanted = set(shifts)
        by_seed: dict[int, list[float]] = {}
        for r in self.records:
            same = (r.training, r.row, r.stream) == (row.training, row.name, stream)
            if same and r.shift in wanted:
                by_seed.setdefault(r.seed, []).append(r.score)
        return [statistics.fmean(by_seed[seed]) for seed in sorted(by_seed)]

    def clean(self, row: Row, stream: str) -> Cell:
        """Return the score on clean samples."""
        return Cell.of(self.scores(row, stream, ["clean"]))

    def shifted(self, row: Row, stream: str) -> Cell:
        """Return the mean score over all shifts."""
        return Cell.of(self.scores(row, stream, self.shifts_of(stream)))

    def gain(self, row: Row, stream: str, shift: str | None = None) -> Cell | None:
        """Return the gain over the same model's strongest unadapted row, seed by seed.

        That is the row of its batch statistics, or its source where it has no BatchNorm or each
        sample is by itself. A gain is an improvement: how much higher the score is, or how much
        lower where that is better.

        Args:
            row: that adapts, or predicts otherwise; ``None`` comes back for an unadapted one.
            stream: of the samples.
            shift: on which; ``None``: on the mean of all shifts.
        """
        base = self.baseline(row)
        if base is None:
            return None
        shifts = self.shifts_of(stream) if shift is None else [shift]
        mine, theirs = (self.scores(r, stream, shifts) for r in (row, base))
        sign = 1 if self.higher_is_better else -1
        return Cell.of(sign * (a - b) for a, b in zip(mine, theirs, strict=True))

    def corruption_error(self, row: Row, stream: str) -> Cell | None:
        """Return the mean corruption error over the severities 1 to 5 of every baseline error.

        See :func:`~it3_lightning.data.mean_corruption_error`; ``None`` without a baseline.
        """
        joined = {"continual", "mixed"} & {*self.shifts_of(stream)}
        if self.baseline_errors is None or joined:
            return None
        scores = {
            name: self.scores(row, stream, [f"{name}/{severity}" for severity in SEVERITIES])
            for name in self.baseline_errors
        }
        by_seed = zip(*scores.values(), strict=True)
        errors = [{n: 100 - s for n, s in zip(scores, seed, strict=True)} for seed in by_seed]
        return Cell.of(mean_corruption_error(e, self.baseline_errors) for e in errors)

    def worst(self, row: Row, stream: str) -> tuple[str, float] | None:
        """Return the shift with the smallest gain over the baseline, mean over seeds."""
        gains = [
            (shift, gain.mean)
            for shift in self.shifts_of(stream)
            if (gain := self.gain(row, stream, shift)) is not None
        ]
        return min(gains, key=lambda pair: pair[1]) if gains else None

    def baseline(self, row: Row) -> Row | None:
        """Return the unadapted row a row is compared with; ``None`` for such a row itself."""
        if row.name in ("source", "batch statistics", FEWER):
            return None
        still = {r.name: r for r in self.rows if r.training == row.training}
        if row.samples is not None:
            return still.get(FEWER)
        return still["source"] if row.alone else still.get("batch statistics") or still["source"]

    def separation(self, training: str, name: str, shift: str) -> Cell:
        """Return the area under the ROC curve of a score, clean against shifted, in percent."""
        wanted = (training, name, shift)
        return Cell.of(r.score for r in self.separations if (r.training, r.row, r.shift) == wanted)

    def cost(self, row: Row) -> tuple[float, float, float]:
        """Return passes forward and backward, and milliseconds a sample, in the first stream."""
        wanted = row.training, row.name, self.streams[0]
        mine = [r for r in self.records if (r.training, r.row, r.stream) == wanted]
        costs = [(r.forwards, r.backwards, r.ms_per_sample) for r in mine]
        forwards, backwards, milliseconds = map(statistics.fmean, zip(*costs, strict=True))
        return forwards, backwards, milliseconds

    def save(self, folder: Path) -> None:
        """Write ``results.csv`` and ``results.json``."""
        table = io.StringIO()
        writer = csv.DictWriter(table, [f.name for f in fields(Record)])
        writer.writeheader()
        writer.writerows(asdict(record) for record in self.records)
        write(folder / "results.csv", table.getvalue())
        content = {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "decimals": self.decimals,
            "about": self.about,
            "table": [_summary(self, row) for row in self.rows],
            "records": [asdict(record) for record in self.records],
            "separations": [asdict(record) for record in self.separations],
            "distances": [asdict(line) for line in lines(self.distances)],
        }
        write_json(folder / "results.json", content, indent=1)


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


def _summary(results: Results, row: Row) -> dict[str, Any]:
    summary: dict[str, Any] = {"training": row.training, "row": row.name}
    for stream in results.streams:
        if not results.has(row, stream):
            continue
        gain, error = results.gain(row, stream), results.corruption_error(row, stream)
        summary[stream] = {
            "clean": asdict(results.clean(row, stream)),
            "shifted": asdict(results.shifted(row, stream)),
            "gain": None if gain is None else asdict(gain),
            **({} if error is None else {"mean_corruption_error": asdict(error)}),
        }
    costs = zip(("forwards", "backwards", "ms_per_sample"), results.cost(row), strict=True)
    return {**summary, **dict(costs)}


def _percent(true: Iterable[bool]) -> float:
    return 100 * statistics.fmean(true)
