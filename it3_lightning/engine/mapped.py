"""Functions of one sample, called for every sample of a batch at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from it3_lightning.engine.samples import batch_size, batched, copied


def mapped(one: Callable[..., Any], dims: tuple[int | None, ...], *given: Any) -> Any:
    """Call ``one`` for every sample of the last argument, a batch of one each.

    Args:
        one: takes the arguments, and returns tensors.
        dims: of the samples in the arguments but the last; ``None``: all samples share it.
        given: the arguments; the last are inputs of a network, ``(B, ...)``.

    >>> import torch
    >>> mapped(lambda scale, x: scale * x.sum(0), (None,), torch.tensor(2.0), torch.ones(3, 1))
    tensor([[2.],
            [2.],
            [2.]])
    """
    *others, inputs = given
    size = batch_size(inputs)
    along = tree_map(lambda leaf: 0 if batched(leaf, size) else None, inputs)

    def with_batch(*arguments: Any) -> Any:
        *rest, sample = arguments
        alone = tree_map(lambda leaf, dim: leaf if dim is None else leaf[None], sample, along)
        return one(*rest, alone)

    return vmap(with_batch, in_dims=(*dims, along))(*others, inputs)


def without_batch(leaf: Tensor) -> Tensor:
    """Take away the dimension of a batch of one, where there is one.

    >>> import torch
    >>> without_batch(torch.ones(1, 2)).shape
    torch.Size([2])
    """
    return leaf[0] if leaf.ndim and leaf.shape[0] == 1 else leaf


class Counted:
    """A forward pass that is counted, and may write into its inputs.

    Args:
        forward: ``(inputs, prior) -> outputs (B, ...)``.
    """

    def __init__(self, forward: Callable[[Any, Tensor | None], Tensor]) -> None:
        self._forward = forward
        self.count = 0

    def __call__(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Run it on a copy of the inputs."""
        self.count += 1
        return self._forward(copied(inputs), prior)
