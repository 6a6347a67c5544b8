"""State of an adaptation: weights, optimizer, anchor, method; stepped, copied, rolled back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from it3_lightning.engine.optimizers import (
    HALF,
    OnlyStep,
    Updater,
    full_precision,
    optimizer_factory,
    rounded,
)
from it3_lightning.engine.passes import AnchoredWeights, all_finite
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.types import SOURCE, Skip, Weights
from it3_lightning.methods.base import TestTimeMethod


@dataclass(frozen=True)
class _Backup:
    """A copy of all that a batch may change."""

    weights: Weights
    average: Weights
    updater: tuple[dict[str, Any], list[Tensor]] | None
    versions: tuple[int, int]
    method: dict[str, Any]


class State(AnchoredWeights):
    """Adapted weights, their optimizer and the anchor, all starting at the source.

    Args:
        parameters: the adapting parameters by name, with the source weights in them.
        settings: how to adapt.
        method: whose state is carried along.
        only_step: takes the only step there is; without it, any number of steps can be taken.
        start: the state of the method to go back to.

    Attributes:
        weights: by name, as they are now.
        moved: whether any step has been taken.
        backwards: backward passes since this was last set to 0.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Settings,
        method: TestTimeMethod,
        only_step: OnlyStep | None = None,
        start: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._parameters = parameters
        self._only_step = only_step
        self._settings = settings
        self._method = method
        self._source = {name: p.detach() for name, p in parameters.items()}
        self.weights: Weights = dict(self._source)
        self._half = [w.dtype for w in self._source.values() if w.dtype in HALF]
        self.version = self._latest = SOURCE
        self.moved = False
        self.backwards = 0
        self._average: Weights = {}  # of the EMA anchor, in full precision
        self._updater: Updater | None = None
        self._start = start
        live = settings.anchor == "live"  # the adapted weights serve themselves
        self.anchor = None if live else self._source
        self.anchor_version = None if live else SOURCE

    def enter(self) -> None:
        """Put the adapted weights behind the parameters, ready to collect gradients."""
        for name, parameter in self._parameters.items():
            if self.moved:
                parameter.data = self.weights[name]
            parameter.requires_grad_(True)
            parameter.grad = None
        torch.clear_autocast_cache()

    def step(self, loss: Tensor) -> None:
        """Move the weights down the gradient of the loss and let the anchor follow.

        Raises:
            Skip: the loss, a gradient or a weight is not finite.
            ValueError: it does not depend on the weights.
        """
        if not loss.isfinite():
            raise Skip("non-finite loss")
        if not loss.requires_grad:
            raise self._uninfluenced()
        self.backwards += 1
        once = self._only_step
        total = self._step_on(loss) if once is None else self._step_once(once, loss)
        self.moved = True
        self._latest += 1
        self.version = self._latest
        torch.clear_autocast_cache()
        if not total.isfinite() and not all(
            all_finite(w) for w in self.weights.values()
        ):  # no mere overflow
            raise Skip("non-finite gradient or weights")

    def _warn_of_rounding(self, loss: Tensor) -> None:
        """Say so where the only step has changed no weight, though there was a loss to lower."""
        if float(loss.detach()) != 0 and all(
            torch.equal(w, self._source[n]) for n, w in self.weights.items()
        ):
            warnings.warn(
                f"The step changed no weight: it is lost in the rounding of {self._half[0]}. Use a "
                "larger lr, more parameters, or precision='bf16-mixed' or '32-true'.",
                stacklevel=2,
            )

    def _step_once(self, only_step: OnlyStep, loss: Tensor) -> Tensor:
        """Take the only step there is, from the source to new weights; return a sum of them."""
        moved, total = only_step.backward(loss, self._parameters)
        if not moved:
            raise self._uninfluenced()
        self.weights = {**self._source, **moved}
        for name, values in moved.items():
            self._parameters[name].data = values
        if self._half:
            self._warn_of_rounding(loss)
        return total

    def _step_on(self, loss: Tensor) -> Tensor:
        """Take a step of the optimizer, from wherever the weights are; return their norm."""
        gradients = self._gradients(loss)
        self._leave_source()
        assert self._updater is not None
        self._updater.step(gradients, loss)
        if self._average:
            share = 1 - self._settings.ema_decay
            torch._foreach_lerp_([*self._average.values()], self._updater.values, share)
            self._follow()
        return torch.nn.utils.get_total_norm([*self.weights.values()])

    def _follow(self) -> None:
        """Let the anchor be the average, in the weights' own precision; of no version of them."""
        source = self._source
        self.anchor = {n: rounded(a, source[n].dtype) for n, a in self._average.items()}
        self.anchor_version = None

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        parameters = list(self._parameters.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise self._uninfluenced()
        return gradients

    def _leave_source(self) -> None:
        """Before the first step, copy what moves: source weights and anchor stay as they are."""
        if self._updater is not None:
            return
        self.weights = _cloned(self.weights)
        for name, parameter in self._parameters.items():
            parameter.data = self.weights[name]
        if self._settings.anchor == "ema":
            self._average = {n: full_precision(w).clone() for n, w in self._source.items()}
        factory = optimizer_factory(*self._settings.moves)
        parameters = list(self._parameters.values())
        self._updater = Updater(parameters, factory, self._settings.grad_clip)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Go back to what all was, where the body fails."""
        backup = self._copied() if self.moved else None
        try:
            yield
        except BaseException:
            self._roll_back(backup)
            raise

    def _copied(self) -> _Backup:
        updater = None if self._updater is None else self._updater.state()
        versions = self.version, self._latest
        method = copy.deepcopy(self._method.state_dict())
        return _Backup(_cloned(self.weights), _cloned(self._average), updater, versions, method)

    def _roll_back(self, backup: _Backup | None) -> None:
        """Go back to a backup, or to the source."""
        self._method.load_state_dict(self._start if backup is None else backup.method)
        if self._updater is None or backup is None or backup.updater is None:
            self.weights, self._average = dict(self._source), {}
            self._updater, self.moved, self.version = None, False, SOURCE
            if self.anchor is not None:
                self.anchor, self.anchor_version = self._source, SOURCE
            return
        self.version = backup.versions[0]
        with torch.no_grad():
            for into, values in ((self.weights, backup.weights), (self._average, backup.average)):
                for name, tensor in into.items():
                    tensor.copy_(values[name])
            self._updater.load(backup.updater)
        if self._average:
            self._follow()

    def _uninfluenced(self) -> ValueError:
        return ValueError(
            "None of the selected parameters influences the neutral prediction: "
            f"{', '.join(list(self._source)[:5])}. Select parameters of the network itself, "
            "and let the forward pass keep its graph (no detach, no torch.no_grad)."
        )


def _cloned(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}
