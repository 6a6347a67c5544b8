"""Grid search for a recipe, on validation samples under other shifts than those of the reports."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from it3_lightning.benchmark.config import BenchmarkSettings, Recipe
from it3_lightning.benchmark.kept import check_folder, kept, rebuilt
from it3_lightning.benchmark.models import MakeModel, Models, about, models_of, with_priors
from it3_lightning.benchmark.results import Record
from it3_lightning.benchmark.rows import Kind, Row, Training
from it3_lightning.benchmark.run import Progress, quiet, scored, threads
from it3_lightning.benchmark.tune_rules import Candidate, Gains, Grid, Rule, Verdict, is_clean
from it3_lightning.data import ShiftedData
from it3_lightning.engine import Settings
from it3_lightning.utils.files import write_json

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
        with quiet(), threads(settings.threads), _to_tune_on(data):
            model = with_priors(make_model())
            kind = Kind.of(model)
            kind.check(settings.recipe.distance)
            candidates = self.grid.candidates(settings.recipe, kind, model)
            facts = about(settings, model, data, configuration)
            check_folder(Path(settings.output), facts["training"])
            still = _unadapted(self.training, kind)
            rounds = (len(still) + len(candidates)) * len(settings.streams)
            with Progress(len(settings.seeds), rounds) as progress:
                search = _Search(settings, make_model, data, facts, progress, self.batches)
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


@dataclass(frozen=True)
class _Search:
    """Scores rows on all seeds and streams, keeping what was scored before.

    Args:
        settings: seeds, streams, metric and Trainer.
        make_model: returns a fresh model with priors.
        data: set to what is to be scored on, but for seed and stream.
        facts: of :func:`~it3_lightning.benchmark.models.about`.
        progress: is told.
        batches: the most of each loader; ``None``: all.
    """

    settings: BenchmarkSettings
    make_model: MakeModel
    data: ShiftedData
    facts: dict[str, Any]
    progress: Progress
    batches: int | None = None

    def scores(self, rows: Sequence[Row]) -> _Scores:
        """Return the scores of rows of one training."""
        found: _Scores = {row.name: {} for row in rows}
        for seed in self.settings.seeds:
            kept = _Kept(self._file(seed), self._fingerprint())
            models = None
            for row, stream in ((r, s) for s in self.settings.streams for r in rows):
                key = json.dumps([repr(row), stream, self.batches])
                if key not in kept.records:
                    models = models or self._models(seed)
                    self.progress.say(f"seed {seed}, {stream} classes: {row.name}")
                    self.data.seed, self.data.stream = seed, stream  # type: ignore[assignment]
                    model = models[row.training]
                    records = scored(self.settings, row, model, self.data, batches=self.batches)
                    kept.add(key, records)
                self.progress.advance()
                for record in kept.records[key]:
                    name = self._name(record)
                    found[row.name].setdefault(name, []).append(record.score)
        return found

    def _models(self, seed: int) -> Models:
        say, training = self.progress.say, self.facts["training"]
        return models_of(self.settings, seed, self.make_model, self.data, say, training)

    def _file(self, seed: int) -> Path:
        return Path(self.settings.output) / "tuning" / f"seed_{seed}.json"

    def _fingerprint(self) -> str:
        """Return all that a score depends on besides its row."""
        parts = {
            "training": self.facts["training"],
            "data": self.facts["settings"]["data"],
            "metric": self.settings.metric,
        }
        return json.dumps(parts, sort_keys=True)

    def _name(self, record: Record) -> str:
        several = len(self.settings.streams) > 1
        return f"{record.shift}, {record.stream}" if several else record.shift


class _Kept:
    """Records of one seed by row and stream, in a file."""

    def __init__(self, file: Path, fingerprint: str) -> None:
        self._file, self._fingerprint = file, fingerprint
        self.records = kept(file, fingerprint, _records) or {}

    def add(self, key: str, records: list[Record]) -> None:
        """Keep the records of a row, and write the file."""
        self.records[key] = records
        rows = {key: [asdict(record) for record in own] for key, own in self.records.items()}
        write_json(self._file, {"fingerprint": self._fingerprint, "rows": rows})


def _records(content: dict[str, Any]) -> dict[str, list[Record]]:
    rows = content["rows"].items()
    return {key: [rebuilt(Record, saved) for saved in records] for key, records in rows}


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


def _alike(one: Recipe, other: Recipe) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _SHARED)
