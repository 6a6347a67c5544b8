"""What must be known of source data: measured on validation batches, kept with the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from it3_lightning.calibration import Calibration, fingerprint, measured_by
from it3_lightning.callbacks.checks import check_strategy
from it3_lightning.engine import BatchAdapter, Settings, SourceMoments
from it3_lightning.engine.evidence import normalises
from it3_lightning.integration.batches import normal
from it3_lightning.integration.module import IT3Module, host_of
from it3_lightning.integration.module_adapter import adapter_of
from it3_lightning.priors.classes import OutputKind

_KEPT = "it3_source"  # in a checkpoint: by what the methods are


class SourceData:
    """Shows the validation batches of ``fit`` and ``validate``, and keeps what was taken of them.

    A method takes what it needs, and ``norm_stats="evidence"`` moments of the norm layers. It is
    kept as plain data, with a fingerprint of the weights: in the module's calibration, which
    ``IT3Mixin`` puts into checkpoints, and in the callback, which puts it into those of a fit.

    Args:
        settings: of the adaptation.
        outputs: what the outputs of a module without a prior are.
    """

    def __init__(self, settings: Settings, outputs: OutputKind) -> None:
        self._method, self._outputs = settings.method, outputs
        self._by = measured_by(settings.objective, settings.norm_stats)
        self._evidence = settings.norm_stats == "evidence"
        still = replace(settings, scope="batch", reset="batch", gate=None, compile=False)
        # source data prove nothing: their statistics are the source's
        self._settings = replace(still, norm_stats="source") if self._evidence else still
        self._adapter: BatchAdapter | None = None
        self._host: IT3Module | None = None
        self.kept: dict[str, dict[str, Any]] = {}  # by what it is
        self.moments = SourceMoments()

    @property
    def what(self) -> str:
        """What needs to know, in words."""
        return type(self._method).__name__ if self._method.needs_source else _EVIDENCE

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin anew with the batches of a validation; not with those of a sanity check.

        Raises:
            MisconfigurationException: several processes would each see a part of the data.
        """
        if trainer.sanity_checking:
            return
        check_strategy(trainer)
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"{self.what} must see all source data in one process, and this "
                f"Trainer has {trainer.world_size}. Run Trainer(devices=1, callbacks=[...])"
                ".validate(model, loader) once, before you test."
            )
        if self._method.needs_source:
            self._method.load_source_dict({})
        self.moments = SourceMoments()
        host = host_of(module, self._method, outputs=self._outputs)
        made = adapter_of(module, host, self._settings, moments=self.moments, silent=True)
        adapter = cast(BatchAdapter, made)
        self._adapter, self._host, self._module = adapter, host, module
        self._weights = ""

    def add(self, trainer: Trainer, batch: Any) -> None:
        """Show a validation batch."""
        if self._adapter is not None and self._host is not None:
            self._weights = self._weights or fingerprint(self._module)
            inputs = normal(self._host.it3_inputs(batch))
            with trainer.precision_plugin.forward_context():
                if self._method.needs_source:
                    self._adapter.fit_source(inputs)
                if self._evidence:
                    self._adapter.fit_moments(inputs)

    def finish(self) -> None:
        """Keep what was taken."""
        if self._adapter is None:
            return
        if self._method.needs_source:
            with torch.inference_mode(False):
                self._keep("source", self._by, self._method.source_dict())
        if self._evidence:
            if normalises(self._module) and not self.moments.known:
                rank_zero_warn(_NOTHING_SEEN)
            self._keep("moments", _EVIDENCE, self.moments.source_dict())
        self.cancel()

    def _keep(self, kind: Literal["source", "moments"], by: str, source: dict[str, Any]) -> None:
        self.kept[by] = {"by": by, "weights": self._weights, "source": source}
        calibration = getattr(self._module, "it3_calibration", None)
        if isinstance(calibration, Calibration):
            setattr(calibration, kind, self.kept[by])

    def cancel(self) -> None:
        """See no more batches."""
        self._adapter = self._host = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put what is kept into a checkpoint, of a module that has no calibration too."""
        if self.kept:
            checkpoint.setdefault(_KEPT, {}).update(self.kept)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take from a checkpoint what is kept there."""
        kept = checkpoint.get(_KEPT, {})
        self.kept = {by: kept[by] for by in (self._by, _EVIDENCE) if by in kept}

    def load(self, module: LightningModule) -> None:
        """Give the method, or the moments, what was kept of source data, with these weights.

        Raises:
            MisconfigurationException: nothing was, or by another method, or with other weights.
        """
        calibration = getattr(module, "it3_calibration", None)
        if self._method.needs_source:
            own = calibration.source if isinstance(calibration, Calibration) else {}
            self._method.load_source_dict(self._fitting(module, self._by, own))
        if self._evidence and normalises(module):
            own = calibration.moments if isinstance(calibration, Calibration) else {}
            self.moments.load_source_dict(self._fitting(module, _EVIDENCE, own))

    def _fitting(self, module: LightningModule, by: str, own: dict[str, Any]) -> dict[str, Any]:
        fitting = [kept for kept in (own, self.kept.get(by, {})) if kept.get("by") == by]
        here = [kept for kept in fitting if kept["weights"] == fingerprint(module)]
        if not here:
            why = "with other weights" if fitting else "nothing yet"
            raise MisconfigurationException(
                f"{_EVIDENCE if by == _EVIDENCE else type(self._method).__name__} must have seen "
                f"source data, and has seen {why}. "
                "Run Trainer(callbacks=[this callback]).validate(model, loader) on a few clean "
                "batches before you test, or have the callback in trainer.fit."
            )
        source: dict[str, Any] = here[0]["source"]
        return source


_EVIDENCE = "norm_stats='evidence'"

_NOTHING_SEEN = (
    "norm_stats='evidence' has seen no BatchNorm layer in evaluation mode that runs once in a pass "
    "by itself, so there is nothing to compare batches with. Put the layers into evaluation mode; "
    "compile the network after validation."
)
