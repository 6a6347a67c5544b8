"""Something else in the place of a module's own methods, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def stood_in(module: nn.Module, **methods: Callable[..., Any]) -> Iterator[None]:
    """Put methods on an instance within; what was there before comes back.

    >>> layer = nn.Identity()
    >>> with stood_in(layer, forward=lambda x: x + 1):
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


@contextmanager
def told_of_calls(tell: Callable[[nn.Module], None]) -> Iterator[None]:
    """Tell of every module that is called within, whichever it is; no module is changed.

    >>> called = []
    >>> with told_of_calls(called.append):
    ...     _ = nn.Identity()(1)
    >>> called
    [Identity()]
    """

    def hook(module: nn.Module, _: Any) -> None:
        tell(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
