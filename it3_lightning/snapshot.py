"""Capture and exact restore of a module: parameters, buffers, attributes and modes, ``.grad``.

Parameters are held by reference, not copied: adaptation puts *other* storage behind a parameter, so
putting the first one back is exact and costs nothing. Buffers are small and may be written in
place, so they are cloned.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
        self.parameters = list({id(p): p for owner in owners for p in _parameters(owner)}.values())
        self._saved = [(p, p.data, p.requires_grad, p.grad) for p in self.parameters]
        self._attributes = [(owner, dict(vars(owner))) for owner in owners]
        self._buffers = [(owner, dict(owner._buffers), _copied(owner._buffers)) for owner in owners]

    def restore(self) -> None:
        """Put everything back, outside inference mode, so that no inference tensor stays."""
        with torch.inference_mode(False):
            self.restore_parameters()
            self.restore_buffers()
        self.restore_attributes()

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
        for owner, tensors, values in self._buffers:
            now = owner._buffers
            for name in [name for name in now if name not in tensors]:
                del now[name]
            now.update(tensors)
            for name, copy in values.items():
                _write(tensors[name], copy)


def _parameters(owner: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in owner._parameters.values() if parameter is not None]


def _copied(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in buffers.items() if t is not None and _writable(t)}


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
