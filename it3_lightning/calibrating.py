"""Measures the distances of validation samples, batch after batch, for the gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from it3_lightning.adapters import adapter_of
from it3_lightning.calibration import calibration_of, measured_by
from it3_lightning.engine import Settings
from it3_lightning.engine.settings import Scope
from it3_lightning.host import checked_module, normal


class Calibrating:
    """Collects the distances of validation batches, then keeps their quantiles in the module.

    Args:
        module: predicts with a prior, and has a calibration.
        settings: of the adaptation whose gate this is for.

    Raises:
        MisconfigurationException: the module lacks what is needed.
    """

    def __init__(self, module: LightningModule, settings: Settings) -> None:
        self._calibration = calibration_of(module)
        self._host = checked_module(module)
        self._by = measured_by(settings.objective, settings.norm_stats)
        scope: Scope = "batch" if settings.needs_batch else "sample"  # a bad one spoils no other
        still = replace(
            settings, scope=scope, reset="batch", compile=False, steps=0, gate=None, measure=True
        )
        self._adapter = adapter_of(module, self._host, still, silent=True)
        self._distances: list[Tensor] = []

    def add(self, batch: Any) -> None:
        """Measure a batch."""
        with self._adapter.adapted(normal(self._host.it3_inputs(batch))) as adaptation:
            if adaptation.distance_source is not None:
                self._distances.append(adaptation.distance_source)

    def finish(self, trainer: Trainer) -> None:
        """Keep the quantiles, over the samples of all processes."""
        with torch.inference_mode(False), torch.no_grad():
            home = self._calibration.quantiles.device
            none = torch.empty(0, device=home)
            distances = torch.cat([none, *(d.float().to(home) for d in self._distances)])
            if trainer.world_size > 1:
                distances = _gathered(distances, trainer)
            self._calibration.take(distances, by=self._by)
        if not self._calibration.by:
            rank_zero_warn("The gate is not calibrated: no validation sample could be measured.")


def _gathered(distances: Tensor, trainer: Trainer) -> Tensor:
    """Return those of all processes, which may have different numbers; filled up with NaN."""
    sizes = trainer.strategy.all_gather(torch.tensor(len(distances), device=distances.device))
    filled = distances.new_full((int(sizes.max()),), float("nan"))
    filled[: len(distances)] = distances
    return trainer.strategy.all_gather(filled).flatten()
