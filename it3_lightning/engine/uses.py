"""Tells when one of some parameters is asked for, by whatever code of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Told(dict[str, Any]):
    """A module's ``_parameters`` that tells of each time it is read."""

    told: Callable[[], None]
    names: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        if name in self.names:
            self.told()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def values(self) -> Any:
        self.told()
        return super().values()

    def items(self) -> Any:
        self.told()
        return super().items()


@contextmanager
def told_of_uses(
    owners: Iterable[nn.Module], parameters: Iterable[nn.Parameter], told: Callable[[], None]
) -> Iterator[None]:
    """Call ``told`` whenever one of these parameters is asked of its owner.

    A parameter may be used by other modules than its owner, as attention uses the weights of its
    output projection, whose own ``forward`` never runs.

    Args:
        owners: the modules that have them, of their own.
        parameters: to watch.
        told: called before the parameter is handed out.

    >>> layer, uses = nn.Linear(1, 1), []
    >>> with told_of_uses([layer], [layer.bias], lambda: uses.append("bias")):
    ...     _ = layer.weight, layer.bias
    >>> uses
    ['bias']
    """
    ids, before = {id(parameter) for parameter in parameters}, []
    try:
        for owner in owners:
            own = owner._parameters
            before.append((owner, own))
            watching = _Told(own)
            watching.told = told
            watching.names = frozenset(name for name, p in own.items() if id(p) in ids)
            vars(owner)["_parameters"] = watching
        yield
    finally:
        for owner, own in before:
            vars(owner)["_parameters"] = own
