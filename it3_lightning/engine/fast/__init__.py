"""The seam of the fast paths: each computes what the reference computes, faster, or declines.

The engine asks here and imports no fast path. What is not installed, turned off, or does not hold
for a network leaves the engine to itself, with the same numbers. ``IT3_FAST=0`` in the environment
and :func:`disabled` turn all of them off.

=====================  ===========================================================================
``activation_cache``   layers before the prior are not run twice on the same inputs
``vmap``               all samples of a batch at once; ``stacked_weights`` has their weights
``grad_sample``        on the CPU, ``vmap`` finds their first gradients layer by layer
=====================  ===========================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Protocol

from torch import nn

from it3_lightning.engine.types import Enters
from it3_lightning.utils.messages import unknown

_PATHS = ("activation_cache", "grad_sample", "vmap")
_ALL_OFF = frozenset(_PATHS)
_OFF = ContextVar("off", default=_ALL_OFF if os.environ.get("IT3_FAST") == "0" else frozenset())


def enabled(name: str | None = None) -> bool:
    """Return whether adapters that are made now may take a fast path, or any of them."""
    return _OFF.get() < _ALL_OFF if name is None else name not in _OFF.get()


@contextmanager
def disabled(*names: str) -> Iterator[None]:
    """Let adapters that are made within not take these fast paths; without names, none at all.

    Raises:
        ValueError: a name is unknown.

    >>> with disabled():
    ...     enabled()
    False
    """
    for name in names:
        if name not in _ALL_OFF:
            raise ValueError(unknown("fast path", name, _PATHS))
    token = _OFF.set(_OFF.get() | (frozenset(names) or _ALL_OFF))
    try:
        yield
    finally:
        _OFF.reset(token)


def path(name: str) -> Any:
    """Return the module of a fast path, or ``None`` where it is turned off."""
    return import_module(f"{__name__}.{name}") if enabled(name) else None


class Cache(Protocol):
    """Knows what need not be computed twice on the same inputs."""

    hits: int
    """Calls of layers that were answered since this was last set to 0."""

    def clear(self) -> None:
        """Forget the last inputs."""

    def first(self, inputs: Any, version: int, run: Callable[[], Any]) -> Any:
        """Run the first pass, over these inputs by this version of the weights; take note of it."""

    def second(self, inputs: Any, version: int | None, run: Callable[[], Any]) -> Any:
        """Run another pass over these inputs; answer what cannot differ by this version."""


class NoCache:
    """Everything is computed."""

    hits = 0

    def clear(self) -> None:
        """Do nothing."""

    def first(self, inputs: Any, version: int, run: Callable[[], Any]) -> Any:
        """Run it."""
        return run()

    def second(self, inputs: Any, version: int | None, run: Callable[[], Any]) -> Any:
        """Run it."""
        return run()


def cache_of(module: nn.Module, enters: Enters) -> Cache:
    """Return a cache for the passes of a module, or one that knows nothing."""
    found = path("activation_cache")
    cache: Cache | None = None if found is None else found.cache_for(module, enters)
    return NoCache() if cache is None else cache
