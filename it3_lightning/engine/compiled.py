"""A function of tensors, traced once and compiled: what it computes, without the Python around it.

Tracing runs the function as it is, hooks and all, and keeps the tensor operations. So any network
that can be vectorised can be compiled, however its forward is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

_Made = tuple[Callable[..., Any], Any]


class Compiled:
    """Compiles a function for the first shapes that it is called with; others run as they are.

    Args:
        function: of nested tensors, to nested tensors; it must not look at their values.

    >>> doubled = Compiled(lambda x: {"y": 2 * x})
    >>> doubled.shapes is None
    True
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._made: _Made | None = None
        self.shapes: tuple[Any, ...] | None = None

    def __call__(self, *given: Any) -> Any:
        """Call the function.

        Raises:
            RuntimeError: it cannot be compiled.
        """
        leaves, structure = tree_flatten(given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shapes = (structure, *((t.shape, t.dtype, t.device) for t in tensors))
        if self._made is None:
            self._made, self.shapes = self._compile(leaves, structure, tensors), shapes
        if shapes != self.shapes:
            return self._function(*given)
        run, result = self._made
        return tree_unflatten(run(*tensors), result)

    def _compile(self, leaves: list[Any], structure: Any, tensors: list[Tensor]) -> _Made:
        result: Any = None

        def flat(*its: Tensor) -> list[Any]:
            nonlocal result
            rest = iter(its)
            all_leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            values, result = tree_flatten(self._function(*tree_unflatten(all_leaves, structure)))
            return values

        try:
            run = torch.compile(make_fx(flat)(*tensors), dynamic=False)
            run(*tensors)
        except Exception as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise RuntimeError(
                f"compile=True: the adaptation step cannot be compiled here ({cause}). Leave "
                "compile out; the result is the same."
            ) from error
        return run, result
