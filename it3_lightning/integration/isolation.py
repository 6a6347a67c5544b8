"""Isolation: patches of a module that come off again, and passes that leave no trace in logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from it3_lightning.engine.restore import counted_once


class patched:  # noqa: N801  # read as a context
    """Puts methods on an instance within; what was there before comes back.

    >>> layer = nn.Identity()
    >>> with patched(layer, forward=lambda x: x + 1):
    ...     inside = layer(1)
    >>> inside, layer(1)
    (2, 1)
    """

    def __init__(self, module: nn.Module, **methods: Callable[..., Any]) -> None:
        self._attributes = vars(module)
        self._methods = methods

    def __enter__(self) -> None:
        """Put them there."""
        attributes = self._attributes
        self._before = {name: attributes[name] for name in self._methods if name in attributes}
        attributes.update(self._methods)

    def __exit__(self, *_: object) -> None:
        """Take them away."""
        for name in self._methods:
            self._attributes.pop(name, None)
        self._attributes.update(self._before)


class hooked_by:  # noqa: N801  # read as a context
    """Lets only those of a module's own forward hooks run within that are to be kept.

    >>> layer = nn.Identity()
    >>> handle = layer.register_forward_hook(lambda *_: 0)
    >>> with hooked_by(layer, lambda hook: False):
    ...     inside = layer(1)
    >>> inside, layer(1)
    (1, 0)
    """

    def __init__(self, module: nn.Module, kept: Callable[[Any], bool]) -> None:
        self._kept = kept
        self._hooks = (module._forward_pre_hooks, module._forward_hooks)

    def __enter__(self) -> None:
        """Take the others off."""
        self._before = [(own, own.copy()) for own in self._hooks]
        for own, before in self._before:
            for key in [key for key, hook in before.items() if not self._kept(hook)]:
                del own[key]

    def __exit__(self, *_: object) -> None:
        """Put them on again."""
        for own, before in self._before:
            own.clear()
            own.update(before)


_LOGGING = ("log", "log_dict")


def without_logs(module: LightningModule) -> patched:
    """Let ``self.log`` and ``self.log_dict`` do nothing within."""
    return patched(module, **dict.fromkeys(_LOGGING, _nothing))


class muted:  # noqa: N801  # read as a context
    """Silences ``log`` and ``log_dict`` within, and puts what a step counts on back afterwards.

    A step that runs twice must count once: the states of torchmetrics, whatever else the module and
    its submodules count by, and buffers other than those of normalisation layers.
    """

    def __init__(self, module: LightningModule) -> None:
        self._silent = without_logs(module)
        self._module = module

    def __enter__(self) -> None:
        """Begin."""
        self._counted = counted_once(self._module)
        self._counted.__enter__()
        self._silent.__enter__()

    def __exit__(self, *_: object) -> None:
        """Put it back."""
        self._silent.__exit__()
        self._counted.__exit__()


def _nothing(*_: Any, **__: Any) -> None:
    """Log nothing."""
