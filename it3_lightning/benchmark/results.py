"""Scores of a benchmark: one record per row, stream, seed and shift; their means; files of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from it3_lightning.benchmark.cell import Cell
from it3_lightning.benchmark.distances import Distances
from it3_lightning.benchmark.files import write
from it3_lightning.benchmark.record import Record
from it3_lightning.benchmark.rows import Row
from it3_lightning.data import mean_corruption_error
from it3_lightning.data.shifts import SEVERITIES

__all__ = ["Record", "Results"]


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
        """Streams that have records, ``"equal"`` first."""
        return sorted({record.stream for record in self.records})

    @property
    def shifts(self) -> list[str]:
        """Shifts in the order of the records, ``"clean"`` first."""
        return list(dict.fromkeys(record.shift for record in self.records))

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
        return Cell.of(self.scores(row, stream, self._shifted()))

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
        shifts = self._shifted() if shift is None else [shift]
        mine, theirs = (self.scores(r, stream, shifts) for r in (row, base))
        sign = 1 if self.higher_is_better else -1
        return Cell.of(sign * (a - b) for a, b in zip(mine, theirs, strict=True))

    def corruption_error(self, row: Row, stream: str) -> Cell | None:
        """Return the mean corruption error over the severities 1 to 5 of every baseline error.

        See :func:`~it3_lightning.data.mean_corruption_error`; ``None`` without a baseline.
        """
        if self.baseline_errors is None:
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
            for shift in self._shifted()
            if (gain := self.gain(row, stream, shift)) is not None
        ]
        return min(gains, key=lambda pair: pair[1]) if gains else None

    def baseline(self, row: Row) -> Row | None:
        """Return the unadapted row a row is compared with; ``None`` for such a row itself."""
        if row.name in ("source", "batch statistics"):
            return None
        still = {r.name: r for r in self.rows if r.training == row.training}
        return still["source"] if row.alone else still.get("batch statistics") or still["source"]

    def separation(self, training: str, name: str, shift: str) -> Cell:
        """Return the area under the ROC curve of a score, clean against shifted, in percent."""
        wanted = (training, name, shift)
        return Cell.of(r.score for r in self.separations if (r.training, r.row, r.shift) == wanted)

    def milliseconds(self, row: Row) -> float:
        """Return milliseconds of adaptation per sample, mean over everything."""
        mine = [
            r.ms_per_sample for r in self.records if (r.training, r.row) == (row.training, row.name)
        ]
        return statistics.fmean(mine) if mine else 0.0

    def save(self, folder: Path) -> None:
        """Write ``results.csv`` and ``results.json``."""
        write(self, folder)

    def _shifted(self) -> list[str]:
        return [shift for shift in self.shifts if shift != "clean"]
