"""Grid search for a recipe, on validation samples under other shifts than those of the reports."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from it3_lightning.benchmark.config import BenchmarkSettings, Recipe
from it3_lightning.benchmark.kept import check_folder
from it3_lightning.benchmark.models import MakeModel, about, with_priors
from it3_lightning.benchmark.peers import at_rate
from it3_lightning.benchmark.results import Record
from it3_lightning.benchmark.rows import Kind, Row, Training
from it3_lightning.benchmark.scoring import Progress, Scoring, quiet, threads
from it3_lightning.benchmark.tune_rules import Candidate, Gains, Grid, Rule, Verdict, is_clean
from it3_lightning.data import ShiftedData
from it3_lightning.engine import Settings
from it3_lightning.training.mixin import IT3Mixin

_Scores = dict[str, dict[str, list[float]]]
"""By row and by name of the samples, one for each seed."""
_SHARED = ("optimizer", "distance", "parameters", "reliability", "sharpen")  # by all modes
_OWN_LR = {"episodic": ("episodic_lr", "episodic_steps"), "online": ("lr", "steps")}


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
            FileExistsError: see :meth:`~it3_lightning.benchmark.Benchmark.run`.
        """
        with quiet(), threads(settings.threads), to_tune_on(data):
            model = with_priors(make_model())
            kind = Kind.of(model)
            kind.check(settings.recipe.distance)
            candidates = self.grid.candidates(settings.recipe, kind, model)
            facts = about(settings, model, data, configuration)
            check_folder(Path(settings.output), facts["training"])
            still = _unadapted(self.training, kind)
            rounds = (len(still) + len(candidates)) * len(settings.streams)
            with Progress(len(settings.seeds) * rounds) as progress:
                scoring = Scoring(settings, make_model, data, facts, progress, "tuning")
                unadapted = _scores(scoring, still, self.batches)
                base = max(still, key=lambda row: settings.sign * _shifted(unadapted[row.name]))
                start = base.settings or Settings(steps=0, measure=False)
                rows = [candidate.row(self.training, start) for candidate in candidates]
                scores = _scores(scoring, rows, self.batches)
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


@dataclass(frozen=True)
class Tuned:
    """All candidates of a search, and which one the rule chooses.

    Args:
        title: name of the score, and its direction where smaller is better.
        decimals: of scores and gains.
        training: which one it was chosen for.
        seeds: of the models.
        shifts: that it was chosen under.
        base: the strongest unadapted row.
        before: its scores by name of the samples, one for each seed.
        candidates: ways to adapt.
        verdicts: of the rule, in the same order.
        tolerated: the loss that is tolerated.
        rule: that chose.
    """

    title: str
    decimals: int
    training: Training
    seeds: tuple[int, ...]
    shifts: tuple[str, ...]
    base: Row
    before: Mapping[str, Sequence[float]]
    candidates: tuple[Candidate, ...]
    verdicts: tuple[Verdict, ...]
    tolerated: float
    rule: Rule

    @property
    def ranked(self) -> list[tuple[Candidate, Verdict]]:
        """Candidates that may be chosen first, and among equals those that gain more."""
        pairs = list(zip(self.candidates, self.verdicts, strict=True))
        return sorted(pairs, key=lambda p: (p[1].harmless and p[1].gains, p[1].gain.mean))[::-1]

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that the rule chooses; ``None``: adapt nothing."""
        index = self.rule.chosen(self.verdicts)
        return None if index is None else self.candidates[index]

    def chosen_of(self, mode: str, like: Recipe | None = None) -> Candidate | None:
        """Return what the rule chooses among the candidates of a mode.

        Args:
            mode: of the candidates.
            like: whose objective and parameters they must have; ``None``: any.
        """
        own = [
            i
            for i, candidate in enumerate(self.candidates)
            if candidate.mode == mode and (like is None or _alike(candidate.recipe, like))
        ]
        index = self.rule.chosen([self.verdicts[i] for i in own])
        return None if index is None else self.candidates[own[index]]

    def yaml(self) -> str:
        """Return the lines to put into a configuration: the callback, and the benchmark's recipe.

        The recipe has the objective and the parameters of the best candidate that takes a step, and
        the learning rate of the best one with these in each mode. A mode in which none may be
        chosen is left out.
        """
        callback = {"class_path": "it3_lightning.IT3TestTimeCallback", "init_args": self._args()}
        lines: dict[str, Any] = {"trainer": {"callbacks": [callback]}}
        if recipe := self._recipe():
            lines["benchmark"] = {"recipe": recipe}
        return str(yaml.safe_dump(lines, sort_keys=False, default_flow_style=None))

    def _args(self) -> dict[str, Any]:
        """Return the arguments of the callback."""
        still = self.base.settings
        norm_stats = "source" if still is None else still.norm_stats
        if self.chosen is None or self.chosen.mode == "none":
            prediction = "first" if self.chosen is None else self.chosen.prediction
            return {"steps": 0, "norm_stats": norm_stats, "prediction": prediction}
        settings = self.chosen.settings(still or Settings(steps=0))
        objective = self.chosen.recipe.objective
        return {
            "scope": settings.scope,
            "steps": settings.steps,
            "optimizer": settings.optimizer,
            "lr": settings.lr,
            "parameters": settings.parameters,
            "reset": settings.reset,
            "anchor": settings.anchor,
            "norm_stats": settings.norm_stats,
            "prediction": self.chosen.prediction,
            "objective": {
                "class_path": "it3_lightning.Idempotence",
                "init_args": {
                    "distance": objective.distance,
                    "reliability": objective.reliability,
                    "sharpen": objective.sharpen,
                },
            },
        }

    def _recipe(self) -> dict[str, Any]:
        moving = [c for mode in ("episodic", "online", "sample") if (c := self.chosen_of(mode))]
        gains = {c: v.gain.mean for c, v in zip(self.candidates, self.verdicts, strict=True)}
        if not moving:
            return {}
        best = max(moving, key=lambda candidate: gains[candidate]).recipe
        recipe = {name: getattr(best, name) for name in _SHARED}
        for mode, (lr, steps) in _OWN_LR.items():
            if own := self.chosen_of(mode, like=best):
                recipe |= {lr: getattr(own.recipe, lr), steps: getattr(own.recipe, steps)}
        if own := self.chosen_of("sample", like=best):
            recipe["sample_lr"] = own.recipe.sample_lr
        return recipe


def _scores(scoring: Scoring, rows: Sequence[Row], batches: int | None) -> _Scores:
    """Return the scores of rows of one training, on all seeds and streams."""
    found: _Scores = {row.name: {} for row in rows}
    streams = scoring.settings.streams
    for seed, stream, row in product(scoring.settings.seeds, streams, rows):
        for record in scoring.records(row, seed, stream, batches=batches):
            name = f"{record.shift}, {record.stream}" if len(streams) > 1 else record.shift
            found[row.name].setdefault(name, []).append(record.score)
    return found


def at_chosen_rates(rows: Sequence[Row], model: IT3Mixin, scoring: Scoring) -> list[Row]:
    """Return rows at the learning rate that the rule of tuning chooses; *tuned* in their names.

    The choice is among factors of each row's own rate, ``benchmark.rates``, with the models of the
    first seed, on validation samples under the data's tuning shifts. Where none gains without harm,
    the row takes no step.

    Args:
        rows: that take steps.
        model: whose settings tell whether scores that are there still hold.
        scoring: on the benchmark's data.
    """
    settings, data = scoring.settings, scoring.data
    seed, most, rule, found = settings.seeds[0], settings.rate_batches, Rule(), []
    with to_tune_on(data):
        facts = {**scoring.facts, "settings": about(settings, model, data)["settings"]}
        own = replace(scoring, facts=facts, folder="rates")
        for row in rows:
            still = _still(row)
            tried = [still, *(at_rate(row, factor) for factor in settings.rates)]
            scores = [own.records(each, seed, "equal", batches=most) for each in tried]
            before, *after = map(_by_name, scores)
            gains = [_gains(settings.sign, before, each) for each in after]
            mean = statistics.fmean(settings.error(values[0]) for values in before.values())
            tolerated = rule.tolerated(gains, mean)
            chosen = rule.chosen([rule.verdict(each, tolerated) for each in gains])
            best = still if chosen is None else tried[1 + chosen]
            rate = (
                f"lr {best.settings.lr:.2g}" if best.settings and chosen is not None else "no step"
            )
            name = f"{row.name}, tuned: {rate}"
            found.append(replace(best, name=name, published=False))
    return found


def _still(row: Row) -> Row:
    """Return the row with the same statistics that takes no step."""
    assert row.settings is not None
    own = {name: getattr(row.settings, name) for name in ("scope", "norm_stats")}
    return Row(row.training, row.name, Settings(steps=0, measure=False, **own), samples=row.samples)


def _by_name(records: Sequence[Record]) -> dict[str, list[float]]:
    return {record.shift: [record.score] for record in records}


@contextmanager
def to_tune_on(data: ShiftedData) -> Iterator[None]:
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


def _alike(one: Recipe, other: Recipe) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _SHARED)
