"""The callback's gates: measure validation samples, and say which distances are unusual.

:class:`Gate` tells samples apart, by quantiles of the distance; :class:`BettingGate` streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from it3_lightning import calibration
from it3_lightning.calibration import calibration_of, check_level, fingerprint, measured_by
from it3_lightning.callbacks.checks import check_strategy
from it3_lightning.engine import Adaptation, Settings
from it3_lightning.integration.batches import normal
from it3_lightning.integration.module import IT3Module, checked_module, host_of
from it3_lightning.integration.module_adapter import adapter_of
from it3_lightning.integration.stream_gate import (
    GatedStep,
    Runner,
    Scores,
    check_delta,
    stream_gate_of,
)
from it3_lightning.priors.classes import OutputKind


class Gate:
    """Tells usual samples from others, by quantiles of the distance on validation samples.

    Args:
        level: share of the validation samples within the gate.
        settings: of the adaptation.

    Raises:
        ValueError: the level is no share, or the method goes with no gate.
    """

    level: float | Literal["bet"]

    def __init__(self, level: float, settings: Settings) -> None:
        check_level(level)
        replace(settings, gate=0.0)  # refuses what goes with no gate
        self.level = self._share = level
        self._settings = settings
        self._measuring: _Measurement | None = None

    def settings_for(self, module: LightningModule) -> Settings:
        """Return the settings with the distance that the module's calibration gives the gate.

        Raises:
            MisconfigurationException: it gives none.
        """
        limit = calibration.gate_of(module, self._settings, self._share)
        return replace(self._settings, gate=limit)

    def runner(self, module: LightningModule, host: IT3Module, adapting: Runner) -> Runner:
        """Return what runs a step behind this gate, given what adapts and runs it."""
        return adapting

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
            self._measuring = self._measurement(module)

    def measure(self, trainer: Trainer, batch: Any) -> None:
        """Measure the distances of a validation batch."""
        if self._measuring is not None:
            with trainer.precision_plugin.forward_context():
                self._measuring.add(batch)

    def finish(self, trainer: Trainer) -> None:
        """Keep what these distances are in the module."""
        if self._measuring is not None:
            self._measuring.keep(trainer)
        self._measuring = None

    def cancel(self) -> None:
        """Forget what was measured so far."""
        self._measuring = None

    def _measurement(self, module: LightningModule) -> _Measurement:
        host, settings = checked_module(module), self._settings
        company = settings.scope == "batch" and host.it3_prior.context is not None
        still = replace(
            settings,  # alone, a bad sample spoils no other
            scope="batch" if settings.needs_batch or company else "sample",
            reset="batch",
            compile=False,
            steps=0,
            gate=None,
            measure=True,
        )
        adapter = adapter_of(module, host, still, silent=True)

        def measured(inputs: Any) -> Adaptation:
            with adapter.adapted(inputs) as adaptation:
                return adaptation

        by = measured_by(settings.objective, settings.norm_stats)
        return _Measurement(module, host, measured, partial(calibration_of(module).take, by=by))


class BettingGate(Gate):
    """Keeps a stream at the source until a bet against validation samples has proved a shift.

    Args:
        delta: probability of ever adapting to samples that are exchangeable with these, at most.
        settings: of the adaptation.
        outputs: what the outputs of a module without a prior are.

    Raises:
        ValueError: delta is no probability.
    """

    level = "bet"

    def __init__(self, delta: float, settings: Settings, outputs: OutputKind) -> None:
        check_delta(delta)
        self._delta, self._settings, self._outputs = delta, settings, outputs
        self._measuring = None

    def settings_for(self, module: LightningModule) -> Settings:
        """Return the settings as they are: what is adapted to is adapted to whole."""
        return self._settings

    def runner(self, module: LightningModule, host: IT3Module, adapting: Runner) -> Runner:
        """Return what runs a step behind this gate, given what adapts and runs it.

        Raises:
            MisconfigurationException: the module knows no distances to bet against.
        """
        gate = stream_gate_of(module, host, self._settings, self._delta)
        return GatedStep.of(module, host, self._settings, gate, adapting)

    def _measurement(self, module: LightningModule) -> _Measurement:
        host = host_of(module, self._settings.method, outputs=self._outputs)
        scores = Scores(module, host, self._settings)
        keep = partial(calibration_of(module).take_reference, by=scores.by)
        return _Measurement(module, host, scores.measure, keep)


def gate_of(
    gate: float | Literal["bet"], delta: float, settings: Settings, outputs: OutputKind
) -> Gate:
    """Return the gate of a name or a share; see both classes for the arguments.

    Raises:
        ValueError: it is neither.
    """
    if gate == "bet":
        return BettingGate(delta, settings, outputs)
    return Gate(gate, settings)


class _Measurement:
    """Distances of validation batches.

    Args:
        module: that predicts.
        host: the same, as what predicts with a prior.
        measure: inputs to what was measured of them.
        take: takes distances ``(N,)``, and ``weights``, the fingerprint of the module.
    """

    def __init__(
        self,
        module: LightningModule,
        host: IT3Module,
        measure: Callable[[Any], Adaptation],
        take: Callable[..., None],
    ) -> None:
        self._module, self._host = module, host
        self._measure, self._take = measure, take
        self._distances: list[Tensor] = []
        self._weights = ""

    def add(self, batch: Any) -> None:
        """Measure a batch."""
        self._weights = self._weights or fingerprint(self._module)  # once callbacks swapped theirs
        distances = self._measure(normal(self._host.it3_inputs(batch))).distance_source
        if distances is not None:
            self._distances.append(distances)

    def keep(self, trainer: Trainer) -> None:
        """Keep what they are, over the samples of all processes."""
        with torch.inference_mode(False), torch.no_grad():
            home = self._module.device
            none = torch.empty(0, device=home)
            distances = torch.cat([none, *(d.float().to(home) for d in self._distances)])
            if trainer.world_size > 1:
                distances = _gathered(distances, trainer)
            self._take(distances, weights=self._weights)
        if not bool(distances.isfinite().any()):
            rank_zero_warn("The gate is not calibrated: no validation sample could be measured.")


def _gathered(distances: Tensor, trainer: Trainer) -> Tensor:
    """Return those of all processes, which may have different numbers; filled up with NaN."""
    sizes = trainer.strategy.all_gather(torch.tensor(len(distances), device=distances.device))
    filled = distances.new_full((int(sizes.max()),), float("nan"))
    filled[: len(distances)] = distances
    return trainer.strategy.all_gather(filled).flatten()
