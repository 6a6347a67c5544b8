"""How many samples are vectorised at once, so that memory stays within a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WEIGHTS = 2  # copies of the adapting weights a sample has in a single step: gradient and scratch
_MOMENTS = 4  # the same where there are more: weights, gradient, first and second moment
_TRANSIENT = 2  # of what backward keeps: what it makes of it meanwhile


def samples_within(memory: int, *, weights: int, activations: int, single: bool) -> int:
    r"""Return the number of samples, at least one.

    :math:`\lfloor M / (c\,W + 2A) \rfloor` with ``c`` = 2 copies of the weights for a single step
    and 4 for several.

    Args:
        memory: ``M``, bytes that may be used.
        weights: ``W``, bytes of the adapting weights.
        activations: ``A``, bytes that one sample's passes keep for backward.
        single: whether there is one step only, of a named optimizer.

    >>> samples_within(1000, weights=100, activations=25, single=True)
    4
    """
    copies = _WEIGHTS if single else _MOMENTS
    return max(1, memory // max(1, copies * weights + _TRANSIENT * activations))


def bytes_kept(run: Callable[[], Any], module: nn.Module) -> int:
    """Return the bytes that autograd keeps for a backward pass, the module's own tensors aside.

    >>> layer, x = nn.Linear(2, 2), torch.zeros(8, 2)
    >>> bytes_kept(lambda: layer(x).square().sum(), layer)  # x and layer(x), in float32
    128
    """
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())
