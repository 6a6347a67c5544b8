"""Capture and exact restore of a module: parameters, buffers, attributes and modes, ``.grad``.

Parameters are held by reference, not copied: adaptation puts *other* storage behind a parameter, so
putting the first one back is exact and costs nothing. Buffers are small and may be written in
place, so they are cloned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Parameter:
    parameter: nn.Parameter
    data: Tensor
    requires_grad: bool
    grad: Tensor | None


@dataclass(frozen=True)
class _Buffers:
    owner: nn.Module
    tensors: dict[str, Tensor | None]
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What a module was, to be put back bit for bit.

    Attributes and gradients are kept by reference: what is written *into* them stays.

    >>> layer = nn.Linear(1, 1)
    >>> before = layer.weight.item()
    >>> snapshot = Snapshot.capture(layer)
    >>> layer.weight.data = torch.ones(1, 1)
    >>> snapshot.restore()
    >>> layer.weight.item() == before
    True
    """

    parameters: tuple[_Parameter, ...]
    buffers: tuple[_Buffers, ...]
    attributes: tuple[tuple[nn.Module, dict[str, Any]], ...]

    @classmethod
    def capture(cls, module: nn.Module) -> Snapshot:
        """Take note of everything; only buffers are copied."""
        return cls(
            tuple(_Parameter(p, p.data, p.requires_grad, p.grad) for p in module.parameters()),
            tuple(_buffers(owner) for owner in module.modules()),
            tuple((owner, dict(vars(owner))) for owner in module.modules()),
        )

    def restore(self) -> None:
        """Put everything back, outside inference mode, so that no inference tensor stays."""
        with torch.inference_mode(False):
            self.restore_parameters()
            self.restore_buffers()
        self.restore_attributes()

    def restore_attributes(self) -> None:
        """Put back each attribute that was set, replaced or removed, and so every mode."""
        for owner, before in self.attributes:
            now = vars(owner)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update({k: v for k, v in before.items() if k not in now or now[k] is not v})

    def restore_modes(self) -> None:
        """Put each submodule back into training or evaluation mode, as it was."""
        for module, before in self.attributes:
            if "training" in before:  # a compiled module keeps it elsewhere
                module.training = before["training"]

    def restore_parameters(self) -> None:
        """Put the first storage back behind each parameter, with its flags and its gradient."""
        for saved in self.parameters:
            saved.parameter.data = saved.data
        self.restore_flags()

    def restore_flags(self) -> None:
        """Put back ``requires_grad`` and ``.grad`` of each parameter."""
        for saved in self.parameters:
            saved.parameter.requires_grad_(saved.requires_grad)
            saved.parameter.grad = saved.grad

    def restore_buffers(self) -> None:
        """Put each buffer's tensor back, and its values into it; remove new ones."""
        for saved in self.buffers:
            now = saved.owner._buffers
            for name in [name for name in now if name not in saved.tensors]:
                del now[name]
            now.update(saved.tensors)
            for name, values in saved.values.items():
                _write(saved.tensors[name], values)


def _buffers(owner: nn.Module) -> _Buffers:
    tensors = dict(owner._buffers)
    values = {k: t.detach().clone() for k, t in tensors.items() if t is not None and _writable(t)}
    return _Buffers(owner, tensors, values)


def _writable(tensor: Tensor) -> bool:
    """Whether it can be written in place: not where elements share memory, as after ``expand``."""
    if tensor.layout != torch.strided:
        return True
    shape = zip(tensor.shape, tensor.stride(), strict=True)
    return all(stride > 0 or size <= 1 for size, stride in shape)


def _write(tensor: Tensor | None, values: Tensor) -> None:
    if tensor is not None:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(values)
