"""Isolation: patches of a module that come off again, and passes that leave no trace in logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from it3_lightning.engine.restore import counted_once


@contextmanager
def patched(module: nn.Module, **methods: Callable[..., Any]) -> Iterator[None]:
    """Put methods on an instance within; what was there before comes back.

    >>> layer = nn.Identity()
    >>> with patched(layer, forward=lambda x: x + 1):
    ...     inside = layer(1)
    >>> inside, layer(1)
    (2, 1)
    """
    attributes = vars(module)
    before = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name in methods:
            attributes.pop(name, None)
        attributes.update(before)


@contextmanager
def hooked_by(module: nn.Module, kept: Callable[[Any], bool]) -> Iterator[None]:
    """Let only those of a module's own forward hooks run within that are to be kept.

    >>> layer = nn.Identity()
    >>> handle = layer.register_forward_hook(lambda *_: 0)
    >>> with hooked_by(layer, lambda hook: False):
    ...     inside = layer(1)
    >>> inside, layer(1)
    (1, 0)
    """
    hooks = [(own, own.copy()) for own in (module._forward_pre_hooks, module._forward_hooks)]
    try:
        for own, before in hooks:
            for key in [key for key, hook in before.items() if not kept(hook)]:
                del own[key]
        yield
    finally:
        for own, before in hooks:
            own.clear()
            own.update(before)


_LOGGING = ("log", "log_dict")


@contextmanager
def muted(module: LightningModule) -> Iterator[None]:
    """Silence ``log`` and ``log_dict`` within, and put what a step counts on back afterwards.

    A step that runs twice must count once: the states of torchmetrics, whatever else the module and
    its submodules count by, and buffers other than those of normalisation layers.
    """
    with without_logs(module), counted_once(module):
        yield


@contextmanager
def without_logs(module: LightningModule) -> Iterator[None]:
    """Let ``self.log`` and ``self.log_dict`` do nothing within."""
    with patched(module, **dict.fromkeys(_LOGGING, _nothing)):
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """Log nothing."""
