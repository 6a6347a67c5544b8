"""Scores of many rows on all seeds and streams, each kept as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from it3_lightning.benchmark.models import models_of
from it3_lightning.benchmark.progress import Progress
from it3_lightning.benchmark.results import Record
from it3_lightning.benchmark.rows import Row
from it3_lightning.benchmark.scoring import scored
from it3_lightning.benchmark.settings import BenchmarkSettings
from it3_lightning.benchmark.training import MakeModel, Models
from it3_lightning.data import ShiftedData

Scores = dict[str, dict[str, list[float]]]
"""By row and by name of the samples, one for each seed."""


@dataclass(frozen=True)
class Search:
    """Scores rows on all seeds and streams, keeping what was scored before.

    Args:
        settings: seeds, streams, metric and Trainer.
        make_model: returns a fresh model with priors.
        data: set to what is to be scored on, but for seed and stream.
        facts: of :func:`~it3_lightning.benchmark.about.about`.
        progress: is told.
        batches: the most of each loader; ``None``: all.
    """

    settings: BenchmarkSettings
    make_model: MakeModel
    data: ShiftedData
    facts: dict[str, Any]
    progress: Progress
    batches: int | None = None

    def scores(self, rows: Sequence[Row]) -> Scores:
        """Return the scores of rows of one training."""
        found: Scores = {row.name: {} for row in rows}
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
        parts = [self.facts["training"], self.facts["settings"]["data"], self.settings.metric]
        return json.dumps(parts, sort_keys=True)

    def _name(self, record: Record) -> str:
        several = len(self.settings.streams) > 1
        return f"{record.shift}, {record.stream}" if several else record.shift


class _Kept:
    """Records of one seed by row and stream, in a file."""

    def __init__(self, file: Path, fingerprint: str) -> None:
        self._file, self._fingerprint = file, fingerprint
        content = json.loads(file.read_text()) if file.is_file() else {}
        rows = content["rows"] if content.get("fingerprint") == fingerprint else {}
        self.records = {key: [Record(**r) for r in records] for key, records in rows.items()}

    def add(self, key: str, records: list[Record]) -> None:
        """Keep the records of a row, and write the file."""
        self.records[key] = records
        self._file.parent.mkdir(parents=True, exist_ok=True)
        rows = {key: [asdict(record) for record in own] for key, own in self.records.items()}
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps({"fingerprint": self._fingerprint, "rows": rows}))
        part.replace(self._file)
