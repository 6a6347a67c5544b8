"""What a data module needs of a set of images, in memory or on disk: labels, choices, shifts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]


class Change(Protocol):
    """A kind of shift at one severity, a pure function of images and a generator."""

    @property
    def name(self) -> str:
        """Name of the kind."""

    @property
    def severity(self) -> int:
        """1 (weak) to 5 (strong)."""

    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Return changed images ``(B, C, H, W)`` in [0, 1]."""


class Images(Dataset[Batch], ABC):
    """Images and what is to be predicted of each, read a whole batch at a time.

    Attributes:
        labels: ``(N,)`` int64 classes, or ``(N, K)`` float32 values.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch, float32 ``(B, C, H, W)`` in [0, 1], and its labels."""

    @abstractmethod
    def select(self, indices: Tensor) -> Images:
        """Return a new set of the samples at ``indices`` ``(M,)``, in their order."""

    @abstractmethod
    def shifted(self, change: Change, seed: int) -> Images:
        """Return the same samples under a shift; the seed fixes every draw."""


def check_labels(labels: Tensor, count: int) -> None:
    """Refuse labels that are neither a class nor values for each of ``count`` images.

    Raises:
        ValueError: the shape, length or dtype is another.

    >>> check_labels(torch.tensor([[25.0], [61.0]]), 2)
    """
    classes = labels.ndim == 1 and labels.dtype == torch.int64
    values = labels.ndim == 2 and labels.dtype == torch.float32
    if not (classes or values) or len(labels) != count:
        raise ValueError(
            f"Expected one int64 label for each of {count} images, or float32 values (N, K), got "
            f"{tuple(labels.shape)} of {labels.dtype}. Pass class numbers: labels.long(), or "
            "values: values.float()[:, None]."
        )


def as_float(images: Tensor) -> Tensor:
    """Return images as contiguous float32 in [0, 1], dividing 8-bit values by 255.

    >>> as_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    values = images.contiguous().float()
    return values / 255 if images.dtype == torch.uint8 else values
