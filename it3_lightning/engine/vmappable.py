"""What ``torch.func`` cannot take as it comes, computed in operations that it can take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

_Result = TypeVar("_Result")


@contextmanager
def vmappable(module: nn.Module) -> Iterator[None]:
    """Let a network run by operations that have a batching rule; the numbers are the same.

    Recurrent layers get the zero state that they would make themselves, as one that ``vmap`` knows
    of, and no fused kernels; on the CPU so does attention. What torch has no rule for runs sample
    by sample, which it warns of; the choice of a backend is made by the time taken.
    """
    patched = [m for m in recurrent_layers(module) if "forward" not in vars(m)]
    with warnings.catch_warnings(), plain_attention(module):
        warnings.filterwarnings("ignore", message="There is a performance drop")
        try:
            for layer in patched:
                vars(layer)["forward"] = partial(_recurrent, layer, layer.forward)
            yield
        finally:
            for layer in patched:
                vars(layer).pop("forward", None)


@contextmanager
def plain_attention(module: nn.Module) -> Iterator[None]:
    """Let the attention of a network on the CPU run unfused, as ``vmap`` needs it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def recurrent_layers(module: nn.Module) -> list[nn.Module]:
    """Return the recurrent layers and cells of a network."""
    return [m for m in module.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]


def without_graph(run: Callable[..., _Result], *arguments: Any) -> _Result:
    """Run inside ``vmap`` without a graph, but by the operations that a graph is made of.

    Outside of ``torch.func.grad``, recurrent layers are single operations without a rule.
    """

    def beside(nothing: Tensor) -> tuple[Tensor, _Result]:
        with torch.no_grad():
            return nothing, run(*arguments)

    result: _Result = grad(beside, has_aux=True)(torch.zeros(()))[1]
    return result


def _recurrent(layer: nn.Module, own: Callable[..., Any], inputs: Any, hx: Any = None) -> Any:
    """Run a recurrent layer, by a state of its own where it is given none."""
    if hx is None and isinstance(inputs, Tensor):
        hx = _zeros(layer, inputs)
    fused = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        with torch.backends.cudnn.flags(enabled=False):
            return own(inputs, hx)
    finally:
        torch._C._set_mkldnn_enabled(fused)


def _zeros(layer: Any, inputs: Tensor) -> Any:
    if isinstance(layer, nn.RNNCellBase):
        state = inputs.new_zeros(*inputs.shape[:-1], layer.hidden_size)
        return (state, state) if isinstance(layer, nn.LSTMCell) else state
    batch = [] if inputs.ndim == 2 else [inputs.shape[0 if layer.batch_first else 1]]
    depth = layer.num_layers * (2 if layer.bidirectional else 1)
    state = inputs.new_zeros(depth, *batch, layer.proj_size or layer.hidden_size)
    if not isinstance(layer, nn.LSTM):
        return state
    return state, inputs.new_zeros(depth, *batch, layer.hidden_size)
