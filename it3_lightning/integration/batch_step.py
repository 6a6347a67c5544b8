"""Scope `batch` under a Trainer: the step runs once, with weights adapted to its batch in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from it3_lightning.engine import Adaptation
from it3_lightning.engine.restore import undisturbed_rng
from it3_lightning.engine.trees import copied
from it3_lightning.integration.batches import normal
from it3_lightning.integration.isolation import hooked_by, muted, patched
from it3_lightning.integration.module import IT3Module
from it3_lightning.integration.module_adapter import (
    Adapter,
    WhichPrediction,
    mean_prediction,
    owned,
)

_NEVER_ASKED = """A step of {name} never called self(...), so there was nothing to average.
    wrong:  logits = self.net(x)
    right:  logits = self(x)  # with def forward(self, x): return self.net(x)
prediction='mean' averages what self(...) returns; 'first' and 'second' serve any step."""


class BatchStep:
    """Runs a step of scope ``"batch"``, or of no steps: its weights are in place meanwhile.

    Args:
        module: whose step runs.
        host: the same, as what predicts with a prior.
        adapter: puts the weights in place.
        prediction: ``"first"``; ``"second"``: every forward of the step sees the first
            prediction as its prior; ``"mean"``: ``self(...)`` returns the mean of both.
    """

    def __init__(
        self,
        module: LightningModule,
        host: IT3Module,
        adapter: Adapter,
        prediction: WhichPrediction,
    ) -> None:
        self.adapter = adapter
        self._module = module
        self._host = host
        self._prediction = prediction

    def run(self, inputs: Any, step: Callable[[], Any]) -> tuple[Any, Adaptation]:
        """Adapt to the inputs and run the step."""
        own = normal(inputs)
        with ExitStack() as stack:
            adaptation = stack.enter_context(self.adapter.adapted(own))
            if self._prediction == "second":
                stack.enter_context(self._host.it3_given(self._first(own)))
            elif self._prediction == "mean":
                stack.enter_context(averaged(self._module, self._host, self._first(own)))
            return step(), adaptation

    def _first(self, inputs: Any) -> Tensor:
        """Return the first prediction, in label space."""
        with torch.no_grad(), undisturbed_rng(), muted(self._module):
            outputs = self._host.predict_with(inputs, None)
            return self._host.it3_prior.from_output(outputs)


@dataclass
class _Asked:
    """Calls of the module that have begun, and what the step gives by itself."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    priors: int = 0
    answered: bool = False


@contextmanager
def averaged(module: LightningModule, host: IT3Module, prior: Tensor) -> Iterator[None]:
    """Let calls of a module return the mean of both predictions within.

    A call that the step gives a prior of its own returns what it always does. What the second pass
    logs, counts or draws is not kept.

    Args:
        module: whose calls; hooks of its own see the mean.
        host: the same, as what predicts with a prior.
        prior: the first prediction, in label space.

    Raises:
        MisconfigurationException: the module was never called, or returned no tensor.
    """
    asked, own = _Asked([]), host.it3_given

    @contextmanager
    def given(theirs: Tensor | None) -> Iterator[None]:
        asked.priors += 1
        try:
            with own(theirs):
                yield
        finally:
            asked.priors -= 1

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        asked.calls.append(copied((args, kwargs)))  # the first pass may write into its inputs

    def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        args, kwargs = asked.calls.pop()
        asked.answered = True
        if asked.priors:
            return output
        with (
            own(prior),
            undisturbed_rng(),
            muted(module),
            hooked_by(module, lambda hook: owned(hook, host)),
        ):
            second = module(*args, **kwargs)
        return mean_prediction(host.it3_prior, output, second)

    with ExitStack() as stack:
        stack.callback(
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove
        )
        stack.callback(module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)
        stack.enter_context(patched(module, it3_given=given))
        yield
    if not asked.answered:
        raise MisconfigurationException(_NEVER_ASKED.format(name=type(module).__name__))
