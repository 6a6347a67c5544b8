"""Restore: snapshot of a module, swapped weights, norm statistics, random state; all put back.

Parameters are held by reference, not copied: adaptation puts *other* storage behind a parameter, so
putting the first one back is exact and costs nothing. Buffers are small and may be written in
place, so they are cloned.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from it3_lightning.engine.types import Isolation, NormStats


class Snapshot:
    """What a module was, to be put back bit for bit.

    Attributes and gradients are kept by reference: what is written *into* them stays.

    Args:
        module: of which everything is noted; only buffers are copied.

    >>> layer = nn.Linear(1, 1)
    >>> before = layer.weight.item()
    >>> snapshot = Snapshot(layer)
    >>> layer.weight.data = torch.ones(1, 1)
    >>> snapshot.restore()
    >>> layer.weight.item() == before
    True
    """

    def __init__(self, module: nn.Module) -> None:
        owners = list(module.modules())
        self.parameters = list(
            {id(p): p for owner in owners for p in _parameters_of(owner)}.values()
        )
        self._saved = [(p, p.data, p.requires_grad, p.grad) for p in self.parameters]
        self._attributes = [(owner, dict(vars(owner))) for owner in owners]
        self._buffers = [(owner, dict(owner._buffers), _copies(owner._buffers)) for owner in owners]

    def restore(self) -> None:
        """Put everything back, outside inference mode, so that no inference tensor stays."""
        with torch.inference_mode(False):
            self.restore_parameters()
            self.restore_buffers()
        self.restore_attributes()

    def detach_parameters(self) -> None:
        """Let no parameter need a gradient or have one, until it is put back."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    def restore_attributes(self) -> None:
        """Put back each attribute that was set, replaced or removed, and so every mode."""
        for owner, before in self._attributes:
            now = vars(owner)
            same = list(now) == list(before)
            if same and all(map(operator.is_, now.values(), before.values())):
                continue
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)

    def restore_modes(self) -> None:
        """Put each submodule back into training or evaluation mode, as it was."""
        for owner, before in self._attributes:
            mode = before.get("training")  # a compiled module keeps it elsewhere
            if mode is not None and owner.training is not mode:
                owner.training = mode

    def restore_parameters(self) -> None:
        """Put the first storage back behind each parameter, with its flags and its gradient."""
        for parameter, data, _, _ in self._saved:
            parameter.data = data
        self.restore_flags()

    def restore_flags(self) -> None:
        """Put back ``requires_grad`` and ``.grad`` of each parameter."""
        for parameter, _, requires_grad, gradient in self._saved:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    def restore_buffers(self) -> None:
        """Put each buffer's tensor back, and its values into it; remove new ones."""
        into: list[Tensor] = []
        values: list[Tensor] = []
        for owner, tensors, copies in self._buffers:
            now = owner._buffers
            for name in [name for name in now if name not in tensors]:
                del now[name]
            now.update(tensors)
            into += [tensor for n, tensor in tensors.items() if n in copies and tensor is not None]
            values += copies.values()
        if into:
            _write(into, values)


def _parameters_of(owner: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in owner._parameters.values() if parameter is not None]


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in buffers.items() if t is not None and _writable(t)}


def _writable(tensor: Tensor) -> bool:
    """Whether it can be written in place: not where elements share memory, as after ``expand``."""
    if tensor.layout != torch.strided:
        return True
    shape = zip(tensor.shape, tensor.stride(), strict=True)
    return all(stride > 0 or size <= 1 for size, stride in shape)


def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Write values into tensors; those of inference mode can be written within it only."""
    with torch.no_grad():
        inference = [tensor.is_inference() for tensor in tensors]
        if not any(inference):
            torch._foreach_copy_(tensors, values)
            return
        for tensor, copy, within in zip(tensors, values, inference, strict=True):
            with torch.inference_mode(within):
                tensor.copy_(copy)


@contextmanager
def undisturbed_rng() -> Iterator[None]:
    """Put the CPU's generator and the current accelerator's back on leaving.

    >>> before = torch.get_rng_state()
    >>> with undisturbed_rng():
    ...     _ = torch.rand(3)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cpu, device = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)


@contextmanager
def without_side_effects(snapshot: Snapshot, isolation: Isolation = nullcontext) -> Iterator[None]:
    """Undo what passes write, outside inference mode and with gradients on.

    Args:
        snapshot: of the module that runs within.
        isolation: undoes what else its passes do, as logging.
    """
    with torch.inference_mode(False), torch.enable_grad(), undisturbed_rng(), isolation():
        try:
            yield
        finally:
            snapshot.restore_buffers()
            snapshot.restore_attributes()
            snapshot.restore_flags()
            torch.clear_autocast_cache()


@contextmanager
def norm_statistics(module: nn.Module, norm_stats: NormStats) -> Iterator[None]:
    """Let BatchNorm layers normalise by the batch at hand; running statistics are never written.

    Args:
        module: whose BatchNorm layers.
        norm_stats: ``"source"`` leaves them as they are; ``"batch"`` uses the current batch.
    """
    layers = batch_norms(module) if norm_stats == "batch" else []
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, (training, tracking) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracking


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of a module, of any dimension."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
