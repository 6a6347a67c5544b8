"""Isolation: patches of a module that come off again, and passes that leave no trace in logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection


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


_OF_ANY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, submodules, hooks


@contextmanager
def muted(module: LightningModule) -> Iterator[None]:
    """Silence ``log`` and ``log_dict`` within, and put what a step counts on back afterwards.

    A step that runs twice must count once: the states of torchmetrics, and the module's own
    attributes with the lists, dicts and sets in them.
    """
    counting = [m for m in module.modules() if isinstance(m, Metric | MetricCollection)]
    with silent(module), ExitStack() as stack:
        clones: dict[int, Tensor] = {}
        for owner in (module, *counting):
            stack.enter_context(_kept(owner, clones))
        yield


@contextmanager
def silent(module: LightningModule) -> Iterator[None]:
    """Let ``self.log`` and ``self.log_dict`` do nothing within."""
    attributes: MutableMapping[str, Any] = vars(module)
    own = {name: attributes[name] for name in _LOGGING if name in attributes}
    attributes.update(dict.fromkeys(_LOGGING, _nothing))
    try:
        yield
    finally:
        for name in _LOGGING:
            attributes.pop(name, None)
        attributes.update(own)


@contextmanager
def _kept(owner: nn.Module, clones: dict[int, Tensor]) -> Iterator[None]:
    """Put the attributes of an object back, and what is in its lists, dicts and sets.

    Args:
        owner: whose attributes. Of metrics also what is in containers inside containers: the groups
            of a collection are lists in a dict.
        clones: of tensors seen already: metrics of one group share theirs.
    """
    attributes: MutableMapping[str, Any] = vars(owner)
    saved = {k: v for k, v in attributes.items() if k not in _OF_ANY_MODULE and k not in _LOGGING}
    nested = isinstance(owner, Metric | MetricCollection)
    containers = [c for value in saved.values() for c in _containers(value, nested=nested)]
    contents = [(container, container.copy()) for container in containers]
    tensors = isinstance(owner, Metric)
    for name, value in saved.items() if tensors else ():
        if isinstance(value, Tensor):  # which may be written into, and is what a metric goes by
            attributes[name] = clones.setdefault(id(value), value.detach().clone())
    try:
        yield
    finally:
        attributes.update(saved)
        for container, content in contents:
            _refill(container, content)


def _containers(value: Any, *, nested: bool) -> Iterator[Any]:
    """Return a value that is a list, dict or set, and where ``nested`` those directly in it."""
    if type(value) not in (list, dict, set):
        return
    yield value
    inner = value.values() if isinstance(value, dict) else value
    yield from (v for v in inner if nested and type(v) in (list, dict, set))


def _refill(container: Any, content: Any) -> None:
    """Give a container its former content, in place: others may hold it too."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _nothing(*_: Any, **__: Any) -> None:
    """Log nothing."""
