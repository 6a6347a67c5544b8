"""How many samples are vectorised at once, so that memory stays within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from it3_lightning.engine.first_step import single_step
from it3_lightning.engine.polyak_step import PolyakStep
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.updates import HALF

_TRANSIENT = 2  # of what backward keeps: what it makes of it meanwhile
_MOMENTS = {"sgd": 0, "polyak": 1, "rmsprop": 2, "adam": 2, "adamw": 2}  # and what a step makes
_OWN = 4  # the same of an optimizer that is not known by name


def samples_within(memory: int, *, weights: int, activations: int, copies: int) -> int:
    r"""Return the number of samples, at least one: :math:`\lfloor M / (c\,W + 2A) \rfloor`.

    Args:
        memory: ``M``, bytes that may be used.
        weights: ``W``, bytes of the adapting weights.
        activations: ``A``, bytes that one sample's passes keep for backward.
        copies: ``c``, of the weights that a sample has, see :func:`copies_of_weights`.

    >>> samples_within(1000, weights=100, activations=25, copies=2)
    4
    """
    return max(1, memory // max(1, copies * weights + _TRANSIENT * activations))


def copies_of_weights(settings: Settings) -> int:
    """Return how many copies of the adapting weights a sample has at most.

    A single step needs the gradient, which becomes the weights, and scratch; several need weights,
    gradient, moments, and the weights of samples that stand still; an EMA anchor, clipping and a
    live anchor, whose two passes make a gradient each, need one more.

    >>> copies_of_weights(Settings(lr=1e-4)), copies_of_weights(Settings())  # Adam, Polyak
    (2, 3)
    """
    live = settings.anchor == "live"
    single = single_step(settings)
    if single is not None:  # Polyak's needs the whole gradient before it knows its length
        return 2 + live + isinstance(single, PolyakStep)
    name, _ = settings.moves
    moments = _OWN if callable(name) else _MOMENTS[name]
    return 3 + moments + live + (settings.anchor == "ema") + (settings.grad_clip is not None)


def bytes_of_weights(parameters: Iterable[Tensor]) -> int:
    """Return the bytes of adapting weights; those in half precision have a float32 master.

    >>> bytes_of_weights([torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)])
    30
    """
    return sum(p.numel() * (p.element_size() + 4 * (p.dtype in HALF)) for p in parameters)


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
