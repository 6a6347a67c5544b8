"""Module adapter: the engine for a LightningModule that predicts with a prior, or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from it3_lightning.conditioning import Conditioning
from it3_lightning.engine import Answer, BatchAdapter, Enters, SampleAdapter, Settings, adapter
from it3_lightning.engine.restore import Snapshot, without_side_effects
from it3_lightning.engine.trees import copied
from it3_lightning.integration.isolation import muted
from it3_lightning.integration.module import IT3Module
from it3_lightning.priors import Prior

WhichPrediction = Literal["first", "second", "mean"]
Adapter = BatchAdapter | SampleAdapter


def adapter_of(
    module: LightningModule,
    host: IT3Module,
    settings: Settings,
    *,
    inputs_in: Callable[[Any], Any] = lambda given: given,
    silent: bool = False,
) -> Adapter:
    """Return the engine for a module, and say which weights it adapts.

    Args:
        module: whose weights adapt.
        host: the same, as what predicts with a prior.
        settings: how to adapt.
        inputs_in: finds the module's inputs in what the engine is given.
        silent: say nothing.

    Raises:
        MisconfigurationException: the selection of parameters matches nothing.
    """

    def forward(given: Any, prior: Tensor | None) -> Tensor:
        return host.predict_with(inputs_in(given), prior)

    trainable = getattr(module, "it3_trainable", nullcontext)  # frozen while it is fitted
    to_label = host.it3_prior.from_output
    try:
        with trainable():
            made = adapter(
                module,
                forward,
                to_label,
                settings,
                enters=_enters(host),
                isolation=partial(muted, module),
                inputs_in=inputs_in,
            )
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    if not silent:
        rank_zero_info(_announced(made))
    return made


def in_precision(
    tensors: Sequence[Tensor],
    ordinary: Callable[[], Sequence[Tensor]],
    adapter: Adapter,
    module: LightningModule,
) -> list[Tensor]:
    """Return tensors in the types of an ordinary pass: ``torch.func`` runs without autocast.

    Args:
        tensors: that came of an adaptation.
        ordinary: what makes the same tensors, of any sample, in an ordinary pass.
        adapter: what adapted.
        module: whose pass it is; it is left as it was.
    """
    selection = getattr(adapter, "backend_selection", None)
    autocast = torch.is_autocast_enabled(next(iter(adapter.selected.values())).device.type)
    if not autocast or selection is None or selection.backend == "loop":
        return list(tensors)
    with without_side_effects(Snapshot(module), partial(muted, module)), torch.no_grad():
        types = [tensor.dtype for tensor in ordinary()]
    return [tensor.to(dtype) for tensor, dtype in zip(tensors, types, strict=True)]


def _announced(made: Adapter) -> str:
    names = list(made.selected)
    weights = sum(parameter.numel() for parameter in made.selected.values())
    some = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return f"IT3 adapts {weights:,} weights in {len(names)} parameters: {some}"


def _enters(host: IT3Module) -> Enters:
    """Return where the prior enters, where that is known."""
    conditioning = getattr(host, "it3_conditioning", None)
    if not isinstance(conditioning, Conditioning):
        return {}
    return dict.fromkeys(conditioning.layers, conditioning.enters)


def mean_prediction(prior: Prior, first: Any, second: Any) -> Tensor:
    """Return outputs whose label-space values are the mean of those of two outputs.

    Args:
        prior: knows what outputs mean.
        first: what ``forward`` returned with the neutral prior.
        second: what it returned with the first prediction as prior.

    Raises:
        MisconfigurationException: ``forward`` returns something else than a tensor.
    """
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        raise MisconfigurationException(
            "prediction='mean' averages outputs, and forward returned a "
            f"{type(first).__name__}. Return the outputs alone, as a tensor (B, ...), or use "
            "prediction='first' or 'second'."
        )
    return prior.mean_output(first, second)


def answer_of(host: IT3Module, prediction: WhichPrediction) -> Answer | None:
    """Return what the engine is to run with adapted weights; ``None``: the first prediction alone.

    Args:
        host: what predicts with a prior.
        prediction: which one becomes the answers, beside the outputs of the neutral pass.
    """
    if prediction == "first":
        return None

    def answer(inputs: Any) -> tuple[Tensor, Tensor]:
        prior = host.it3_prior
        first = host.predict_with(copied(inputs), None)  # the next pass needs them too
        second = host.predict_with(inputs, prior.from_output(first))
        return first, second if prediction == "second" else mean_prediction(prior, first, second)

    return answer


def owned(hook: Any, host: IT3Module) -> bool:
    """Whether a hook is that of a module's conditioning."""
    conditioning = getattr(host, "it3_conditioning", None)
    return isinstance(conditioning, Conditioning) and conditioning.owns(hook)
