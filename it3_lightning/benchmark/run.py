"""Runs a benchmark seed by seed: trains, scores every row, and goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from it3_lightning.benchmark.about import about
from it3_lightning.benchmark.distances import distances_file, keep_distances, kept_distances
from it3_lightning.benchmark.kind import Kind
from it3_lightning.benchmark.models import models_of
from it3_lightning.benchmark.progress import Progress, quiet, threads
from it3_lightning.benchmark.results import Record, Results
from it3_lightning.benchmark.rows import Row, rows_for
from it3_lightning.benchmark.scoring import scored
from it3_lightning.benchmark.separation import separations
from it3_lightning.benchmark.settings import BenchmarkSettings
from it3_lightning.benchmark.training import MakeModel, Models, with_priors
from it3_lightning.data import ShiftedData
from it3_lightning.methods import Idempotence

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
        """
        with quiet(), threads(self.threads):
            probe = with_priors(make_model())
            kind = Kind.of(probe)
            kind.check(self.recipe.distance)
            rows = [r for r in rows_for(self.recipe, kind) if r.main or self.rows == "all"]
            results = Results(
                self.metric,
                rows,
                about=about(self, probe, data, configuration),
                higher_is_better=self.higher_is_better,
                decimals=self.decimals,
                baseline_errors=self._baseline_errors(data),
            )
            with Progress(len(self.seeds), len(rows) * len(self.streams)) as progress:
                for seed in self.seeds:
                    scores = self._seed(seed, rows, make_model, data, progress, results.about)
                    results.records += scores[0]
                    results.separations += scores[1]
        results.distances = kept_distances(Path(self.output), self.seeds)
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
    ) -> tuple[list[Record], list[Record]]:
        """Return scores and separations of one seed, from its file where that fits the settings.

        The distances have a file of their own, written last: what fails there costs no scores.
        """
        file = Path(self.output) / f"seed_{seed}.json"
        fingerprint = json.dumps(about["settings"], sort_keys=True)
        kept = json.loads(file.read_text()) if file.is_file() else {}
        distances = distances_file(Path(self.output), seed)
        known = kept.get("fingerprint") == fingerprint
        if known:
            progress.skip(f"seed {seed}: from {file}", len(rows) * len(self.streams))
            if distances.is_file():
                return _read(kept)
        models = models_of(self, seed, make_model, data, progress.say, about["training"])
        if not known:
            distances.unlink(missing_ok=True)
            found = self._scores(seed, rows, models, data, progress)
            content = {k: [asdict(r) for r in v] for k, v in zip(_KEPT, found, strict=True)}
            kept = {"fingerprint": fingerprint, **content}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(kept))
        progress.say(f"seed {seed}: distances")
        data.stream = self.streams[0]  # type: ignore[assignment]
        keep_distances(self, models, rows, data)
        return _read(kept)

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


def _read(kept: dict[str, Any]) -> tuple[list[Record], list[Record]]:
    first, second = ([Record(**r) for r in kept.get(k, ())] for k in _KEPT)
    return first, second
