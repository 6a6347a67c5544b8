"""A module's own step, taken over for a while: run with weights adapted to its batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from it3_lightning.adapters import Adapter
from it3_lightning.averaging import averaged
from it3_lightning.engine import Adaptation
from it3_lightning.engine.randomness import undisturbed_rng
from it3_lightning.host import normal
from it3_lightning.muting import muted
from it3_lightning.protocols import IT3Module

Step = Callable[..., Any]
Prediction = Literal["first", "second", "mean"]
Record = Callable[[Adaptation, int], None]


class Runner(Protocol):
    """Runs a step with adapted weights."""

    @property
    def adapter(self) -> Adapter:
        """What adapts."""

    def run(self, inputs: Any, step: Callable[[], Any]) -> tuple[Any, Adaptation]:
        """Return what a step returned that ran with weights adapted to these inputs."""


def adapting(step: Step, host: IT3Module, runner: Runner, record: Record) -> Step:
    """Return the step, run with weights adapted to its batch.

    Args:
        step: takes a batch, and what Lightning hands over with it.
        host: knows the inputs of a batch.
        runner: adapts and runs; goes back to the source at every new dataloader.
        record: takes note of each adaptation, and of its dataloader.
    """
    current = 0

    @functools.wraps(step)
    def adapted_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal current
        batch = args[0] if args else next(iter(kwargs.values()))
        loader = _loader_index(args, kwargs)
        if loader != current:
            runner.adapter.restart()
            current = loader
        inputs = host.it3_inputs(batch)
        output, adaptation = runner.run(inputs, functools.partial(step, *args, **kwargs))
        record(adaptation, loader)
        return output

    return adapted_step


class WholeBatch:
    """Runs a step of scope ``"batch"``, or of no steps: its weights are in place meanwhile.

    Args:
        module: whose step runs.
        host: the same, as what predicts with a prior.
        adapter: puts the weights in place.
        prediction: ``"first"``; ``"second"``: every forward of the step sees the first
            prediction as its prior; ``"mean"``: ``self(...)`` returns the mean of both.
    """

    def __init__(
        self, module: LightningModule, host: IT3Module, adapter: Adapter, prediction: Prediction
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


def replace_step(module: LightningModule, name: str, step: Step) -> Callable[[], None]:
    """Put a step on the instance; return what puts the former state of the instance back."""
    attributes = vars(module)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = step

    def undo() -> None:
        attributes.pop(name, None)
        attributes.update(before)

    return undo


def _loader_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return which dataloader a batch comes from: ``dataloader_idx``, after ``batch_idx``."""
    index = kwargs.get("dataloader_idx", args[2] if len(args) > 2 else 0)
    return index if isinstance(index, int) else 0
