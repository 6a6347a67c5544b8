"""What adaptation carries from step to step, and online from batch to batch: weights, optimizer, anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from it3_lightning.engine.settings import Settings
from it3_lightning.engine.updates import Updater, optimizer_factory

Weights = dict[str, Tensor]
Backup = tuple[Weights, Weights | None, dict[str, Any] | None]


class State:
    """Adapted weights, their optimizer and the anchor, all starting at the source.

    Args:
        parameters: the adapting parameters by name, with the source weights in them.
        settings: how to adapt.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Settings) -> None:
        self._parameters = parameters
        self._settings = settings
        self.source: Weights = {name: p.detach() for name, p in parameters.items()}
        self.weights: Weights = {name: p.detach().clone() for name, p in parameters.items()}
        self.anchor = self._first_anchor()
        self._updater: Updater | None = None

    def _first_anchor(self) -> Weights | None:
        """Return the anchor's weights; ``None`` where it is the adapted weights themselves."""
        if self._settings.anchor == "live":
            return None
        return _cloned(self.source) if self._settings.anchor == "ema" else self.source

    def enter(self) -> None:
        """Put the adapted weights behind the parameters, ready to collect gradients."""
        for name, parameter in self._parameters.items():
            parameter.data = self.weights[name]
            parameter.requires_grad_(True)
            parameter.grad = None

    def step(self, gradients: Sequence[Tensor | None]) -> bool:
        """Move the weights and let the anchor follow; ``False`` where a gradient is not finite."""
        if self._updater is None:
            factory = optimizer_factory(self._settings.optimizer, self._settings.lr)
            parameters = list(self._parameters.values())
            self._updater = Updater(parameters, factory, self._settings.grad_clip)
        if not self._updater.step(gradients):
            return False
        if self._settings.anchor == "ema" and self.anchor is not None:
            anchor, weights = list(self.anchor.values()), list(self.weights.values())
            torch._foreach_lerp_(anchor, weights, 1 - self._settings.ema_decay)
        return True

    def finite(self) -> bool:
        """Whether all adapted weights are finite."""
        return bool(torch.nn.utils.get_total_norm(list(self.weights.values())).isfinite())

    def backup(self) -> Backup:
        """Return a copy of everything, for :meth:`rollback`."""
        anchor = _cloned(self.anchor) if self._settings.anchor == "ema" and self.anchor else None
        optimizer = None if self._updater is None else self._updater.state()
        return _cloned(self.weights), anchor, optimizer

    def rollback(self, backup: Backup) -> None:
        """Go back to a backup, as if nothing had happened since."""
        weights, anchor, optimizer = backup
        with torch.no_grad():
            _copy(self.weights, weights)
            if anchor is not None and self.anchor is not None:
                _copy(self.anchor, anchor)
        if self._updater is None or optimizer is None:
            self._updater = None
        else:
            self._updater.load(optimizer)


def _cloned(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


def _copy(into: Weights, values: Weights) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])
