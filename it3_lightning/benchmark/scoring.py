"""Scores of rows on data: each is kept in a file as it comes, so that a new row costs its own."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from torch import Tensor
from torch.utils._pytree import tree_leaves

from it3_lightning.benchmark.config import BenchmarkSettings, stream_and_size
from it3_lightning.benchmark.kept import kept, rebuilt
from it3_lightning.benchmark.models import MakeModel, Models, further_model, models_of, with_priors
from it3_lightning.benchmark.peers import training_of
from it3_lightning.benchmark.pictures import Shown, shown_shifts
from it3_lightning.benchmark.results import Record
from it3_lightning.benchmark.rows import Row, Training
from it3_lightning.benchmark.sample_scores import (
    Scores,
    keep_samples,
    kept_samples,
    kept_shown,
    noting,
)
from it3_lightning.callbacks.test_time import TestTimeCallback
from it3_lightning.data import ShiftedData
from it3_lightning.engine.selection import select
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.files import write_json
from it3_lightning.utils.specs import spec

_LOOKED_AT = 20  # batches: where all of them are equal, loaders are


@dataclass
class Scoring:
    """Scores rows with the models of a seed.

    Args:
        settings: metric and Trainer.
        make_model: returns a fresh model with priors.
        data: clean and shifted samples; its seed, stream and batch size are set.
        facts: of :func:`~it3_lightning.benchmark.models.about`.
        progress: is told.
        folder: of the benchmark's output, in which scores are kept.
    """

    settings: BenchmarkSettings
    make_model: MakeModel
    data: ShiftedData
    facts: dict[str, Any]
    progress: Progress
    folder: str = "."
    _models: dict[int, Models] = field(default_factory=dict)
    _files: dict[int, _Kept] = field(default_factory=dict, init=False)
    _tried: bool = field(default=False, init=False)

    def models(self, seed: int) -> Models:
        """Return the three trained models of a seed; those of one seed at a time are in memory."""
        if not self._tried:
            self._try_out(seed)
        if seed not in self._models:
            say, training = self.progress.say, self.facts["training"]
            found = models_of(self.settings, seed, self.make_model, self.data, say, training)
            self._models = {seed: found}
        return self._models[seed]

    def _try_out(self, seed: int) -> None:
        """Find out with an untrained model what would else be found out after training."""
        self.progress.say("trying a batch of each loader")
        for stream in dict.fromkeys(stream_and_size(each)[0] for each in self.settings.streams):
            with streaming(self.data, seed, stream):
                dry_run(self.settings, with_priors(self.make_model()), self.data)
        self._tried = True

    def model(self, seed: int, training: Training) -> IT3Mixin:
        """Return the model of a seed and a training, which is done where it has not been."""
        models = self.models(seed)
        if training not in models:
            given = self.settings, seed, self.make_model, self.data, self.progress.say
            models[training] = further_model(training, models, *given, self.facts["training"])
        return models[training]

    def records(
        self, row: Row, seed: int, stream: str, *, batches: int | None = None
    ) -> list[Record]:
        """Return a record for each loader of the data, from the file where it has them.

        Args:
            row: which training, and what happens at test time.
            seed: of the models and of the data.
            stream: its name, with its own size of batches after a slash.
            batches: the most of each loader; ``None``: all.
        """
        if seed not in self._files:
            file = Path(self.settings.output) / self.folder / f"seed_{seed}.json"
            self._files[seed] = _Kept(file, self._fingerprint())
        scores, row = self._files[seed], row.on(stream)
        key = self._key(row, stream, batches)
        if key not in scores.records or self._kept_samples(seed, key) is None:
            self.progress.say(f"seed {seed}, {stream}: {row.training}, {row.name}")
            model = self.model(seed, row.training)
            with streaming(self.data, seed, stream):
                found = scored(self.settings, row, model, self.data, stream, batches)
            shown = found[2] if stream == self._shows else {}
            keep_samples(self._of_samples(seed, key), scores.fingerprint, found[1], shown)
            scores.add(key, found[0])
        self.progress.advance()
        return [replace(record, row=row.name) for record in scores.records[key]]

    def samples(
        self, row: Row, seed: int, stream: str, *, batches: int | None = None
    ) -> dict[str, Scores]:
        """Return the scores of single samples by shift, of a row that has been scored.

        Where the metric is no mean over samples, or a former version scored, there are none. See
        :meth:`records` for the arguments.
        """
        return self._kept_samples(seed, self._key(row.on(stream), stream, batches)) or {}

    @property
    def _shows(self) -> str | None:
        """Stream of which some samples are kept, of every seed; none where settings are chosen."""
        return self.settings.streams[0] if self.folder == "." else None

    def shown(self, row: Row, seed: int, stream: str) -> dict[str, Shown]:
        """Return a few samples by shift, of a row that has been scored, on all batches."""
        if (seed, stream) != (self.settings.seeds[0], self._shows):
            return {}
        file = self._of_samples(seed, self._key(row.on(stream), stream, None))
        return kept_shown(file, self._files[seed].fingerprint)

    def _kept_samples(self, seed: int, key: str) -> dict[str, Scores] | None:
        """Return the scores of samples; ``None`` where their file is damaged."""
        file = self._of_samples(seed, key)
        return kept_samples(file, self._files[seed].fingerprint) if file.is_file() else {}

    def _of_samples(self, seed: int, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        return Path(self.settings.output) / self.folder / "samples" / f"seed_{seed}_{name}.pt"

    def _key(self, row: Row, stream: str, batches: int | None) -> str:
        """Return what tells scores apart in the file: names are no part of it, and may change."""
        heads = [spec(h) for h in self.settings.heads if training_of(h) == row.training]
        plain = repr(replace(row, name="", published=False))
        strength = seen_by(stream, {"concentration": self.data.concentration})
        return json.dumps([plain, stream, batches, *strength.values(), *heads])

    def _fingerprint(self) -> str:
        """Return all that a score depends on besides its row and its stream."""
        parts = {
            "training": self.facts["training"],
            "data": seen_by("", self.facts["settings"]["data"]),
            "metric": self.settings.metric,
            "accelerator": self.settings.accelerator,
        }
        return json.dumps(parts, sort_keys=True)


def seen_by(stream: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of data that a stream depends on; its strength is that of one alone.

    >>> seen_by("equal/16", {"severity": 3, "concentration": 0.1})
    {'severity': 3}
    """
    own = stream.startswith("correlated")
    return {name: value for name, value in data.items() if own or name != "concentration"}


class _Kept:
    """Records of one seed by row and stream, in a file."""

    def __init__(self, file: Path, fingerprint: str) -> None:
        self._file, self.fingerprint = file, fingerprint
        self.records = kept(file, fingerprint, _records) or {}

    def add(self, key: str, records: list[Record]) -> None:
        """Keep the records of a row, and write the file."""
        self.records[key] = records
        rows = {key: [asdict(record) for record in own] for key, own in self.records.items()}
        write_json(self._file, {"fingerprint": self.fingerprint, "rows": rows})


def _records(content: dict[str, Any]) -> dict[str, list[Record]]:
    rows = content["rows"].items()
    return {key: [rebuilt(Record, saved) for saved in records] for key, records in rows}


def dry_run(settings: BenchmarkSettings, model: IT3Mixin, data: ShiftedData) -> None:
    """Test an untrained model on a batch of each loader, and look at what the loaders follow.

    Args:
        settings: of the Trainer and of the metric.
        model: fresh.
        data: with the stream and the split set that the benchmark is to be run on.

    Raises:
        ValueError: the metric is not logged, there is not one loader for each of ``test_names``, or
            loaders of data of one's own ignore the stream or the split.
    """
    model.it3_train = "off"
    trainer = settings.trainer(limit_test_batches=1)
    logged = trainer.test(model, datamodule=data, verbose=False)
    names = data.test_names
    if len(logged) != len(names):
        raise ValueError(
            f"Expected a test loader for each of {', '.join(names)}, got {len(logged)} of "
            f"{type(data).__name__}. A test_dataloader of your own has to follow shifts and "
            f"stream={data.stream!r}, or override test_names."
        )
    for found in logged:
        score_in(found, settings.metric)
    if data.stream in ("unequal", "correlated"):
        _check_followed(data, "stream", data.stream, "equal")
    if data.evaluate_on == "validation":
        _check_followed(data, "evaluate_on", "validation", "test")


def score_in(scores: Mapping[str, Any], metric: str) -> float:
    """Return the score in what a loader's ``test_step`` logged.

    Raises:
        ValueError: it is not there.

    >>> score_in({"test_acc/dataloader_idx_1": 0.5}, "test_acc")
    0.5
    """
    for key, value in scores.items():
        if key.partition("/dataloader_idx_")[0] == metric:
            return float(value)
    raise ValueError(
        f"test_step logged no {metric!r}, but {', '.join(scores)}. Set benchmark.metric "
        "to one of them."
    )


def _check_followed(data: ShiftedData, name: str, value: str, other: str) -> None:
    """Refuse data whose clean samples are the same whatever a setting says."""
    own, shifts = data.test_dataloader()[0], data.shifts
    setattr(data, name, other)
    if name == "evaluate_on":  # shifts to tune on may be other samples, with none to test on
        data.shifts = data.reporting_shifts or shifts
    try:
        ignored = _same(own, data.test_dataloader()[0])
    finally:
        setattr(data, name, value)
        data.shifts = shifts
    if ignored:
        raise ValueError(
            f"Expected other test samples with {name}={value!r} than with {name}={other!r}, got "
            f"the same of {type(data).__name__}. A test_dataloader of your own has to follow "
            f"{name}; else leave {value} out."
        )


def _same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(
        len(mine) == len(theirs) and all(map(_equal, mine, theirs))
        for mine, theirs in (
            map(tree_leaves, pair) for pair in islice(zip_longest(one, other), _LOOKED_AT)
        )
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return (type(one) is type(other) and not isinstance(one, str | int | float)) or one == other


@contextmanager
def streaming(data: ShiftedData, seed: int, stream: str) -> Iterator[None]:
    """Let the data be those of a seed and a stream within, which may have a size of batches."""
    before = data.seed, data.stream, data.eval_batch_size
    name, size = stream_and_size(stream)
    data.seed, data.stream = seed, name  # type: ignore[assignment]
    data.eval_batch_size = size or data.eval_batch_size
    try:
        yield
    finally:
        data.seed, data.stream, data.eval_batch_size = before


def see_source(
    settings: BenchmarkSettings,
    row: Row,
    callback: TestTimeCallback | None,
    model: IT3Mixin,
    data: ShiftedData,
) -> None:
    """Let a row's callback see source data, where it needs some."""
    if row.settings is not None and row.settings.needs_source:
        trainer = settings.trainer(callbacks=[callback], limit_val_batches=None)
        trainer.validate(model, datamodule=data, verbose=False)


def scored(
    settings: BenchmarkSettings,
    row: Row,
    model: IT3Mixin,
    data: ShiftedData,
    stream: str,
    batches: int | None = None,
) -> tuple[list[Record], dict[str, Scores], dict[str, Shown]]:
    """Return a record for each loader of the data, and by shift scores of its samples, and some.

    There are no scores of samples where the metric is not their mean. Images are those of the rows
    that leave the network alone.

    Args:
        settings: of the Trainer and of the metric.
        row: what happens at test time.
        model: of the row's training.
        data: clean and shifted samples, with the stream and the seed set.
        stream: what the records call it.
        batches: the most of each loader; ``None``: all.
    """
    callback = row.callback()
    callbacks = [] if callback is None else [callback]
    see_source(settings, row, callback, model, data)
    most = batches
    if row.samples is not None:
        most = min(batches or row.samples, -(-row.samples // data.eval_batch_size))
    data.setup("test")  # shifts are made before the time is taken
    trainer = settings.trainer(callbacks=callbacks, limit_test_batches=most)
    own = row.settings
    answered = own is not None and row.alone and (own.steps > 0 or own.norm_stats != "source")
    with noting(model, alone=answered) as seen:
        start = time.perf_counter()
        logged = trainer.test(model, datamodule=data, verbose=False)
        milliseconds = 1000 * (time.perf_counter() - start)
    samples_seen = sum(trainer.num_test_batches) * data.eval_batch_size  # but for the last batches
    adapts = row.settings is not None and row.settings.steps > 0
    chosen = select(model, row.settings.parameters) if adapts and row.settings else {}
    forwards, backwards = _passes(row, callback)
    records, samples, shown = [], {}, {}
    wanted = shown_shifts(data.test_names)
    for loader, (shift, found) in enumerate(zip(data.test_names, logged, strict=True)):
        score = score_in(found, settings.metric)
        if (each := seen.matching(loader, score)) is not None:
            samples[shift] = each
        if shift in wanted and (some := seen.shown.get(loader)) is not None:
            shown[shift] = some if own is None else replace(some, images=None)
        records.append(
            Record(
                row.training,
                row.name,
                stream,
                data.seed,
                shift,
                score * (100 if settings.percent else 1),
                milliseconds / max(samples_seen, 1),
                sum(p.numel() for p in chosen.values()),
                forwards,
                backwards,
                seen.calibration_error(loader),
            )
        )
    return records, samples, shown


def _passes(row: Row, callback: TestTimeCallback | None) -> tuple[float, float]:
    """Return forward and backward passes for each batch, or sample where each is by itself."""
    own = 1.0 + (row.prediction != "first")  # the step's
    if callback is None:
        return own, 0.0
    summary = callback.summary
    count = max(summary.samples if row.alone else summary.batches, 1)
    return own + summary.forwards / count, summary.backwards / count


class Progress:
    """A bar over evaluations, with a line that says what is being done.

    Args:
        evaluations: rows times streams times seeds.
    """

    def __init__(self, evaluations: int) -> None:
        self._bar = Bar(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task("starting", total=evaluations)

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
