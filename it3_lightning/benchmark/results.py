"""Results of a benchmark: scores as records, their means and intervals, harm, and files."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from it3_lightning.benchmark.distance_lines import Distances, lines
from it3_lightning.benchmark.intervals import Cell, Interval, Values, resampled
from it3_lightning.benchmark.pictures import Shown
from it3_lightning.benchmark.rows import FEWER, Row
from it3_lightning.data import mean_corruption_error
from it3_lightning.data.shifts import SEVERITIES
from it3_lightning.utils.files import write, write_json

_Cell = tuple[str, str, str, int, str]


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
        calibration_error: expected calibration error of 15 bins, in percent; ``None``: there are no
            classes, or it was not measured.
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
    calibration_error: float | None = None


@dataclass(frozen=True)
class Harm:
    """Where a row does worst, and where it does harm, among all shifts of all streams.

    Clean samples of a stream are one of its cells; a stream with a size of batches of its own is a
    stream by itself. A cell is harmed where the whole interval of the gain lies below zero: of
    cells without any effect that is one in forty.

    Args:
        cell: with the smallest gain.
        gain: there, mean over seeds.
        interval: of that gain; ``None``: one seed, and no scores of single samples.
        harmed: number of cells that are harmed.
        cells: number of cells whose interval is known.
    """

    cell: str
    gain: float
    interval: Interval | None
    harmed: int
    cells: int


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
        samples: scores of single samples ``(N,)``, of which the scores of records are the means, by
            training, row, stream, seed and shift; as far as there are any.
        percent: whether scores are 100 times these means.
        shown: a few samples of the first seed and stream, by the same names.
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
    samples: dict[_Cell, NDArray[Any]] = field(default_factory=dict, repr=False)
    percent: bool = False
    shown: dict[_Cell, Shown] = field(default_factory=dict, repr=False)
    _index: _Index = field(default_factory=lambda: _Index([], 0), init=False, repr=False)

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
        return list(self._indexed.shifts)

    @property
    def shifts(self) -> list[str]:
        """Shifts in the order of the records, ``"clean"`` first."""
        return list(dict.fromkeys(record.shift for record in self.records))

    def shifts_of(self, stream: str) -> list[str]:
        """Shifts of the records of a stream, without ``"clean"``."""
        return [shift for shift in self._indexed.shifts.get(stream, {}) if shift != "clean"]

    def has(self, row: Row, stream: str) -> bool:
        """Whether a row was scored on a stream."""
        return (row.training, row.name, stream) in self._indexed.records

    def scores(self, row: Row, stream: str, shifts: Iterable[str]) -> list[float]:
        """Return one score per seed: the mean over these shifts."""
        return self._means(row, stream, shifts, "score")

    def _means(self, row: Row, stream: str, shifts: Iterable[str], what: str) -> list[float]:
        """Return for each seed the mean over shifts of what records hold, where they hold it."""
        found = self._indexed.records.get((row.training, row.name, stream), {})
        by_seed: dict[int, list[float]] = {}
        for shift in dict.fromkeys(shifts):
            for seed, record in found.get(shift, {}).items():
                if (value := getattr(record, what)) is not None:
                    by_seed.setdefault(seed, []).append(value)
        return [statistics.fmean(by_seed[seed]) for seed in sorted(by_seed)]

    @property
    def _indexed(self) -> _Index:
        """Records by what they are of, made anew where there are others."""
        if self._index.seen != self.records or self._index.samples != len(self.samples):
            self._index = _Index(list(self.records), len(self.samples))
        return self._index

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

    def interval(
        self, row: Row, stream: str, shift: str | None = None, *, over: Row | None = None
    ) -> Interval | None:
        """Return the gain over another row, sample by sample, and its interval.

        Seeds and samples are drawn again, see :func:`~it3_lightning.benchmark.intervals.resampled`;
        seeds alone where the metric is no mean over samples.

        Args:
            row: that adapts.
            stream: of the samples.
            shift: on which; ``None``: on the mean of all shifts.
            over: the other row; ``None``: as of :meth:`gain`.
        """
        base = self.baseline(row) if over is None else over
        if base is None:
            return None
        key = row.training, row.name, base.training, base.name, stream, shift
        if key not in self._indexed.intervals:
            shifts = self.shifts_of(stream) if shift is None else [shift]
            found = self._replicates(row, base, stream)
            known = shifts and found.keys() >= set(shifts)
            self._indexed.intervals[key] = (
                Interval.of(
                    statistics.fmean(self._gain_in(row, base, stream, each) for each in shifts),
                    np.mean([found[each] for each in shifts], axis=0),
                )
                if known
                else None
            )
        return self._indexed.intervals[key]

    def harm(self, row: Row, *, over: Row | None = None) -> Harm | None:
        """Return where a row gains least, and how often it does harm; ``None`` without a baseline.

        Args:
            row: that adapts.
            over: another row; ``None``: as of :meth:`gain`.
        """
        base = self.baseline(row) if over is None else over
        if base is None:
            return None
        cells = self.cells(row, base)
        if not cells:
            return None
        gains = {name: self._gain_in(row, base, *name) for name in cells}
        worst = min(gains, key=lambda name: gains[name])
        known = [each for each in cells.values() if each is not None]
        name = worst[1] if len(self.streams) == 1 else f"{worst[1]}, {worst[0]}"
        harmed = sum(each.high < 0 for each in known)
        return Harm(name, gains[worst], cells[worst], harmed, len(known))

    def cells(self, row: Row, over: Row) -> dict[tuple[str, str], Interval | None]:
        """Return the intervals of the gain by stream and shift, clean samples among the shifts."""
        return {
            (stream, shift): self.interval(row, stream, shift, over=over)
            for stream in self._both(row, over)
            for shift in ["clean", *self.shifts_of(stream)]
        }

    def overall(self, row: Row, over: Row, *, clean: bool = False) -> Interval | None:
        """Return the gain over another row, mean over all streams with both, and its interval.

        Args:
            row: that is judged.
            over: the other row.
            clean: on clean samples, not on the mean of the shifts.
        """
        means, drawn = [], []
        for stream in self._both(row, over):
            shifts = ["clean"] if clean else self.shifts_of(stream)
            found = self._replicates(row, over, stream)
            if not shifts or not found.keys() >= set(shifts):
                return None
            means.append(statistics.fmean(self._gain_in(row, over, stream, s) for s in shifts))
            drawn.append(np.mean([found[shift] for shift in shifts], axis=0))
        return Interval.of(statistics.fmean(means), np.mean(drawn, axis=0)) if drawn else None

    def _both(self, row: Row, over: Row) -> list[str]:
        return [s for s in self.streams if self.has(row, s) and self.has(over, s)]

    def _gain_in(self, row: Row, over: Row, stream: str, shift: str) -> float:
        mine, theirs = (statistics.fmean(self.scores(r, stream, [shift])) for r in (row, over))
        return mine - theirs if self.higher_is_better else theirs - mine

    def _replicates(self, row: Row, base: Row, stream: str) -> dict[str, Values]:
        """Return bootstrap replicates of the gain over another row, by shift."""
        names = row.training, row.name, stream, base.training, base.name
        if names not in self._indexed.replicates:
            columns: dict[tuple[int, ...], dict[str, list[NDArray[Any]]]] = {}
            for shift in ["clean", *self.shifts_of(stream)]:
                gains = self._gains(row, base, stream, shift)
                if gains:
                    columns.setdefault(tuple(map(len, gains)), {})[shift] = gains
            found: dict[str, Values] = {}
            for same in columns.values():
                drawn = resampled([np.stack(each, 1) for each in zip(*same.values(), strict=True)])
                found.update(zip(same, drawn.T, strict=True))
            self._indexed.replicates[names] = found
        return self._indexed.replicates[names]

    def _gains(self, row: Row, base: Row, stream: str, shift: str) -> list[NDArray[Any]]:
        """Return for each seed the gains of its samples, or all of them as one; else nothing."""
        sign = 1 if self.higher_is_better else -1
        both = [
            self._indexed.records.get((each.training, each.name, stream), {}).get(shift, {})
            for each in (row, base)
        ]
        seeds = sorted(both[0])
        if not seeds or seeds != sorted(both[1]):
            return []
        pairs = [
            [
                self.samples.get((each.training, each.name, stream, seed, shift))
                for each in (row, base)
            ]
            for seed in seeds
        ]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if len(known) == len(seeds) and all(len(a) == len(b) > 1 for a, b in known):
            unit = sign * (100 if self.percent else 1)
            return [unit * (a.astype(float) - b.astype(float)) for a, b in known]
        if len(seeds) < 2:
            return []
        return [np.array([sign * (both[0][s].score - both[1][s].score)]) for s in seeds]

    def calibration_error(self, row: Row, stream: str) -> tuple[Cell, Cell] | None:
        """Return the expected calibration error in percent, of clean samples and of the shifts."""
        clean = self._means(row, stream, ["clean"], "calibration_error")
        shifted = self._means(row, stream, self.shifts_of(stream), "calibration_error")
        return (Cell.of(clean), Cell.of(shifted)) if clean and shifted else None

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
        found = self._indexed.records[row.training, row.name, self.streams[0]]
        mine = [record for by_seed in found.values() for record in by_seed.values()]
        costs = [(r.forwards, r.backwards, r.ms_per_sample) for r in mine]
        forwards, backwards, milliseconds = map(statistics.fmean, zip(*costs, strict=True))
        return forwards, backwards, milliseconds

    def times_source(self, row: Row) -> float | None:
        """Return how long a row takes, over the source of its training; ``None`` without one."""
        still = [r for r in self.rows if (r.training, r.name) == (row.training, "source")]
        known = [r for r in still if self.has(r, self.streams[0])]
        return self.cost(row)[2] / max(self.cost(known[0])[2], 1e-9) if known else None

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


@dataclass
class _Index:
    """Records by training, row and stream, then by shift and seed.

    Args:
        seen: of which it is made.
        samples: number of those that had scores of single samples.
    """

    seen: list[Record]
    samples: int
    records: dict[tuple[str, str, str], dict[str, dict[int, Record]]] = field(init=False)
    shifts: dict[str, dict[str, None]] = field(init=False)
    replicates: dict[tuple[str, ...], dict[str, Values]] = field(default_factory=dict)
    intervals: dict[tuple[str | None, ...], Interval | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.records, self.shifts = {}, {}
        for r in self.seen:
            cells = self.records.setdefault((r.training, r.row, r.stream), {})
            cells.setdefault(r.shift, {})[r.seed] = r
            self.shifts.setdefault(r.stream, {})[r.shift] = None


def _summary(results: Results, row: Row) -> dict[str, Any]:
    summary: dict[str, Any] = {"training": row.training, "row": row.name}
    for stream in results.streams:
        if not results.has(row, stream):
            continue
        gain, error = results.gain(row, stream), results.corruption_error(row, stream)
        interval = results.interval(row, stream)
        calibration = results.calibration_error(row, stream)
        summary[stream] = {
            "clean": asdict(results.clean(row, stream)),
            "shifted": asdict(results.shifted(row, stream)),
            "gain": None if gain is None else asdict(gain),
            "interval": None if interval is None else asdict(interval),
            **({} if error is None else {"mean_corruption_error": asdict(error)}),
            **({} if calibration is None else {"calibration_error": _both(*calibration)}),
        }
    costs = zip(("forwards", "backwards", "ms_per_sample"), results.cost(row), strict=True)
    harm = results.harm(row)
    return {**summary, "harm": None if harm is None else asdict(harm), **dict(costs)}


def _both(clean: Cell, shifted: Cell) -> dict[str, Any]:
    return {"clean": asdict(clean), "shifted": asdict(shifted)}
