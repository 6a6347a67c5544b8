"""What is said of adaptations while a run goes on: logged values, and a warning per reason."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from it3_lightning.adapters import Adapter
from it3_lightning.engine import Adaptation, Settings
from it3_lightning.summary import Summary


@dataclass(frozen=True)
class Recorder:
    """Takes note of the adaptation to each batch.

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

    def __call__(self, adaptation: Adaptation, loader: int = 0) -> None:
        """Add an adaptation to the summary, and log it.

        Args:
            adaptation: to a batch.
            loader: which dataloader the batch comes from.
        """
        if adaptation.reason is not None and adaptation.reason not in self.summary.reasons:
            what = "a batch" if self.settings.scope == "batch" else "a sample"
            rank_zero_warn(f"IT3 keeps the source prediction of {what}: {adaptation.reason}.")
        choice = getattr(self.adapter, "choice", None)
        if choice is not None:
            if not self.summary.backend:
                rank_zero_info(f"IT3 takes {choice}")
            self.summary.backend = str(choice)
        self.summary.add(adaptation, loader)
        if self.logs:
            self._log(adaptation)

    def _log(self, adaptation: Adaptation) -> None:
        """Log means over samples, and the number of skipped ones.

        Every process logs the same keys at every batch, or reducing them over processes would wait
        for ever: a distance that is not known counts with weight 0. Lightning rounds the mean of
        the processes' weights down, so they are multiples of the number of processes.
        """
        size, ranks = adaptation.skipped.numel(), self.module.trainer.world_size
        weight, least = size * ranks, max(size, 1)
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
        reliable = adaptation.reliable
        moved = 0.0 if reliable is None else reliable.float().sum() / least
        log("it3/reliable", moved, batch_size=weight)
        if self.settings.gate is not None:
            gated = adaptation.gated
            within = 0.0 if gated is None else gated.float().sum() / least
            log("it3/gated", within, batch_size=weight)
        log("it3/skipped", float(adaptation.skipped.sum()), reduce_fx="sum", batch_size=weight)
        log("it3/ms_per_sample", 1000 * adaptation.seconds / least, batch_size=weight)
