"""The engine for a module that predicts with a prior."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from it3_lightning.conditioning import Conditioning
from it3_lightning.engine import BatchAdapter, Enters, SampleAdapter, Settings, adapter
from it3_lightning.muting import muted
from it3_lightning.protocols import IT3Module

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
