"""What a forward pass leaves behind besides its outputs: in attributes, inputs, random states."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from it3_lightning.selection import OWN

_DEPTH = 3  # of containers and objects inside attributes
_HOOKS = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
_CONTAINERS = (list, tuple, set, frozenset, deque)

Marks = list[tuple[Any, Any]]
"""Objects, kept alive so that no other takes their address, and what else tells their state."""


class Traces:
    """Takes note of a module, its inputs and the random state, to tell later what has changed.

    Args:
        module: about to run.
        inputs: of the run.
        thorough: also look at the attributes and buffers of every submodule.

    >>> layer, x = nn.BatchNorm1d(2), torch.ones(3, 2)
    >>> traces = Traces(layer, x, True)
    >>> _ = layer(x)
    >>> traces.written(), traces.disturbed()
    (True, False)
    """

    def __init__(self, module: nn.Module, inputs: Any, thorough: bool) -> None:
        self._module = module
        self._inputs = inputs
        self._given = _inputs(inputs)
        self._random = _random_state()
        self._state = state(module) if thorough else []
        self._values = _values(module) if thorough else []
        self._python = random.getstate() if thorough else None

    def written(self) -> bool:
        """Whether an attribute or a buffer has changed, or Python's random state."""
        if differ(self._state, state(self._module)):
            return True
        values = zip(self._values, _values(self._module), strict=True)
        return any(not torch.equal(a, b) for a, b in values) or random.getstate() != self._python

    def disturbed(self) -> bool:
        """Whether the inputs were written into, or random numbers drawn."""
        drawn = zip(self._random, _random_state(), strict=True)
        return self.spoilt() or any(not torch.equal(a, b) for a, b in drawn)

    def spoilt(self) -> bool:
        """Whether the inputs were written into."""
        return differ(self._given, _inputs(self._inputs))


def state(module: nn.Module) -> Marks:
    """Note every attribute of every submodule but this library's own, which each pass sets."""
    marks: Marks = []
    for owner in _foreign(module):
        for name, value in vars(owner).items():
            if name in _HOOKS:
                continue
            marks += ((each, (name, mark)) for each, mark in _noted(value, _DEPTH))
    return marks


def differ(before: Marks, after: Marks) -> bool:
    """Whether two notes are of different states."""
    if len(before) != len(after):
        return True
    pairs = zip(before, after, strict=True)
    return any(a is not b or mark != now for (a, mark), (b, now) in pairs)


def _foreign(module: nn.Module) -> Iterator[nn.Module]:
    parts = [part for name, part in module.named_children() if name.startswith(OWN)]
    own = {id(m) for part in parts for m in part.modules()}
    return (m for m in module.modules() if id(m) not in own)


def _noted(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Note a value and, to a depth, what is inside."""
    if isinstance(value, Tensor):
        yield value, -1 if value.is_inference() else value._version
    elif isinstance(value, torch.Generator):
        yield value, value.get_state().numpy().tobytes()
    elif isinstance(value, nn.Module):
        yield value, None
    else:
        inside = _inside(value) if depth else []
        yield value, len(inside)
        for item in inside:
            yield from _noted(item, depth - 1)


def _inside(value: Any) -> list[Any]:
    """Return what a container holds, or an object in its attributes."""
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    if isinstance(value, _CONTAINERS):
        return list(value)
    if isinstance(value, type | ModuleType):
        return []
    return list(getattr(value, "__dict__", {}).values())


def _inputs(inputs: Any) -> Marks:
    return [mark for leaf in tree_leaves(inputs) for mark in _noted(leaf, _DEPTH)]


def _values(module: nn.Module) -> list[Tensor]:
    """Copy the values of the buffers, as bytes: writing into ``.data`` counts no version."""
    return [
        buffer.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        for buffer in module.buffers()
        if buffer.layout == torch.strided and not buffer.is_quantized
    ]


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state())
    return states
