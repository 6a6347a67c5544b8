"""What a forward pass leaves behind besides its outputs: attributes, buffers, random draws."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_CONTAINERS = (list, tuple, set, deque)


class Traces:
    """Takes note of a module, its inputs and the random state, to tell later what has changed.

    Args:
        module: about to run.
        inputs: of the run.
        thorough: also look at attributes and buffers of every submodule.

    >>> layer, x = nn.BatchNorm1d(2), torch.ones(3, 2)
    >>> traces = Traces(layer, x, True)
    >>> _ = layer(x)
    >>> traces.written(), traces.disturbed()
    (True, False)
    """

    def __init__(self, module: nn.Module, inputs: Any, thorough: bool) -> None:
        self._module = module
        self._inputs = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self._versions = [tensor._version for tensor in self._inputs]
        self._random = _random_state()
        self._state = _state(module) if thorough else {}

    def written(self) -> bool:
        """Whether an attribute or a buffer has changed."""
        return self._state != _state(self._module)

    def disturbed(self) -> bool:
        """Whether the inputs were written into, or random numbers drawn."""
        if [tensor._version for tensor in self._inputs] != self._versions:
            return True
        return any(
            not torch.equal(a, b) for a, b in zip(self._random, _random_state(), strict=True)
        )


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state())
    return states


def _state(module: nn.Module) -> dict[tuple[int, str], Any]:
    """Return what tells apart two states of every attribute, one level into containers."""
    return {
        (id(owner), name): (id(value), _inside(value))
        for owner in module.modules()
        for name, value in vars(owner).items()
    }


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: (id(item), _version(item)) for key, item in value.items()}
    if isinstance(value, _CONTAINERS):
        return [(id(item), _version(item)) for item in value]
    return _version(value)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
