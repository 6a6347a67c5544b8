"""The callback's gate: measures validation samples, and says which distance is unusual."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from it3_lightning.calibration import (
    calibration_of,
    check_level,
    fingerprint,
    gate_of,
    measured_by,
)
from it3_lightning.callbacks.checks import check_strategy
from it3_lightning.engine import Settings
from it3_lightning.integration.batches import normal
from it3_lightning.integration.module import checked_module
from it3_lightning.integration.module_adapter import adapter_of


class Gate:
    """Tells usual samples from others, by quantiles of the distance on validation samples.

    Args:
        level: share of the validation samples within the gate.
        settings: of the adaptation.

    Raises:
        ValueError: the level is no share, or the method goes with no gate.
    """

    def __init__(self, level: float, settings: Settings) -> None:
        check_level(level)
        replace(settings, gate=0.0)  # refuses what goes with no gate
        self.level = level
        self._settings = settings
        self._measuring: _Measurement | None = None

    def settings_for(self, module: LightningModule) -> Settings:
        """Return the settings with the distance that the module's calibration gives the gate.

        Raises:
            MisconfigurationException: it gives none.
        """
        return replace(self._settings, gate=gate_of(module, self._settings, self.level))

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what cannot be calibrated.

        Raises:
            MisconfigurationException: the weights are sharded, or the module keeps no calibration.
        """
        check_strategy(trainer)
        calibration_of(module)

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin to measure; not in sanity checks."""
        if not trainer.sanity_checking:
            self._measuring = _Measurement(module, self._settings)

    def measure(self, trainer: Trainer, batch: Any) -> None:
        """Measure the distances of a validation batch."""
        if self._measuring is not None:
            with trainer.precision_plugin.forward_context():
                self._measuring.add(batch)

    def finish(self, trainer: Trainer) -> None:
        """Keep the quantiles of these distances in the module."""
        if self._measuring is not None:
            self._measuring.keep(trainer)
        self._measuring = None

    def cancel(self) -> None:
        """Forget what was measured so far."""
        self._measuring = None


class _Measurement:
    """Distances of validation batches.

    Args:
        module: predicts with a prior, and has a calibration.
        settings: of the adaptation whose gate this is for.

    Raises:
        MisconfigurationException: the module lacks what is needed.
    """

    def __init__(self, module: LightningModule, settings: Settings) -> None:
        self._calibration = calibration_of(module)
        self._module = module
        self._host = checked_module(module)
        self._by = measured_by(settings.objective, settings.norm_stats)
        company = settings.scope == "batch" and self._host.it3_prior.context is not None
        still = replace(
            settings,  # alone, a bad sample spoils no other
            scope="batch" if settings.needs_batch or company else "sample",
            reset="batch",
            compile=False,
            steps=0,
            gate=None,
            measure=True,
        )
        self._adapter = adapter_of(module, self._host, still, silent=True)
        self._distances: list[Tensor] = []
        self._weights = ""

    def add(self, batch: Any) -> None:
        """Measure a batch."""
        self._weights = self._weights or fingerprint(self._module)  # once callbacks swapped theirs
        with self._adapter.adapted(normal(self._host.it3_inputs(batch))) as adaptation:
            if adaptation.distance_source is not None:
                self._distances.append(adaptation.distance_source)

    def keep(self, trainer: Trainer) -> None:
        """Keep the quantiles, over the samples of all processes."""
        with torch.inference_mode(False), torch.no_grad():
            home = self._module.device
            none = torch.empty(0, device=home)
            distances = torch.cat([none, *(d.float().to(home) for d in self._distances)])
            if trainer.world_size > 1:
                distances = _gathered(distances, trainer)
            self._calibration.take(distances, by=self._by, weights=self._weights)
        if not self._calibration.by:
            rank_zero_warn("The gate is not calibrated: no validation sample could be measured.")


def _gathered(distances: Tensor, trainer: Trainer) -> Tensor:
    """Return those of all processes, which may have different numbers; filled up with NaN."""
    sizes = trainer.strategy.all_gather(torch.tensor(len(distances), device=distances.device))
    filled = distances.new_full((int(sizes.max()),), float("nan"))
    filled[: len(distances)] = distances
    return trainer.strategy.all_gather(filled).flatten()
