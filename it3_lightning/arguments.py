"""The arguments of calls: brought into one form, and compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from it3_lightning.graphs import is_graph


def by_name(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Return arguments by name, however they are given.

    Raises:
        TypeError: the function does not take them.

    >>> by_name(lambda x, y: x, (1,), {"y": 2}) == by_name(lambda x, y: x, (1, 2), {})
    True
    """
    return dict(inspect.signature(function).bind(*args, **kwargs).arguments)


def same(a: Any, b: Any) -> bool:
    """Whether two structures of arguments are equal, to the last bit.

    >>> same({"x": torch.ones(1)}, {"x": torch.ones(1)}), same((1,), [1])
    (True, False)
    """
    (mine, structure), (theirs, other) = tree_flatten(a), tree_flatten(b)
    return structure == other and all(map(_equal, mine, theirs))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and torch.equal(a, b)
    if is_graph(a) and is_graph(b):
        return same([dict(store) for store in a.stores], [dict(store) for store in b.stores])
    return a is b or (isinstance(a, str | int | float) and type(a) is type(b) and a == b)
