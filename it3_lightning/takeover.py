"""A module's own step, taken over for a while: run with weights adapted to its batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from it3_lightning.answering import Answering
from it3_lightning.conditioning import Conditioning
from it3_lightning.engine import Adaptation, BatchAdapter, Enters, SampleAdapter, Settings, adapter
from it3_lightning.engine.randomness import undisturbed_rng
from it3_lightning.host import normal
from it3_lightning.muting import muted
from it3_lightning.protocols import IT3Module

Step = Callable[..., Any]
Prediction = Literal["first", "second"]
Adapted = Callable[[Any], AbstractContextManager[Adaptation]]
Record = Callable[[Adaptation], None]


def adapting(
    step: Step, host: IT3Module, adapted: Adapted, *, restart: Callable[[], None], record: Record
) -> Step:
    """Return the step, run with weights adapted to its batch.

    Args:
        step: takes a batch, and what Lightning hands over with it.
        host: knows the inputs of a batch.
        adapted: inputs to a context in which the step is to run.
        restart: goes back to the source; called at every new dataloader.
        record: takes note of each adaptation.
    """
    current = 0

    @functools.wraps(step)
    def adapted_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal current
        batch = args[0] if args else next(iter(kwargs.values()))
        loader = _loader_index(args, kwargs)
        if loader != current:
            restart()
            current = loader
        with adapted(host.it3_inputs(batch)) as adaptation:
            output = step(*args, **kwargs)
        record(adaptation)
        return output

    return adapted_step


def adapter_of(
    module: LightningModule, host: IT3Module, settings: Settings, *, silent: bool = False
) -> BatchAdapter | SampleAdapter:
    """Return the engine for a module, and say which weights it adapts.

    Args:
        module: whose weights adapt.
        host: the same, as what predicts with a prior.
        settings: how to adapt.
        silent: say nothing.

    Raises:
        MisconfigurationException: the selection of parameters matches nothing.
    """

    def forward(inputs: Any, prior: Tensor | None) -> Tensor:
        with muted(module):
            return host.predict_with(inputs, prior)

    return _built(module, host, settings, forward, silent=silent)


def adapted_to(
    made: BatchAdapter | SampleAdapter,
    module: LightningModule,
    host: IT3Module,
    settings: Settings,
    prediction: Prediction,
    step: str,
) -> Adapted:
    """Return what a step runs in, given its inputs.

    Args:
        made: adapts.
        module: whose step.
        host: the same, as what predicts with a prior.
        settings: how to adapt.
        prediction: ``"first"``, or ``"second"``: every forward of the step sees the first
            prediction as its prior.
        step: name of the step.
    """
    if isinstance(made, BatchAdapter):

        @contextmanager
        def whole(inputs: Any) -> Iterator[Adaptation]:
            own = normal(inputs)
            with made.adapted(own) as adaptation:
                if prediction == "first":
                    yield adaptation
                    return
                with _second_prior(module, host, own):
                    yield adaptation

        return whole

    def predict(inputs: Any) -> Tensor:
        with muted(module):
            y0 = host.predict_with(inputs, None)
            if prediction == "first":
                return y0
            return host.predict_with(inputs, host.it3_prior.from_output(y0))

    def by_first(both: Any, prior: Tensor | None) -> Tensor:
        with muted(module):
            return host.predict_with(both[0], prior)

    elsewhere = _built(module, host, settings, by_first, silent=True)
    assert isinstance(elsewhere, SampleAdapter)
    answering = Answering(module, made, elsewhere, predict)
    return lambda inputs: answering.adapted(inputs, step)


def replace_step(module: LightningModule, name: str, step: Step) -> Callable[[], None]:
    """Put a step on the instance; return what puts the former state of the instance back."""
    attributes = vars(module)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = step

    def undo() -> None:
        attributes.pop(name, None)
        attributes.update(before)

    return undo


def _built(
    module: LightningModule,
    host: IT3Module,
    settings: Settings,
    forward: Callable[[Any, Tensor | None], Tensor],
    *,
    silent: bool = False,
) -> BatchAdapter | SampleAdapter:
    trainable = getattr(module, "it3_trainable", nullcontext)  # frozen while it is fitted
    to_label = host.it3_prior.from_output
    try:
        with trainable():
            made = adapter(module, forward, to_label, settings, enters=_enters(host))
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    if not silent:
        names = list(made.selected)
        weights = sum(parameter.numel() for parameter in made.selected.values())
        rank_zero_info(
            f"IT3 adapts {weights:,} weights in {len(names)} parameters: {', '.join(names[:5])}"
            f"{', ...' * (len(names) > 5)}"
        )
    return made


def _enters(host: IT3Module) -> Enters:
    """Return where the prior enters, where that is known."""
    conditioning = getattr(host, "it3_conditioning", None)
    if not isinstance(conditioning, Conditioning):
        return {}
    return dict.fromkeys(conditioning.layers, conditioning.enters)


@contextmanager
def _second_prior(module: LightningModule, host: IT3Module, inputs: Any) -> Iterator[None]:
    """Let every forward pass within see the first prediction as its prior."""
    with torch.no_grad(), undisturbed_rng(), muted(module):
        outputs = host.predict_with(inputs, None)
    with host.it3_given(host.it3_prior.from_output(outputs)):
        yield


def _loader_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return which dataloader a batch comes from: ``dataloader_idx``, after ``batch_idx``."""
    index = kwargs.get("dataloader_idx", args[2] if len(args) > 2 else 0)
    return index if isinstance(index, int) else 0
