"""What is carried from step to step, and from batch to batch: weights, optimizer, anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from it3_lightning.engine.settings import Settings
from it3_lightning.engine.updates import Updater, full_precision, optimizer_factory

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Backup:
    """A copy of everything in a :class:`State`."""

    weights: Weights
    average: Weights
    updater: tuple[dict[str, Any], list[Tensor]] | None


class State:
    """Adapted weights, their optimizer and the anchor, all starting at the source.

    Args:
        parameters: the adapting parameters by name, with the source weights in them.
        settings: how to adapt.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Settings) -> None:
        self._parameters = parameters
        self._settings = settings
        source = {name: p.detach() for name, p in parameters.items()}
        self.weights: Weights = _cloned(source)
        self._average: Weights = {}  # of the EMA anchor, in full precision
        if settings.anchor == "ema":
            self._average = {name: full_precision(w).clone() for name, w in source.items()}
        self._source = source
        self._updater: Updater | None = None

    @property
    def anchor(self) -> Weights | None:
        """The weights of the second pass; ``None`` where the adapted weights serve themselves."""
        if self._settings.anchor == "live":
            return None
        if self._settings.anchor == "frozen":
            return self._source
        return {name: a.to(self._source[name].dtype) for name, a in self._average.items()}

    def enter(self) -> None:
        """Put the adapted weights behind the parameters, ready to collect gradients."""
        for name, parameter in self._parameters.items():
            parameter.data = self.weights[name]
            parameter.requires_grad_(True)
            parameter.grad = None
        torch.clear_autocast_cache()

    def step(self, gradients: Sequence[Tensor | None]) -> bool:
        """Move the weights and let the anchor follow; ``False`` where a gradient is not finite."""
        if self._updater is None:
            factory = optimizer_factory(self._settings.optimizer, self._settings.lr)
            parameters = list(self._parameters.values())
            self._updater = Updater(parameters, factory, self._settings.grad_clip)
        if not self._updater.step(gradients):
            return False
        if self._average:
            share = 1 - self._settings.ema_decay
            torch._foreach_lerp_([*self._average.values()], self._updater.values, share)
        torch.clear_autocast_cache()
        return True

    def finite(self) -> bool:
        """Whether all adapted weights are finite."""
        largest = torch.nn.utils.get_total_norm([*self.weights.values()], norm_type=float("inf"))
        return bool(largest.isfinite())

    def backup(self) -> Backup:
        """Return a copy of everything, for :meth:`rollback`."""
        updater = None if self._updater is None else self._updater.state()
        return Backup(_cloned(self.weights), _cloned(self._average), updater)

    def rollback(self, backup: Backup) -> None:
        """Go back to a backup, as if nothing had happened since."""
        with torch.no_grad():
            _copy(self.weights, backup.weights)
            _copy(self._average, backup.average)
            if self._updater is None or backup.updater is None:
                self._updater = None
            else:
                self._updater.load(backup.updater)


def _cloned(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


def _copy(into: Weights, values: Weights) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])
