"""State of an adaptation: weights, optimizer, anchor, method; stepped, rolled back, carried on."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from it3_lightning.engine.optimizers import (
    HALF,
    OnlyStep,
    Updater,
    full_precision,
    gradients_of,
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
    updater: tuple[dict[str, Any], list[Tensor]]
    version: int


class State(AnchoredWeights):
    """Adapted weights, their optimizer and the anchor, all starting at the source.

    Args:
        parameters: the adapting parameters by name, with the source weights in them.
        settings: how to adapt.
        method: whose state is carried along.
        only_step: takes the only step there is; without it, any number of steps can be taken.
        stateful: whether that has one.

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
        *,
        stateful: bool = False,
    ) -> None:
        self._parameters = parameters
        self._only_step = only_step
        self._settings = settings
        self._method = method
        self.source: Weights = {name: p.detach() for name, p in parameters.items()}
        self.weights: Weights = dict(self.source)
        self._half = [w.dtype for w in self.source.values() if w.dtype in HALF]
        self.version = self._latest = SOURCE
        self.moved = False
        self.backwards = 0
        self._average: Weights = {}  # of the EMA anchor, in full precision
        self._updater: Updater | None = None
        self._stateful = stateful
        live = settings.anchor == "live"  # the adapted weights serve themselves
        self.anchor = None if live else self.source
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
        if self._only_step is None:
            self.step_by(self.gradients(loss), loss)
            return
        self._check(loss)
        self.backwards += 1
        self._new_version()
        total = self._step_once(self._only_step, loss)
        torch.clear_autocast_cache()
        if not math.isfinite(total.item()):
            self._check_weights()

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradients of a loss by name, of the weights that it depends on.

        Raises:
            Skip: the loss is not finite.
            ValueError: it depends on none.
        """
        self._check(loss)
        self.backwards += 1
        gradients = gradients_of(loss, self._parameters)
        if not gradients:
            raise self._uninfluenced()
        return gradients

    def step_by(self, gradients: Mapping[str, Tensor], loss: Tensor) -> None:
        """Move the weights by gradients, and let the anchor follow.

        Raises:
            Skip: a gradient or a weight is not finite.
        """
        self._new_version()
        total = self._step_on(gradients, loss)
        torch.clear_autocast_cache()
        if not math.isfinite(total.item()):
            self._check_weights()

    @contextmanager
    def moved_by(self, changes: Mapping[str, Tensor]) -> Iterator[None]:
        """Let passes within run on the weights and these changes."""
        before = self.version
        self._latest += 1
        self.version = self._latest
        try:
            for name, change in changes.items():
                self._parameters[name].data = self.weights[name] + change.to(self.weights[name])
            torch.clear_autocast_cache()
            yield
        finally:
            for name in changes:
                self._parameters[name].data = self.weights[name]
            self.version = before
            torch.clear_autocast_cache()

    @torch.no_grad()
    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from these weights; the optimizer keeps its state, the anchor stays."""
        self._leave_source()
        assert self._updater is not None
        self._updater.assign([weights.get(name) for name in self.weights])
        self._new_version()
        torch.clear_autocast_cache()

    def return_to_source(self) -> None:
        """Go back to the source weights; the optimizer keeps its state."""
        if self.moved:
            self.enter()
            self.assign(self.source)
            self.version = SOURCE  # passes of these weights are those of the source

    def reset(self) -> None:
        """Go back to the source, and to an optimizer without a state."""
        self._to_source()
        self.enter()

    @property
    def differs(self) -> bool:
        """Whether any weight is not the source's: a step may be shorter than the rounding."""
        pairs = ((weights, self.source[name]) for name, weights in self.weights.items())
        return any(mine is not its and not torch.equal(mine, its) for mine, its in pairs)

    def _check(self, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise Skip("non-finite loss")
        if not loss.requires_grad:
            raise self._uninfluenced()

    def _check_weights(self) -> None:
        """Skip the batch where a weight is not finite: their sum may be so by mere overflow."""
        if not all(map(all_finite, self.weights.values())):
            raise Skip("non-finite gradient or weights")

    def _new_version(self) -> None:
        self.moved = True
        self._latest += 1
        self.version = self._latest

    def _warn_of_rounding(self, loss: Tensor) -> None:
        """Say so where the only step has changed no weight, though there was a loss to lower."""
        if float(loss.detach()) != 0 and all(
            torch.equal(w, self.source[n]) for n, w in self.weights.items()
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
        self.weights = {**self.source, **moved}
        for name, values in moved.items():
            self._parameters[name].data = values
        if self._half:
            self._warn_of_rounding(loss)
        return total

    def _step_on(self, gradients: Mapping[str, Tensor], loss: Tensor) -> Tensor:
        """Take a step of the optimizer, from wherever the weights are; return their norm."""
        self._leave_source()
        assert self._updater is not None
        self._updater.step([gradients.get(name) for name in self.weights], loss)
        if self._settings.weight_ensembling:
            self._updater.pull([*self.source.values()], self._settings.weight_ensembling)
        if self._average:
            share = 1 - self._settings.ema_decay
            torch._foreach_lerp_([*self._average.values()], self._updater.values, share)
            self._follow()
        return torch.nn.utils.get_total_norm([*self.weights.values()])

    def _follow(self) -> None:
        """Let the anchor be the average, in the weights' own precision; of no version of them."""
        source = self.source
        self.anchor = {n: rounded(a, source[n].dtype) for n, a in self._average.items()}
        self.anchor_version = None

    def _leave_source(self) -> None:
        """Before the first step, copy what moves: source weights and anchor stay as they are."""
        if self._updater is not None:
            return
        self.weights = _cloned(self.weights)
        for name, parameter in self._parameters.items():
            parameter.data = self.weights[name]
        if self._settings.anchor == "ema":
            self._average = {n: full_precision(w).clone() for n, w in self.source.items()}
        factory = optimizer_factory(*self._settings.moves)
        parameters = list(self._parameters.values())
        self._updater = Updater(parameters, factory, self._settings.grad_clip)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Go back to what all was, where the body fails."""
        method = copy.deepcopy(self._method.state_dict()) if self._stateful else {}
        backup = self._copied() if self.moved else None
        try:
            yield
        except BaseException:
            if self._stateful:
                self._method.load_state_dict(method)
            self._to_source() if backup is None else self._roll_back(backup)
            raise

    def _copied(self) -> _Backup:
        assert self._updater is not None
        return _Backup(
            _cloned(self.weights), _cloned(self._average), self._updater.state(), self.version
        )

    def _to_source(self) -> None:
        self.weights, self._average = dict(self.source), {}
        for name, parameter in self._parameters.items():
            parameter.data = self.source[name]
        self._updater, self.moved, self.version = None, False, SOURCE
        if self.anchor is not None:
            self.anchor, self.anchor_version = self.source, SOURCE

    def _roll_back(self, backup: _Backup) -> None:
        """Go back to a backup."""
        self._leave_source()  # a method may have gone back to it
        assert self._updater is not None
        self.moved, self.version = True, backup.version
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
            f"{', '.join(list(self.source)[:5])}. Select parameters of the network itself, "
            "and let the forward pass keep its graph (no detach, no torch.no_grad)."
        )


class Carried:
    """What a batch leaves to the next: a state and what the method keeps, until they are reset.

    Args:
        selected: the adapting parameters by name.
        settings: how to adapt.

    Attributes:
        method: of these settings; a copy, where it has a state.
        stateful: whether it has one.
        state: what the next batch goes on from; ``None``: the source.
    """

    def __init__(self, selected: Mapping[str, nn.Parameter], settings: Settings) -> None:
        self._selected, self._settings = selected, settings
        self.stateful = type(settings.method).state_dict is not TestTimeMethod.state_dict
        with torch.inference_mode(False):  # a state is nobody else's, and may need a graph
            self.method = copy.deepcopy(settings.method) if self.stateful else settings.method
        self._at_first = copy.deepcopy(self.method.state_dict()) if self.stateful else {}
        rule = settings.rule if settings.single_step else None  # in closed form
        self._only_step = None if rule is None else OnlyStep(rule, settings.moves[1])
        self.state: State | None = None
        self._batches = 0

    def restart(self) -> None:
        """Forget it: the next batch starts from the source."""
        self.state, self._batches = None, 0
        if self.stateful:
            self.method.load_state_dict(copy.deepcopy(self._at_first))

    def start(self) -> tuple[State, bool]:
        """Return the state a batch starts from, and whether earlier batches have moved it."""
        reset, state = self._settings.reset, self.state
        due = isinstance(reset, int) and self._batches % reset == 0
        if state is not None and not due:
            state.backwards = 0
            if reset == "weights":
                state.return_to_source()
                return state, False
            return state, state.moved
        if self.stateful:
            self.method.load_state_dict(copy.deepcopy(self._at_first))
        given = self._selected, self._settings, self.method, self._only_step
        return State(*given, stateful=self.stateful), False

    def keep(self, state: State) -> None:
        """Let the next batch go on from here."""
        self.state = state
        self._batches += 1


class SourceInPlace(AnchoredWeights):
    """The source weights, where they are in place, as their own anchor."""

    version = anchor_version = SOURCE
    anchor = None


class Unshared(AnchoredWeights):
    """The source weights in place, and an anchor that shares no pass with them."""

    version, anchor_version = SOURCE, None

    def __init__(self, anchor: Weights | None) -> None:
        self.anchor = anchor


def _cloned(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}
