"""What a method must know of source data: measured on validation batches, kept with the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from it3_lightning.calibration import Calibration, fingerprint, measured_by
from it3_lightning.callbacks.checks import check_strategy
from it3_lightning.engine import BatchAdapter, Settings
from it3_lightning.integration.batches import normal
from it3_lightning.integration.module import IT3Module
from it3_lightning.integration.module_adapter import adapter_of

_KEPT = "it3_source"  # in a checkpoint: by what the methods are


class SourceData:
    """Shows a method the validation batches of ``fit`` and ``validate``, and keeps what it took.

    It is kept as plain data, with a fingerprint of the weights: in the module's calibration, which
    ``IT3Mixin`` puts into checkpoints, and in the callback, which puts it into those of a fit.

    Args:
        settings: of the adaptation.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._method = settings.method
        self._by = measured_by(settings.objective, settings.norm_stats)
        self._adapter: BatchAdapter | None = None
        self._host: IT3Module | None = None
        self.kept: dict[str, Any] = {}

    def start(self, trainer: Trainer, module: LightningModule, host: IT3Module) -> None:
        """Begin anew with the batches of a validation; not with those of a sanity check.

        Raises:
            MisconfigurationException: several processes would each see a part of the data.
        """
        if trainer.sanity_checking:
            return
        check_strategy(trainer)
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"{type(self._method).__name__} must see all source data in one process, and this "
                f"Trainer has {trainer.world_size}. Run Trainer(devices=1, callbacks=[...])"
                ".validate(model, loader) once, before you test."
            )
        self._method.load_source_dict({})
        still = replace(self._settings, scope="batch", reset="batch", gate=None, compile=False)
        adapter = adapter_of(module, host, still, silent=True)
        assert isinstance(adapter, BatchAdapter)
        self._adapter, self._host, self._module = adapter, host, module
        self._weights = ""

    def add(self, trainer: Trainer, batch: Any) -> None:
        """Show the method a validation batch."""
        if self._adapter is not None and self._host is not None:
            self._weights = self._weights or fingerprint(self._module)
            with trainer.precision_plugin.forward_context():
                self._adapter.fit_source(normal(self._host.it3_inputs(batch)))

    def finish(self) -> None:
        """Keep what the method took."""
        if self._adapter is None:
            return
        with torch.inference_mode(False):
            source = self._method.source_dict()
        self.kept = {"by": self._by, "weights": self._weights, "source": source}
        calibration = getattr(self._module, "it3_calibration", None)
        if isinstance(calibration, Calibration):
            calibration.source = self.kept
        self.cancel()

    def cancel(self) -> None:
        """See no more batches."""
        self._adapter = self._host = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put what is kept into a checkpoint, of a module that has no calibration too."""
        if self.kept:
            checkpoint.setdefault(_KEPT, {})[self._by] = self.kept

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take from a checkpoint what is kept there."""
        self.kept = checkpoint.get(_KEPT, {}).get(self._by, {})

    def load(self, module: LightningModule) -> None:
        """Give the method what was kept of source data, with these weights.

        Raises:
            MisconfigurationException: nothing was, or by another method, or with other weights.
        """
        calibration = getattr(module, "it3_calibration", None)
        own = calibration.source if isinstance(calibration, Calibration) else {}
        fitting = [kept for kept in (own, self.kept) if kept.get("by") == self._by]
        here = [kept for kept in fitting if kept["weights"] == fingerprint(module)]
        if not here:
            why = "with other weights" if fitting else "nothing yet"
            raise MisconfigurationException(
                f"{type(self._method).__name__} must have seen source data, and has seen {why}. "
                "Run Trainer(callbacks=[this callback]).validate(model, loader) on a few clean "
                "batches before you test, or have the callback in trainer.fit."
            )
        self._method.load_source_dict(here[0]["source"])
