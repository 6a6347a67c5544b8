"""Benchmark loop: trains, scores every row seed by seed, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

from it3_lightning.benchmark.config import BenchmarkSettings
from it3_lightning.benchmark.distance_lines import Distances
from it3_lightning.benchmark.distances import keep_distances, kept_distances
from it3_lightning.benchmark.kept import check_folder
from it3_lightning.benchmark.models import MakeModel, about, with_priors
from it3_lightning.benchmark.peers import Facts, peers
from it3_lightning.benchmark.results import Record, Results
from it3_lightning.benchmark.rows import (
    PERTURBED,
    Kind,
    Row,
    asked_for,
    control_rows,
    control_trainings,
    rows_for,
)
from it3_lightning.benchmark.scoring import Progress, Scoring, quiet, seen_by, streaming, threads
from it3_lightning.benchmark.tune import at_chosen_rates
from it3_lightning.data import ShiftedData
from it3_lightning.training.mixin import IT3Mixin

_MEASURED_BY = (
    *("epochs", "posthoc_epochs", "ckpt_path", "pretrained", "joint", "posthoc"),
    *("recipe", "distance_samples", "accelerator", "precision"),
)  # what distances depend on


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
            facts = about(self, probe, data, configuration)
            check_folder(Path(self.output), facts["training"])
            rows = rows_for(self.recipe, kind)
            controls = control_trainings(self, kind)
            if self.controls:
                rows += control_rows(self.recipe, kind, controls)
            others = self._peers(probe, kind, data, again=PERTURBED in controls)
            rows = asked_for(_with(rows, others), self.rows, others)
            moving = [r for r in rows if r.published and r.settings and r.settings.steps]
            moving = [row for row in moving if row.training != PERTURBED]
            results = Results(
                self.metric,
                rows,
                about={**facts, "made": _made(self.accelerator)},
                higher_is_better=self.higher_is_better,
                decimals=self.decimals,
                baseline_errors=self._baseline_errors(data),
                percent=self.percent,
            )
            with Progress(self._evaluations(rows, moving)) as progress:
                scoring = Scoring(self, make_model, data, facts, progress)
                if self.rates and moving:
                    rows += at_chosen_rates(moving, probe, scoring)
                trainings = list(dict.fromkeys(row.training for row in rows))
                rows.sort(key=lambda row: trainings.index(row.training))
                for seed in self.seeds:
                    for row, stream in self._pairs(rows):
                        most = self.batches if "/" in stream else None
                        results.records += scoring.records(row, seed, stream, batches=most)
                        found = scoring.samples(row, seed, stream, batches=most)
                        names = row.training, row.name, stream, seed
                        results.samples |= {(*names, shift): s for shift, s in found.items()}
                        some = {} if most else scoring.shown(row, seed, stream)
                        results.shown |= {(*names, shift): s for shift, s in some.items()}
                    told, distances = self._distances(seed, rows, scoring)
                    results.separations += told
                    results.distances += distances
        results.save(Path(self.output))
        return results

    def _peers(self, model: IT3Mixin, kind: Kind, data: ShiftedData, *, again: bool) -> list[Row]:
        """Return the rows of methods from the literature; ``again``: on perturbed inputs too."""
        if not self.methods:
            return []
        batch = next(iter(data.val_dataloader()))
        facts = Facts.of(model, kind, model.it3_inputs(batch))
        rows = peers(self.methods, facts, self.heads, self.alone)
        ordinary = [r for r in rows if r.training == "ordinary" and r.samples is None]
        return rows + [replace(row, training=PERTURBED) for row in ordinary if again]

    def _pairs(self, rows: Sequence[Row]) -> list[tuple[Row, str]]:
        """Return what is scored."""
        return [(row, stream) for stream in self.streams for row in rows if row.goes_with(stream)]

    def _evaluations(self, rows: Sequence[Row], moving: Sequence[Row]) -> int:
        """Return how many there are, those of choosing rates and at chosen rates among them."""
        if not self.rates:
            return len(self.seeds) * len(self._pairs(rows))
        tuned = len(self.seeds) * len(self._pairs([*rows, *moving]))
        return tuned + len(moving) * (1 + len(self.rates))

    def _baseline_errors(self, data: ShiftedData) -> dict[str, float] | None:
        """Return the errors that those of an accuracy in per cent are compared with, if any."""
        if data.baseline_errors is None or not (self.percent and self.higher_is_better):
            return None
        return dict(data.baseline_errors)

    def _distances(
        self, seed: int, rows: Sequence[Row], scoring: Scoring
    ) -> tuple[list[Record], list[Distances]]:
        """Return separations and distances of a seed, from their file where it fits.

        They are measured last: what fails there costs no scores.
        """
        settings = scoring.facts["settings"]
        own = {name: settings["benchmark"][name] for name in _MEASURED_BY}
        data = seen_by(self.streams[0], settings["data"])
        facts = {**settings, "data": data, "benchmark": {**own, "stream": self.streams[0]}}
        fingerprint = json.dumps(facts, sort_keys=True)
        found = kept_distances(Path(self.output), seed, fingerprint)
        if found is not None:
            return found
        scoring.progress.say(f"seed {seed}: distances")
        with streaming(scoring.data, seed, self.streams[0]):
            return keep_distances(self, scoring.models(seed), rows, scoring.data, fingerprint)


def _made(accelerator: str) -> dict[str, str]:
    """Return when and on what a benchmark was made."""
    hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        hardware = f"{names[0].partition(': ')[2]}, {os.cpu_count()} cores" if names else hardware
    if accelerator != "cpu" and torch.cuda.is_available():
        hardware = f"{torch.cuda.get_device_name()}; {hardware}"
    return {"date": f"{datetime.now():%Y-%m-%d %H:%M}", "hardware": hardware}


def _with(rows: list[Row], others: list[Row]) -> list[Row]:
    """Return rows and others, in the place of those of the same name and training."""
    taken = {(row.training, row.name) for row in others}
    return [row for row in rows if (row.training, row.name) not in taken] + others
