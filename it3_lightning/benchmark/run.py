"""Benchmark loop: trains, scores every row seed by seed, and goes on where it stopped."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from it3_lightning.benchmark.config import BenchmarkSettings
from it3_lightning.benchmark.distances import keep_distances, kept_distances, separations
from it3_lightning.benchmark.kept import check_folder, kept, rebuilt
from it3_lightning.benchmark.models import MakeModel, Models, about, models_of, with_priors
from it3_lightning.benchmark.results import Distances, Record, Results
from it3_lightning.benchmark.rows import Kind, Row, rows_for
from it3_lightning.data import ShiftedData
from it3_lightning.engine.selection import select
from it3_lightning.methods import Idempotence
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.files import write_json

_KEPT = ("records", "separations")  # of a seed, in its file


@dataclass(kw_only=True)
class Benchmark(BenchmarkSettings):
    """Trains, adapts and compares."""

    def run(
        self, make_model: MakeModel, data: ShiftedData, configuration: object = None
    ) -> Results:
        """Run everything that has not been run and return all results.

        Args:
            make_model: returns a fresh model with priors, the same one for the same seed.
            data: gives the loaders of clean and shifted samples.
            configuration: plain data that ``make_model`` depends on, for telling whether models and
                scores that are there already still hold.

        Raises:
            FileExistsError: the output folder holds a run with other data, model or training, or
                files of another origin.
        """
        with quiet(), threads(self.threads):
            probe = with_priors(make_model())
            kind = Kind.of(probe)
            kind.check(self.recipe.distance)
            rows = [r for r in rows_for(self.recipe, kind) if r.main or self.rows == "all"]
            facts = about(self, probe, data, configuration)
            check_folder(Path(self.output), facts["training"])
            results = Results(
                self.metric,
                rows,
                about=facts,
                higher_is_better=self.higher_is_better,
                decimals=self.decimals,
                baseline_errors=self._baseline_errors(data),
            )
            with Progress(len(self.seeds), len(rows) * len(self.streams)) as progress:
                for seed in self.seeds:
                    found = self._seed(seed, rows, make_model, data, progress, facts)
                    results.records += found[0]
                    results.separations += found[1]
                    results.distances += found[2]
        results.save(Path(self.output))
        return results

    def _baseline_errors(self, data: ShiftedData) -> dict[str, float] | None:
        """Return the errors that those of an accuracy in per cent are compared with, if any."""
        if data.baseline_errors is None or not (self.percent and self.higher_is_better):
            return None
        return dict(data.baseline_errors)

    def _seed(
        self,
        seed: int,
        rows: list[Row],
        make_model: MakeModel,
        data: ShiftedData,
        progress: Progress,
        about: dict[str, Any],
    ) -> tuple[list[Record], list[Record], list[Distances]]:
        """Return scores, separations and distances of one seed, from files where these fit.

        The distances have a file of their own, written last: what fails there costs no scores.
        """
        file = Path(self.output) / f"seed_{seed}.json"
        fingerprint = json.dumps(about["settings"], sort_keys=True)
        scores = kept(file, fingerprint, _read)
        distances = None
        if scores is not None:
            progress.skip(f"seed {seed}: from {file}", len(rows) * len(self.streams))
            distances = kept_distances(Path(self.output), seed, fingerprint)
            if distances is not None:
                return *scores, distances
        models = models_of(self, seed, make_model, data, progress.say, about["training"])
        if scores is None:
            scores = self._scores(seed, rows, models, data, progress)
            content = {k: [asdict(r) for r in v] for k, v in zip(_KEPT, scores, strict=True)}
            write_json(file, {"fingerprint": fingerprint, **content})
        if distances is None:
            progress.say(f"seed {seed}: distances")
            data.stream = self.streams[0]  # type: ignore[assignment]
            distances = keep_distances(self, models, rows, data, fingerprint)
        return *scores, distances

    def _scores(
        self,
        seed: int,
        rows: list[Row],
        models: Models,
        data: ShiftedData,
        progress: Progress,
    ) -> tuple[list[Record], list[Record]]:
        """Score all rows, and how well distances tell shifted samples from clean ones."""
        records: list[Record] = []
        for stream in self.streams:
            data.stream = stream  # type: ignore[assignment]
            for row in rows:
                progress.say(f"seed {seed}, {stream} classes: {row.training}, {row.name}")
                records += scored(self, row, models[row.training], data)
                progress.advance()
        data.stream = self.streams[0]  # type: ignore[assignment]
        return records, separations(models, data, Idempotence(self.recipe.distance))


def scored(
    settings: BenchmarkSettings,
    row: Row,
    model: IT3Mixin,
    data: ShiftedData,
    *,
    batches: int | None = None,
) -> list[Record]:
    """Return a record for each loader of the data.

    Args:
        settings: of the Trainer and of the metric.
        row: what happens at test time.
        model: of the row's training.
        data: clean and shifted samples, with the stream and the seed set.
        batches: the most of each loader; ``None``: all.
    """
    callback = row.callback()
    callbacks = [] if callback is None else [callback]
    trainer = settings.trainer(callbacks=callbacks, limit_test_batches=batches)
    logged = trainer.test(model, datamodule=data, verbose=False)
    adapts = row.settings is not None and row.settings.steps > 0
    chosen = select(model, row.settings.parameters) if adapts and row.settings else {}
    time = 0.0 if callback is None else callback.summary.ms_per_sample
    adapted = sum(p.numel() for p in chosen.values())
    return [
        Record(
            row.training,
            row.name,
            data.stream,
            data.seed,
            shift,
            _score_in(scores, settings.metric, percent=settings.percent),
            time,
            adapted,
        )
        for shift, scores in zip(data.test_names, logged, strict=True)
    ]


def _score_in(scores: Mapping[str, Any], metric: str, *, percent: bool) -> float:
    """Return the score in what a loader's ``test_step`` logged.

    Raises:
        ValueError: it is not there.

    >>> _score_in({"test_acc/dataloader_idx_1": 0.5}, "test_acc", percent=True)
    50.0
    """
    for key, value in scores.items():
        if key.partition("/dataloader_idx_")[0] == metric:
            return float(value) * (100 if percent else 1)
    raise ValueError(
        f"test_step logged no {metric!r}, but {', '.join(scores)}. Set benchmark.metric "
        "to one of them."
    )


class Progress:
    """A bar over the evaluations of all seeds, with a line that says what is being done.

    Args:
        seeds: number of seeds.
        evaluations: rows times streams, per seed.
    """

    def __init__(self, seeds: int, evaluations: int) -> None:
        self._bar = Bar(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task("starting", total=seeds * evaluations)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.say("done")
        self._bar.stop()

    def say(self, text: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=text)

    def advance(self) -> None:
        """Count one evaluation."""
        self._bar.advance(self._task)

    def skip(self, text: str, evaluations: int) -> None:
        """Count evaluations that were there already."""
        self._bar.update(self._task, description=text, advance=evaluations)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch use this many threads on the CPU within; ``None``: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notices about every run of a Trainer out of the way."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        warnings.filterwarnings("ignore", ".*`tensorboardX` has been removed.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _read(content: dict[str, Any]) -> tuple[list[Record], list[Record]]:
    first, second = ([rebuilt(Record, saved) for saved in content[name]] for name in _KEPT)
    return first, second
