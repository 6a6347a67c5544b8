"""Measures the distances of validation samples, batch after batch, for the gate."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from it3_lightning.calibration import Calibration, calibration_of
from it3_lightning.engine import BatchAdapter, SampleAdapter
from it3_lightning.host import normal
from it3_lightning.protocols import IT3Module

Adapter = BatchAdapter | SampleAdapter


class Calibrating:
    """Collects the distances of validation batches.

    Args:
        module: with a calibration.
        host: the same, as what predicts with a prior.
        adapter: measures, without a step.
        by: what it measures by.
    """

    def __init__(self, module: LightningModule, host: IT3Module, adapter: Adapter, by: str) -> None:
        self._calibration = calibration_of(module)
        self._host = host
        self._adapter = adapter
        self._by = by
        self._distances: list[Tensor] = []

    def add(self, batch: Any) -> None:
        """Measure a batch."""
        with self._adapter.adapted(normal(self._host.it3_inputs(batch))) as adaptation:
            if adaptation.distance_source is not None:
                self._distances.append(adaptation.distance_source.float())

    def finish(self, trainer: Trainer) -> None:
        """Keep the quantiles, over all processes."""
        if not self._distances:
            return
        with torch.inference_mode(False), torch.no_grad():
            distances = torch.cat(self._distances).clone()
            if trainer.world_size > 1:  # every process has as many samples, give or take one
                own = Calibration().to(distances.device)
                own.take(distances, by=self._by)
                gathered = trainer.strategy.all_gather(own.quantiles)
                distances = gathered.flatten()
            self._calibration.take(distances, by=self._by)
