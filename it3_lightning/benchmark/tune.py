"""Chooses how to adapt, on validation samples under other shifts than those of the reports."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from it3_lightning.benchmark.about import about
from it3_lightning.benchmark.candidates import Candidate, Grid
from it3_lightning.benchmark.choosing import Gains, Rule, is_clean
from it3_lightning.benchmark.kind import Kind
from it3_lightning.benchmark.progress import Progress, quiet, threads
from it3_lightning.benchmark.rows import Row
from it3_lightning.benchmark.search import Search
from it3_lightning.benchmark.settings import BenchmarkSettings
from it3_lightning.benchmark.training import MakeModel, with_priors
from it3_lightning.benchmark.tuned import Tuned
from it3_lightning.data import ShiftedData
from it3_lightning.engine import Settings


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Settings of the search for a recipe.

    The samples are those to validate on, the shifts the data's tuning shifts: nothing that results
    are reported on is looked at. Models are those of the benchmark with the same settings, and
    trained once for both. Scores are kept in ``tuning`` of the benchmark's output folder.

    Args:
        training: which training to choose for.
        grid: what is compared.
        rule: by which one is chosen.
        batches: the most of each loader to score on; ``None``: all. What is carried along a stream
            is chosen for streams of this length.
    """

    training: Literal["joint", "post-hoc"] = "post-hoc"
    grid: Grid = field(default_factory=Grid)
    rule: Rule = field(default_factory=Rule)
    batches: int | None = None

    def __post_init__(self) -> None:
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"Expected batches >= 1 or None, got {self.batches}.")

    def run(
        self,
        settings: BenchmarkSettings,
        make_model: MakeModel,
        data: ShiftedData,
        configuration: object = None,
    ) -> Tuned:
        """Score every candidate that has not been scored, and choose.

        Args:
            settings: of the benchmark; its rows are not asked for.
            make_model: returns a fresh model with priors, the same one for the same seed.
            data: to train on and to validate on.
            configuration: see :meth:`~it3_lightning.benchmark.Benchmark.run`.

        Raises:
            ValueError: the data has no tuning shifts.
        """
        with quiet(), threads(settings.threads), _to_tune_on(data):
            model = with_priors(make_model())
            kind = Kind.of(model)
            kind.check(settings.recipe.distance)
            candidates = self.grid.candidates(settings.recipe, kind, model)
            facts = about(settings, model, data, configuration)
            still = _unadapted(self.training, kind)
            rounds = (len(still) + len(candidates)) * len(settings.streams)
            with Progress(len(settings.seeds), rounds) as progress:
                search = Search(settings, make_model, data, facts, progress, self.batches)
                unadapted = search.scores(still)
                base = max(still, key=lambda row: settings.sign * _shifted(unadapted[row.name]))
                start = base.settings or Settings(steps=0, measure=False)
                rows = [candidate.row(self.training, start) for candidate in candidates]
                scores = search.scores(rows)
        before = unadapted[base.name]
        gains = [_gains(settings.sign, before, scores[row.name]) for row in rows]
        return self._judged(settings, data, candidates, base, before, gains)

    def _judged(
        self,
        settings: BenchmarkSettings,
        data: ShiftedData,
        candidates: Sequence[Candidate],
        base: Row,
        before: dict[str, list[float]],
        gains: Sequence[Gains],
    ) -> Tuned:
        means = [settings.error(statistics.fmean(values)) for values in before.values()]
        tolerated = self.rule.tolerated(gains, statistics.fmean(means))
        return Tuned(
            title=settings.metric + (" (lower is better)" if not settings.higher_is_better else ""),
            decimals=settings.decimals,
            training=self.training,
            seeds=tuple(settings.seeds),
            shifts=tuple(data.tuning_shifts),
            base=base,
            before=before,
            candidates=tuple(candidates),
            verdicts=tuple(self.rule.verdict(each, tolerated) for each in gains),
            tolerated=tolerated,
            rule=self.rule,
        )


@contextmanager
def _to_tune_on(data: ShiftedData) -> Iterator[None]:
    """Let the data test on validation samples under its tuning shifts within."""
    if not data.tuning_shifts:
        raise ValueError(
            f"Expected data with shifts to tune on, got {type(data).__name__} without. Give it a "
            "property tuning_shifts, names of other shifts than those that results are reported on."
        )
    before = data.evaluate_on, data.shifts, data.seed, data.stream
    data.evaluate_on, data.shifts = "validation", data.tuning_shifts
    try:
        yield
    finally:
        data.evaluate_on, data.shifts, data.seed, data.stream = before


def _unadapted(training: Literal["joint", "post-hoc"], kind: Kind) -> list[Row]:
    batch = Settings(steps=0, norm_stats="batch", measure=False)
    rows = [Row(training, "source"), Row(training, "batch statistics", batch)]
    return rows[: 1 + kind.batch_norm]


def _gains(sign: int, before: dict[str, list[float]], after: dict[str, list[float]]) -> Gains:
    return {
        name: [sign * (b - a) for a, b in zip(before[name], values, strict=True)]
        for name, values in after.items()
    }


def _shifted(scores: dict[str, list[float]]) -> float:
    return statistics.fmean(
        statistics.fmean(values) for name, values in scores.items() if not is_clean(name)
    )
