"""Memory that a call needs at its peak: storages alive at once, beyond what was there before."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


def peak_bytes(run: Callable[[], object], there: Iterable[Tensor]) -> int:
    """Return the largest number of bytes that a call has alive at once, garbage collected before.

    Args:
        run: the call.
        there: tensors of before, not counted; they say on which device.

    >>> def run():
    ...     return (torch.ones(256) + torch.ones(256)).sum()  # three tensors of 1 KiB at once
    >>> peak_bytes(run, [torch.zeros(1)])
    3072
    """
    tensors = list(there)
    gc.collect()
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    storages = _Storages(tensors)
    with storages:
        run()
    return storages.peak


def kept_bytes(run: Callable[[], object], there: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps of a call for its backward pass.

    Args:
        run: the call; returns what holds the graph.
        there: tensors of before, not counted.

    >>> x = torch.ones(256, requires_grad=True)
    >>> kept_bytes(lambda: (x * 2).square().sum(), [x])  # x * 2, 256 floats
    1024
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in there}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = run()
    del graph
    return sum(kept.values())


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every storage that an operation puts out, and asks after each which are still alive."""

    peak: int

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._there = {tensor.untyped_storage()._cdata for tensor in there}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        for key in [key for key, (storage, _) in self._alive.items() if storage.expired()]:  # type: ignore[no-untyped-call]
            del self._alive[key]
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._there and key not in self._alive:
            self._alive[key] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
