"""The engine for a module that predicts with a prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from it3_lightning.conditioning import Conditioning
from it3_lightning.engine import BatchAdapter, Enters, SampleAdapter, Settings, adapter
from it3_lightning.engine.untraced import untraced
from it3_lightning.muting import muted
from it3_lightning.protocols import IT3Module
from it3_lightning.snapshot import Snapshot

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
        with muted(module):
            return host.predict_with(inputs_in(given), prior)

    trainable = getattr(module, "it3_trainable", nullcontext)  # frozen while it is fitted
    to_label = host.it3_prior.from_output
    try:
        with trainable():
            made = adapter(module, forward, to_label, settings, enters=_enters(host))
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
    choice = getattr(adapter, "choice", None)
    autocast = torch.is_autocast_enabled(next(iter(adapter.selected.values())).device.type)
    if not autocast or choice is None or choice.backend == "loop":
        return list(tensors)
    with untraced(Snapshot(module)), muted(module), torch.no_grad():
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
