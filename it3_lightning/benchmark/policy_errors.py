"""Errors of single samples with each policy of a model, kept in files as they come."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from it3_lightning.benchmark.config import BenchmarkSettings
from it3_lightning.benchmark.kept import kept
from it3_lightning.benchmark.policy_rule import Condition, Errors, by_family
from it3_lightning.benchmark.rows import Row
from it3_lightning.benchmark.sample_scores import errors_of
from it3_lightning.benchmark.scoring import Progress, see_source, seen_by, streaming
from it3_lightning.calibration import fingerprint
from it3_lightning.data import ShiftedData
from it3_lightning.integration.isolation import patched
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.files import load_plain, write

_Scores = dict[str, Tensor]
"""Errors of the samples ``(N,)`` of each loader, by its name."""


@dataclass
class SampleErrors:
    """Predicts with each policy, and keeps the error of each sample.

    There is a file for each stream and size of batches in ``calibration`` of the output folder, so
    that a further policy costs its own passes only.

    Args:
        settings: of the Trainer.
        model: that all policies are of.
        data: with the samples to test on.
        seed: of the split, shifts and streams.
        about: settings of the data, as plain data.
        batches: the most of each loader.
        progress: is told.
    """

    settings: BenchmarkSettings
    model: IT3Mixin
    data: ShiftedData
    seed: int
    about: Mapping[str, Any]
    batches: int
    progress: Progress
    _known: dict[str, dict[str, _Scores]] = field(default_factory=dict, init=False)

    @cached_property
    def _weights(self) -> str:
        return fingerprint(self.model)

    def _depends_on(self, stream: str) -> str:
        """Return all that an error depends on besides its policy and its size of batches."""
        parts = {
            "weights": self._weights,
            "about": seen_by(stream, self.about),
            "seed": self.seed,
            "batches": self.batches,
            "accelerator": self.settings.accelerator,
            "precision": self.settings.precision,
        }
        return json.dumps(parts)

    def of(self, rows: Sequence[Row], streams: Sequence[str], sizes: Sequence[int]) -> Errors:
        """Return the errors of all rows under all conditions.

        Args:
            rows: the source, and a row for each policy.
            streams: of classes.
            sizes: of batches.
        """
        samples: dict[Condition, Any] = {}
        found: dict[str, dict[Condition, Any]] = {row.name: {} for row in rows}
        for row in rows:
            for stream in streams:
                for size in sizes:
                    for name, errors in self._scores(row, stream, size).items():
                        found[row.name][Condition(name, stream, size)] = errors.double().numpy()
                    self.progress.advance()
        for stream in streams:
            with streaming(self.data, self.seed, stream):
                orders = dict(zip(self.data.test_names, self.data.test_orders(), strict=True))
            for size in sizes:
                for name, order in orders.items():
                    own = order[: self.batches * size]
                    samples[Condition(name, stream, size)] = own.numpy()
        source = found.pop(rows[0].name)
        return by_family(Errors(samples, source, found))

    def see_source(self, row: Row) -> None:
        """Let the model keep what a row needs of source data."""
        see_source(self.settings, row, row.callback(), self.model, self.data)

    def _scores(self, row: Row, stream: str, size: int) -> _Scores:
        """Return the errors of a row in one stream, from the file where it has them."""
        file = Path(self.settings.output) / "calibration" / f"{stream}_{size}.pt"
        if file.name not in self._known:
            read = kept(file, self._depends_on(stream), lambda c: dict(c["rows"]), load_plain)
            self._known[file.name] = read or {}
        known, key = self._known[file.name], repr(replace(row, name="", published=False))
        if key not in known:
            self.progress.say(f"{stream}, batches of {size}: {row.name}")
            self.see_source(row)
            with streaming(self.data, self.seed, f"{stream}/{size}"):
                known[key] = self._scored(row)
            content = {"fingerprint": self._depends_on(stream), "rows": known}
            write(file, partial(torch.save, content))
        return known[key]

    def _scored(self, row: Row) -> _Scores:
        """Predict all samples, and return their errors."""
        callback = row.callback()
        callbacks = [] if callback is None else [callback]
        trainer = self.settings.trainer(callbacks=callbacks, limit_predict_batches=self.batches)
        model, prior = self.model, self.model.it3_parts()[0]

        def step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            outputs = model.it3_forward(model.it3_inputs(batch))
            return errors_of(prior, outputs, model.it3_target(batch)).float()

        with patched(model, predict_step=step):
            parts: Any = trainer.predict(model, datamodule=self.data)
        return {n: torch.cat(own) for n, own in zip(self.data.test_names, parts, strict=True)}
