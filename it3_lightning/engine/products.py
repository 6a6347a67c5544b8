"""Gradients of many samples as products of thin matrices, multiplied out piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 16  # elements that are multiplied out at once, so that they stay in the cache
_COLUMNS = 1 << 16  # elements of a right factor that all samples may have at once


@dataclass(frozen=True)
class Product:
    """The products of two factors, ``(B, O, L)`` and ``(B, L, K)``, one for each sample.

    Args:
        left: ``(B, O, L)``.
        inputs: ``(B, ...)``, whose elements the other factor is made of.
        right: returns the other factor, of some of the inputs.

    >>> product = Product(torch.tensor([[[1.0], [2.0]]]), torch.ones(1, 3), lambda x: x[:, None])
    >>> product.whole((2, 3)), product.bound()
    (tensor([[[1., 1., 1.],
             [2., 2., 2.]]]), tensor([2.]))
    """

    left: Tensor
    inputs: Tensor
    right: Callable[[Tensor], Tensor]

    def bound(self) -> Tensor:
        """Return ``(B,)``, what no element of a sample's product is larger than in size."""
        both = (each.flatten(1).abs().amax(1) for each in (self.left, self.inputs))
        return self.left.shape[-1] * next(both) * next(both)

    def whole(self, shape: tuple[int, ...]) -> Tensor:
        """Return all products ``(B, *shape)``."""
        first = self.right(self.inputs[:1])
        if first.numel() <= _COLUMNS:
            return torch.bmm(self.left, self.right(self.inputs)).view(-1, *shape)
        out = self.left.new_empty(len(self.left), self.left.shape[1], first.shape[-1])
        for row, left in enumerate(self.left):
            torch.mm(left, self.right(self.inputs[row : row + 1])[0], out=out[row])
        return out.view(-1, *shape)

    def pieces(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield sample, rows of its product and these rows, ``(O', K)``, sample by sample."""
        for row, left in enumerate(self.left):
            right = self.right(self.inputs[row : row + 1])[0]
            pieces = -(-len(left) * right.shape[-1] // _PIECE)
            rows = -(-len(left) // pieces)
            for start in range(0, len(left), rows):
                part = slice(start, start + rows)
                yield row, part, torch.mm(left[part], right)
