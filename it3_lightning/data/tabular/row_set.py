"""Features and targets in memory, handed to a DataLoader a whole batch at a time."""

from __future__ import annotations

from torch import Tensor, as_tensor
from torch.utils.data import Dataset

from it3_lightning.data.images import Batch


class RowSet(Dataset[Batch]):
    """Features ``(N, F)``, float32, and targets: ``(N,)`` int64 classes or ``(N, 1)`` float32.

    >>> import torch
    >>> rows = RowSet(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0]))
    >>> rows.__getitems__([2, 0])
    (tensor([[4., 5.],
            [0., 1.]]), tensor([0, 0]))
    """

    def __init__(self, features: Tensor, target: Tensor) -> None:
        self.features = features
        self.target = target

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> Batch:
        return self.features[index].clone(), self.target[index].clone()

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole batch ``(B, F)``, ``(B, ...)``; DataLoader calls this if it is there."""
        chosen = as_tensor(indices)
        return self.features[chosen], self.target[chosen]

    def select(self, indices: Tensor) -> RowSet:
        """Return a new set of the rows at ``indices`` ``(M,)``, in their order."""
        return RowSet(self.features[indices], self.target[indices])
