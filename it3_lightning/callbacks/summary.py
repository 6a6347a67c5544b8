"""What adaptation did over a run: samples, skips and why, distances, time. Kept by the callback."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from it3_lightning.engine import Adaptation, Settings
from it3_lightning.integration.module_adapter import Adapter

_ROSE = 1.05  # times what a distance was: more is no rounding


@dataclass
class Summary:
    """Running totals over the batches of a run.

    Attributes:
        samples: samples seen.
        skipped: of them, those that got the source prediction.
        reasons: how many samples were skipped for which reason.
        moved: samples that moved the weights.
        milliseconds: time of the steps: adaptation, measuring, choice of the backend, the module's
            own step, and taking note and logging of all that.
        batches: seen.
        forwards: forward passes for adapting and measuring, views and iterates one by one; in scope
            ``"sample"`` those of each sample.
        backwards: the same of backward passes.
        distance_source: mean distance of the source weights, over the samples measured.
        distance_adapted: the same of the adapted weights.
        gated: samples whose distance lay within the gate.
        backend: of scope ``"sample"``, and why it was taken; as of the last batch.
        distances: for each dataloader, in order, the distances ``(N,)`` of its samples with the
            source weights, on the CPU; NaN where they were not measured. With
            :class:`~it3_lightning.Idempotence` a score of how unlike the training data a sample is:
            the larger, the more (Durasov et al., ZigZag, TMLR 2024). Of this process's samples.
        policy: which of ``it3 calibrate`` was followed, by its name; empty where settings say how
            to adapt, or nobody chose.
        latest: the adaptation to the last batch, without its weights and answers.

    >>> from it3_lightning.engine import Settings, adapt
    >>> def forward(x, prior):  # the second prediction is always 0
    ...     return x if prior is None else 0 * x
    >>> x, summary = torch.tensor([[1.0], [2.0]]), Summary()
    >>> settings, given = Settings(steps=0), {"forward": forward, "to_label": lambda y: y}
    >>> summary.add(adapt(torch.nn.Linear(1, 1), x, settings=settings, **given))
    >>> summary.distances
    [tensor([1., 4.])]
    """

    samples: int = 0
    skipped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    gated: int = 0
    backend: str = ""
    milliseconds: float = 0.0
    batches: int = 0
    forwards: int = 0
    backwards: int = 0
    policy: str = ""
    latest: Adaptation | None = field(default=None, repr=False)
    _source: tuple[float, int] = (0.0, 0)
    _adapted: tuple[float, int] = (0.0, 0)
    _distances: list[list[Tensor]] = field(default_factory=list)

    def add(self, adaptation: Adaptation, loader: int = 0, seconds: float | None = None) -> None:
        """Take one batch into account.

        Args:
            adaptation: to the batch.
            loader: which dataloader it comes from.
            seconds: that all of it took; default: the adaptation alone.
        """
        self.latest = replace(adaptation, weights={}, answers=None)
        size = adaptation.skipped.numel()
        self.samples += size
        self.milliseconds += 1000 * (adaptation.seconds if seconds is None else seconds)
        self.batches += 1
        self.forwards += adaptation.forwards
        self.backwards += adaptation.backwards
        skipped = int(adaptation.skipped.sum())
        self.skipped += skipped
        if adaptation.reason is not None:
            self.reasons[adaptation.reason] += skipped
        if adaptation.gated is not None:
            self.gated += int(adaptation.gated.sum())
        if adaptation.reliable is not None:
            self.moved += int(adaptation.reliable.sum())
        self._source = _added(self._source, adaptation.distance_source)
        self._adapted = _added(self._adapted, adaptation.distance_adapted)
        self._distances += [[] for _ in range(loader + 1 - len(self._distances))]
        _keep(self._distances[loader], _known(adaptation))

    @property
    def distances(self) -> list[Tensor]:
        """Distances ``(N,)`` with the source weights, for each dataloader."""
        return [torch.cat([torch.empty(0), *parts]) for parts in self._distances]

    @property
    def distance_source(self) -> float:
        """Mean distance of the source weights; NaN where none was measured."""
        return _mean(self._source)

    @property
    def distance_adapted(self) -> float:
        """Mean distance of the adapted weights; NaN where none was measured."""
        return _mean(self._adapted)

    @property
    def ms_per_sample(self) -> float:
        """Milliseconds per sample."""
        return self.milliseconds / max(self.samples, 1)

    def __str__(self) -> str:
        reasons = "".join(f", {count} for {reason}" for reason, count in self.reasons.items())
        policy = f"calibrated policy {self.policy!r}: " if self.policy else ""
        rose = self.distance_adapted > _ROSE * self.distance_source
        return (
            f"{policy}{self.samples} samples, {self.moved} moved the weights, "
            f"{f'{self.gated} within the gate, ' * (self.gated > 0)}{self.skipped} skipped"
            f"{reasons}; distance {self.distance_source:.4g} -> {self.distance_adapted:.4g}"
            f"{' (it rose: take a smaller lr, or fewer steps)' * rose}; "
            f"{self.ms_per_sample:.3g} ms a sample"
        )


def _added(total: tuple[float, int], values: Tensor | None) -> tuple[float, int]:
    if values is None:
        return total
    known = values[~values.isnan()]
    return total[0] + float(known.double().sum()), total[1] + known.numel()


def _known(adaptation: Adaptation) -> Tensor:
    """Return the source distances ``(B,)`` of a batch, on the CPU; NaN where they are not known."""
    distances = adaptation.distance_source
    if distances is None:
        return torch.full(adaptation.skipped.shape, float("nan"))
    return distances.detach().cpu()


def _keep(parts: list[Tensor], values: Tensor) -> None:
    """Add values to those kept: a tensor a batch would soon be more than what they hold.

    Each part is longer than all after it, so that there are few, and each value is copied seldom.
    """
    parts.append(values)
    while len(parts) > 1 and len(parts[-2]) <= len(parts[-1]):
        parts[-2:] = [torch.cat(parts[-2:])]


def _mean(total: tuple[float, int]) -> float:
    return total[0] / total[1] if total[1] else float("nan")


@dataclass
class Recorder:
    """Takes note of the adaptation to each batch, and of the time: its own and its logs' as well.

    Args:
        module: whose step runs; logs.
        summary: of the run.
        settings: of the adaptation.
        adapter: what adapts; says which backend it took.
        logs: whether the stage has logs: ``predict`` has none.
    """

    module: LightningModule
    summary: Summary
    settings: Settings
    adapter: Adapter
    logs: bool
    _late: float = field(default=0.0, init=False)  # seconds that logging the last time has taken

    def __call__(self, adaptation: Adaptation, loader: int, started: float) -> None:
        """Add an adaptation to the summary, and log it.

        Args:
            adaptation: to a batch.
            loader: which dataloader the batch comes from.
            started: when the step of the batch did, by ``time.perf_counter``.
        """
        if adaptation.reason is not None and adaptation.reason not in self.summary.reasons:
            what = "a batch" if self.settings.scope == "batch" else "a sample"
            rank_zero_warn(f"IT3 keeps the source prediction of {what}: {adaptation.reason}.")
        selection = getattr(self.adapter, "backend_selection", None)
        if selection is not None:
            if not self.summary.backend:
                rank_zero_info(f"IT3 takes {selection}")
            self.summary.backend = str(selection)
        self.summary.add(adaptation, loader, 0.0)
        if self.logs:
            self._log(adaptation)
        now = time.perf_counter()
        milliseconds = 1000 * (now - started + self._late)
        self.summary.milliseconds += milliseconds
        if self.logs:
            self._log_mean("ms_per_sample", milliseconds, adaptation)
        self._late = time.perf_counter() - now

    def _log_mean(self, name: str, total: float | Tensor, adaptation: Adaptation) -> None:
        """Log a mean over samples, given their sum in a batch."""
        size, ranks = adaptation.skipped.numel(), self.module.trainer.world_size
        given: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": ranks > 1}
        self.module.log(f"it3/{name}", total / max(size, 1), batch_size=size * ranks, **given)

    def _log(self, adaptation: Adaptation) -> None:
        """Log means over samples, and the number of skipped ones.

        Every process logs the same keys at every batch, or reducing them over processes would wait
        for ever: a distance that is not known counts with weight 0. Lightning rounds the mean of
        the processes' weights down, so they are multiples of the number of processes.
        """
        ranks = self.module.trainer.world_size
        log = partial(self.module.log, on_step=False, on_epoch=True, sync_dist=ranks > 1)
        distances = {
            "source": adaptation.distance_source,
            "adapted": adaptation.distance_adapted,
        }
        for name, values in distances.items() if self.settings.measure else ():
            known = None if values is None else values[~values.isnan()]
            count = 0 if known is None else known.numel()
            mean = 0.0 if known is None or count == 0 else known.sum() / count
            log(f"it3/distance_{name}", mean, batch_size=count * ranks)
        counted = adaptation.reliable
        moved = 0.0 if counted is None else counted.float().sum()
        self._log_mean("moved", moved, adaptation)
        gated = adaptation.gated
        if self.settings.gate is not None or gated is not None:
            self._log_mean("gated", 0.0 if gated is None else gated.float().sum(), adaptation)
        skipped, weight = float(adaptation.skipped.sum()), adaptation.skipped.numel() * ranks
        log("it3/skipped", skipped, reduce_fx="sum", batch_size=weight)
