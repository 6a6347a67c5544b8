"""A module's own step, taken over for a while: run with weights adapted to its batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from it3_lightning.engine import Adaptation, BatchAdapter, Settings
from it3_lightning.engine.randomness import undisturbed_rng
from it3_lightning.host import normal
from it3_lightning.muting import muted
from it3_lightning.protocols import IT3Module

Step = Callable[..., Any]
Around = Callable[[Any], AbstractContextManager[None]]
Record = Callable[[Adaptation], None]


def adapting(
    step: Step, host: IT3Module, adapter: BatchAdapter, *, around: Around, record: Record
) -> Step:
    """Return the step, run with weights adapted to its batch.

    Args:
        step: takes a batch, and what Lightning hands over with it.
        host: knows the inputs of a batch.
        adapter: adapts the weights; starts from the source at every new dataloader.
        around: inputs to a context manager that surrounds the step.
        record: takes note of each adaptation.
    """
    current = 0

    @functools.wraps(step)
    def adapted_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal current
        batch = args[0] if args else next(iter(kwargs.values()))
        loader = _loader_index(args, kwargs)
        if loader != current:
            adapter.restart()
            current = loader
        inputs = normal(host.it3_inputs(batch))
        with adapter.adapted(inputs) as adaptation, around(inputs):
            output = step(*args, **kwargs)
        record(adaptation)
        return output

    return adapted_step


def adapter_of(module: LightningModule, host: IT3Module, settings: Settings) -> BatchAdapter:
    """Return the engine for a module, and say which weights it adapts.

    Args:
        module: whose weights adapt.
        host: the same, as what predicts with a prior.
        settings: how to adapt.

    Raises:
        MisconfigurationException: the selection of parameters matches nothing.
    """

    def forward(inputs: Any, prior: Tensor | None) -> Tensor:
        with muted(module):
            return host.predict_with(inputs, prior)

    trainable = getattr(module, "it3_trainable", nullcontext)  # frozen while it is fitted
    try:
        with trainable():
            adapter = BatchAdapter(module, forward, host.it3_prior.from_output, settings)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    names = list(adapter.selected)
    weights = sum(parameter.numel() for parameter in adapter.selected.values())
    rank_zero_info(
        f"IT3 adapts {weights:,} weights in {len(names)} parameters: {', '.join(names[:5])}"
        f"{', ...' * (len(names) > 5)}"
    )
    return adapter


@contextmanager
def second_prior(module: LightningModule, host: IT3Module, inputs: Any) -> Iterator[None]:
    """Let every forward pass within see the first prediction as its prior."""
    with torch.no_grad(), undisturbed_rng(), muted(module):
        outputs = host.predict_with(inputs, None)
    with host.it3_given(host.it3_prior.from_output(outputs)):
        yield


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
