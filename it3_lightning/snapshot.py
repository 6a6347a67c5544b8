"""Capture and exact restore of a module: parameters, buffers, modes, ``requires_grad``, ``.grad``.

Parameters are held by reference, not copied: adaptation puts *other* storage behind a parameter, so
putting the first one back is exact and costs nothing. Buffers are small and may be written in
place, so they are cloned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Parameter:
    parameter: nn.Parameter
    data: Tensor
    requires_grad: bool
    grad: Tensor | None


@dataclass(frozen=True)
class _Buffer:
    owner: nn.Module
    name: str
    tensor: Tensor
    values: Tensor


@dataclass(frozen=True)
class Snapshot:
    """What a module was, to be put back bit for bit.

    >>> layer = nn.Linear(1, 1)
    >>> before = layer.weight.item()
    >>> snapshot = Snapshot.capture(layer)
    >>> layer.weight.data = torch.ones(1, 1)
    >>> snapshot.restore()
    >>> layer.weight.item() == before
    True
    """

    parameters: tuple[_Parameter, ...]
    buffers: tuple[_Buffer, ...]
    modes: tuple[tuple[nn.Module, bool], ...]

    @classmethod
    def capture(cls, module: nn.Module) -> Snapshot:
        """Take note of everything; only buffers are copied."""
        return cls(
            tuple(_Parameter(p, p.data, p.requires_grad, p.grad) for p in module.parameters()),
            tuple(
                _Buffer(owner, name, buffer, buffer.detach().clone())
                for owner in module.modules()
                for name, buffer in owner._buffers.items()
                if buffer is not None
            ),
            tuple((m, m.training) for m in module.modules()),
        )

    def restore(self) -> None:
        """Put everything back, outside inference mode, so that no inference tensor stays."""
        with torch.inference_mode(False):
            self.restore_parameters()
            self.restore_buffers()
        self.restore_modes()

    def restore_modes(self) -> None:
        """Put each submodule back into training or evaluation mode, as it was."""
        for module, mode in self.modes:
            module.training = mode

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
        """Put each buffer's tensor back, and its values into it."""
        for saved in self.buffers:
            saved.owner._buffers[saved.name] = saved.tensor
            with torch.inference_mode(saved.tensor.is_inference()), torch.no_grad():
                saved.tensor.copy_(saved.values)
