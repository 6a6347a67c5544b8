"""Counts the bytes of live tensors, exactly and deterministically, whoever holds them."""

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made inside that still live, and the most at any time.

    Scratch memory inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if _counts(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _counts(leaf) and _address(leaf) not in before:
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = self._known[storage._cdata] = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, address: int) -> None:
        self.bytes -= self._known.pop(address)

    def restarted(self) -> Self:
        """Count the most from here on, beyond what lives now."""
        self.peak = self.bytes
        self._start = self.bytes
        return self

    @property
    def beyond(self) -> int:
        """The most bytes since the restart, beyond what lived then."""
        return self.peak - self._start


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def size_of(*tensors: Tensor) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
