"""Errors of single samples with each policy of a model, kept in files as they come."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.benchmark.config import BenchmarkSettings
from it3_lightning.benchmark.kept import kept
from it3_lightning.benchmark.policy_rule import Condition, Errors
from it3_lightning.benchmark.rows import Row
from it3_lightning.benchmark.scoring import Progress, see_source, streaming
from it3_lightning.calibration import fingerprint
from it3_lightning.data import ShiftedData
from it3_lightning.data.shifts import parted
from it3_lightning.integration.isolation import patched
from it3_lightning.priors import ClassPrior, LabelsPrior, MaskPrior, Prior, ValuePrior
from it3_lightning.priors.classes import both
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
        about: plain data, what else the samples depend on.
        batches: the most of each loader.
        progress: is told.
    """

    settings: BenchmarkSettings
    model: IT3Mixin
    data: ShiftedData
    seed: int
    about: Any
    batches: int
    progress: Progress
    _known: dict[str, dict[str, _Scores]] = field(default_factory=dict, init=False)

    @cached_property
    def _depends_on(self) -> str:
        """All that an error depends on besides its policy, its stream and its size of batches."""
        parts = {
            "weights": fingerprint(self.model),
            "about": self.about,
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
            read = kept(file, self._depends_on, lambda c: dict(c["rows"]), load_plain)
            self._known[file.name] = read or {}
        known, key = self._known[file.name], repr(replace(row, name="", published=False))
        if key not in known:
            self.progress.say(f"{stream}, batches of {size}: {row.name}")
            self.see_source(row)
            with streaming(self.data, self.seed, f"{stream}/{size}"):
                known[key] = self._scored(row)
            content = {"fingerprint": self._depends_on, "rows": known}
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


def errors_of(prior: Prior, outputs: Tensor, target: Any) -> Tensor:
    """Return the error of each sample, ``(B,)``; the smaller, the better.

    Of a class 0 or 100 percent, of several (tokens, independent labels) the share that is wrong; of
    masks 100 minus the intersection over union of the image, in percent, see :func:`overlaps`; of
    values the absolute error, mean over them. What the loss ignores is left out.

    Args:
        prior: knows what outputs and targets mean.
        outputs: of the network, ``(B, ...)``.
        target: of the batch.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> errors_of(ClassPrior(2), logits, torch.tensor([0, 1])).tolist()
    [0.0, 100.0]
    """
    found, true = prior.from_output(outputs).detach(), prior.from_target(target)
    if isinstance(prior, MaskPrior):
        return 100.0 * (1 - overlaps(found, true))
    if isinstance(prior, ClassPrior | LabelsPrior):
        most = true.amax(1, keepdim=True)
        wrong = true.gather(1, found.argmax(1, keepdim=True)) < most
        return _mean_where(100.0 * wrong.float(), most > true.amin(1, keepdim=True))
    errors, known = (found - true).abs(), prior.known(target)
    if isinstance(prior, ValuePrior):
        errors = errors * prior.std.to(errors).reshape(-1, *[1] * (errors.ndim - 2))
    counted = torch.ones_like(errors, dtype=torch.bool)
    return _mean_where(errors, counted if known is None else counted & known.unsqueeze(1))


def _mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of each sample's values that count, ``(B, ...) -> (B,)``; of none 0."""
    total = torch.where(counted, values, 0.0).flatten(1).sum(1)
    return total / counted.flatten(1).sum(1).clamp_min(1)


def overlaps(found: Tensor, true: Tensor) -> Tensor:
    """Return the intersection over union of each image, mean over the classes in it, ``(B,)``.

    Of two classes, or of one map, that of the foreground alone; 1 where there is none, and none is
    found. Pixels of no class, which the loss ignores, are left out.

    Args:
        found: probabilities ``(B, C, H, W)``.
        true: of the same shape.

    >>> overlaps(torch.tensor([[[[0.9, 0.9, 0.1]]]]), torch.tensor([[[[1.0, 0.0, 0.0]]]])).tolist()
    [0.5]
    """
    if found.shape[1] == 1:
        found, true = both(found), both(true)
    classes, told = found.shape[1], true.amax(1, keepdim=True) > true.amin(1, keepdim=True)
    one, other = (
        F.one_hot(maps.argmax(1), classes).movedim(-1, 1).bool() & told for maps in (found, true)
    )
    first = 1 if classes == 2 else 0
    met = (one & other)[:, first:].flatten(2).sum(2)
    joint = (one | other)[:, first:].flatten(2).sum(2)
    shares = torch.where(joint > 0, met / joint.clamp_min(1), 0.0)
    there = (joint > 0).sum(1)
    return torch.where(there > 0, shares.sum(1) / there.clamp_min(1), 1.0)


def unit_of(prior: Prior) -> str:
    """Return what the errors of samples are, in words."""
    if isinstance(prior, ClassPrior | LabelsPrior):
        return "error, percent"
    return "100 - IoU, percent" if isinstance(prior, MaskPrior) else "absolute error"


def by_family(errors: Errors) -> Errors:
    """Return errors whose conditions name families of shifts: all severities of one together."""

    def joined(own: Mapping[Condition, Any]) -> dict[Condition, Any]:
        groups: dict[Condition, list[Any]] = {}
        for condition, values in own.items():
            family = replace(condition, shift=parted(condition.shift)[0])
            groups.setdefault(family, []).append(values)
        return {family: np.concatenate(parts) for family, parts in groups.items()}

    policies = {name: joined(own) for name, own in errors.policies.items()}
    return Errors(joined(errors.samples), joined(errors.source), policies)
