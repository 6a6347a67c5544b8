"""A guest with a gate, which it calibrates while the Trainer validates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from it3_lightning.calibrating import Calibrating
from it3_lightning.calibration import calibration_of, check_level, gate_of
from it3_lightning.engine import Settings
from it3_lightning.guest import Guest, Stage
from it3_lightning.host import check_strategy, checked_module


class GatedGuest(Guest):
    """Measures validation samples, so that usual ones can be told from others.

    Args:
        settings: of the adaptation.
        gate: share of the validation samples within the gate; ``None``: there is no gate, and
            nothing is measured.
        stages: where to take over.

    Raises:
        ValueError: the gate is no share, or is to be used on the data it is calibrated on.
    """

    def __init__(self, settings: Settings, gate: float | None, stages: Sequence[Stage]) -> None:
        super().__init__(stages)
        check_level(gate)
        if gate is not None and "validate" in stages:
            raise ValueError(
                "The gate is calibrated on validation data, so it cannot gate stage 'validate'. "
                "Leave out the gate or the stage."
            )
        self.settings = settings
        self.gate = gate
        self._calibrating: Calibrating | None = None

    def gated(self, module: LightningModule) -> Settings:
        """Return the settings with the distance that the module's calibration gives the gate.

        Raises:
            MisconfigurationException: it gives none.
        """
        if self.gate is None:
            return self.settings
        return replace(self.settings, gate=gate_of(module, self.settings, self.gate))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before fitting what its validation could not adapt or calibrate."""
        if stage == "fit" and ("validate" in self.stages or self.gate is not None):
            checked_module(pl_module, fitted=False)
        if self.gate is not None:
            check_strategy(trainer)
            calibration_of(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over ``validation_step`` where asked to; with a gate, begin to calibrate."""
        super().on_validation_start(trainer, pl_module)
        if self.gate is not None and not trainer.sanity_checking:
            self._calibrating = Calibrating(pl_module, self.settings)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the distances of a validation batch."""
        if self._calibrating is not None:
            with trainer.precision_plugin.forward_context():
                self._calibrating.add(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the quantiles of these distances in the module, before a checkpoint is written."""
        if self._calibrating is not None:
            self._calibrating.finish(trainer)
        self._calibrating = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Forget what was measured so far."""
        self._calibrating = None
        super().on_exception(trainer, pl_module, exception)
