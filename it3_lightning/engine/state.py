"""What is carried from step to step, and from batch to batch: weights, optimizer, anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from it3_lightning.engine.evaluation import Evaluator
from it3_lightning.engine.finite import all_finite
from it3_lightning.engine.first_step import FirstStep
from it3_lightning.engine.outcome import Skip
from it3_lightning.engine.polyak_step import PolyakStep
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
        single: takes the only step there is; without one, any number of steps can be taken.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Settings,
        single: FirstStep | PolyakStep | None = None,
    ) -> None:
        self._parameters = parameters
        self._settings = settings
        self._single = single
        self._source = {name: p.detach() for name, p in parameters.items()}
        self.weights: Weights = dict(self._source)
        self.moved = False
        self._average: Weights = {}  # of the EMA anchor, in full precision
        self._updater: Updater | None = None

    @property
    def anchor(self) -> Weights | None:
        """The weights of the second pass; ``None`` where the adapted weights serve themselves."""
        if self._settings.anchor == "live":
            return None
        if not self._average:
            return self._source
        return {name: a.to(self._source[name].dtype) for name, a in self._average.items()}

    @property
    def anchored_at_source(self) -> bool:
        """Whether the second pass has the source weights."""
        return self._settings.anchor != "live" and not self._average

    def enter(self) -> None:
        """Put the adapted weights behind the parameters, ready to collect gradients."""
        for name, parameter in self._parameters.items():
            if self.moved:
                parameter.data = self.weights[name]
            parameter.requires_grad_(True)
            parameter.grad = None
        torch.clear_autocast_cache()

    def step(self, loss: Tensor, evaluate: Evaluator) -> None:
        """Move the weights down the gradient of the loss and let the anchor follow.

        Raises:
            Skip: the loss, a gradient or a weight is not finite.
            ValueError: it does not depend on the weights.
        """
        if self._single is not None:
            moved, total = evaluate.backward(loss, self._single)
            self.weights = {**self._source, **moved}
            for name, values in moved.items():
                self._parameters[name].data = values
        else:
            gradients = evaluate.gradients(loss)
            self._leave_source()
            assert self._updater is not None
            self._updater.step(gradients, loss)
            total = torch.nn.utils.get_total_norm([*self.weights.values()])
            if self._average:
                share = 1 - self._settings.ema_decay
                torch._foreach_lerp_([*self._average.values()], self._updater.values, share)
        self.moved = True
        torch.clear_autocast_cache()
        if all_finite(total):
            return
        if not all(all_finite(w) for w in self.weights.values()):  # no mere overflow
            raise Skip("non-finite gradient or weights")

    def _leave_source(self) -> None:
        """Before the first step, copy what moves: source weights and anchor stay as they are."""
        if self._updater is not None:
            return
        self.weights = _cloned(self._source)
        for name, parameter in self._parameters.items():
            parameter.data = self.weights[name]
        if self._settings.anchor == "ema":
            self._average = {n: full_precision(w).clone() for n, w in self._source.items()}
        factory = optimizer_factory(*self._settings.moves)
        parameters = list(self._parameters.values())
        self._updater = Updater(parameters, factory, self._settings.grad_clip)

    def backup(self) -> Backup:
        """Return a copy of everything, for :meth:`rollback`."""
        if self._updater is None:
            return Backup({}, {}, None)
        return Backup(_cloned(self.weights), _cloned(self._average), self._updater.state())

    def rollback(self, backup: Backup) -> None:
        """Go back to a backup, as if nothing had happened since."""
        if self._updater is None or backup.updater is None:
            self.weights, self._average = dict(self._source), {}
            self._updater, self.moved = None, False
            return
        with torch.no_grad():
            _copy(self.weights, backup.weights)
            _copy(self._average, backup.average)
            self._updater.load(backup.updater)


def _cloned(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


def _copy(into: Weights, values: Weights) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])
