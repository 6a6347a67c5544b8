"""Priors and conditionings as plain data: ``class_path`` and ``init_args``, as YAML has them.

Checkpoints hold plain data only, so that they load with ``weights_only=True``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from it3_lightning.utils.messages import unknown

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
    if not isinstance(value, Described) or isinstance(value, type):
        return value
    return {"class_path": public_path(type(value)), "init_args": value.init_args()}


def without_address(value: Any) -> str:
    """Return a representation that is the same in every process.

    >>> without_address([object()])
    '[<object object>]'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def built(value: Any, kind: type[T]) -> T | None:
    """Return the object a spec describes; an object or ``None`` is returned as it is.

    Only classes that are imported already are built, so that a checkpoint cannot run code.

    Raises:
        TypeError: it is, or describes, something else than ``kind``.

    >>> from it3_lightning.priors import ClassPrior, Prior
    >>> built({"class_path": "it3_lightning.priors.ClassPrior", "init_args": {"num_classes": 3}},
    ...       Prior).channels
    3
    """
    if isinstance(value, Mapping) and "class_path" in value:
        return _class_at(str(value["class_path"]), kind)(**value.get("init_args", {}))
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"Expected a {kind.__name__}, got {type(value).__name__}: {value!r}.")
    return value


def public_path(kind: type) -> str:
    """Return where a class is imported from: its package, if that exports it, else its module.

    >>> public_path(Described)
    'it3_lightning.utils.specs.Described'
    """
    package = kind.__module__.rpartition(".")[0]
    # The package above the library itself exports too, but a class belongs to its own chapter.
    if "." in package and getattr(sys.modules.get(package), kind.__qualname__, None) is kind:
        return f"{package}.{kind.__qualname__}"
    return _path(kind)


def _class_at(path: str, kind: type[T]) -> type[T]:
    """Return the subclass at a path: where it is defined, or any module that exports it."""
    subclasses = list(_subclasses(kind))
    module, _, name = path.rpartition(".")
    exported = vars(sys.modules.get(module, object)).get(name)
    for subclass in subclasses:
        if subclass is exported or _path(subclass) == path:
            return subclass
    known = [public_path(subclass) for subclass in subclasses]
    raise TypeError(f"{unknown(kind.__name__, path, known)} Import its module first.")


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _subclasses(kind: type[T]) -> Iterator[type[T]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
