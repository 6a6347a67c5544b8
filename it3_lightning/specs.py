"""Priors and conditionings as plain data: ``class_path`` and ``init_args``, as YAML has them.

Checkpoints hold plain data only, so that they load with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from it3_lightning.messages import unknown

T = TypeVar("T")


@runtime_checkable
class Described(Protocol):
    """An object that can tell how it was made."""

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""


def spec(value: Any) -> Any:
    """Return plain data for an object that can tell how it was made; other values unchanged.

    >>> from it3_lightning.priors import ClassPrior
    >>> spec(ClassPrior(3))["class_path"]
    'it3_lightning.priors.ClassPrior'
    """
    if not isinstance(value, Described):
        return value
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class_path": path, "init_args": value.init_args()}


def built(value: Any, kind: type[T]) -> T | None:
    """Return the object a spec describes; an object or ``None`` is returned as it is.

    Only classes that are imported already are built, so that a checkpoint cannot run code.

    Raises:
        TypeError: it is, or describes, something else than ``kind``.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        known = {f"{c.__module__}.{c.__qualname__}": c for c in _subclasses(kind)}
        path = str(value["class_path"])
        if path not in known:
            raise TypeError(f"{unknown(kind.__name__, path, known)} Import its module first.")
        return known[path](**value.get("init_args", {}))
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"Expected a {kind.__name__}, got {type(value).__name__}: {value!r}.")
    return value


def _subclasses(kind: type[T]) -> Iterator[type[T]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
