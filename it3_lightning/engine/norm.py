"""Which statistics batch-normalisation uses: those of training, or those of the test batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

NormStats = Literal["source", "batch"]


@contextmanager
def norm_statistics(module: nn.Module, norm_stats: NormStats) -> Iterator[None]:
    """Let BatchNorm layers normalise by the batch at hand; running statistics are never written.

    Args:
        module: whose BatchNorm layers.
        norm_stats: ``"source"`` leaves them as they are; ``"batch"`` uses the current batch.
    """
    layers = batch_norms(module) if norm_stats == "batch" else []
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, (training, tracking) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracking


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of a module, of any dimension."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
