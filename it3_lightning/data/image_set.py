"""Labelled images in memory, handed to a DataLoader a whole batch at a time."""

from typing import Any, TypeVar

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from it3_lightning.data.sampling import seeded
from it3_lightning.data.shifts import Shift

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")

_CHUNK = 1000  # images shifted at once: part of what a seed means, so it is no option


class ImageSet(Dataset[Batch]):
    """Images and their labels as two tensors.

    A sample is ``(image, label)``: float32 ``(C, H, W)`` in [0, 1] and an int64 scalar. 8-bit
    images stay 8-bit in memory and are divided by 255 as they are read.

    Args:
        images: ``(N, C, H, W)``, uint8, or floating point in [0, 1].
        labels: ``(N,)``, int64.

    Raises:
        ValueError: A shape, dtype, range or length is another.

    Example:
        >>> images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
        >>> batch = ImageSet(images, torch.arange(3)).__getitems__([1, 2])
        >>> batch[0].flatten()
        tensor([0.2000, 1.0000])
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(
                "Expected images (N, C, H, W) of dtype uint8 or floating point, got "
                f"{tuple(images.shape)} of {images.dtype}. Add an axis for the channels with "
                "images[:, None], or convert with images.float()."
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"Expected one int64 label for each of {len(images)} images, got "
                f"{tuple(labels.shape)} of {labels.dtype}. Pass class numbers: labels.long()."
            )
        if images.is_floating_point() and images.numel():
            low, high = images.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"Expected images in [0, 1], got {low:.4g} to {high:.4g}. "
                    "Divide by the largest value; normalise inside the model."
                )
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return as_float(self.images[index].clone()), self.labels[index].clone()

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole batch ``(B, C, H, W)``, ``(B,)``; DataLoader calls this if it is there."""
        chosen = torch.as_tensor(indices)
        return as_float(self.images[chosen]), self.labels[chosen]

    def select(self, indices: Tensor) -> "ImageSet":
        """Return a new set of the samples at ``indices`` ``(M,)``, in their order."""
        return ImageSet(self.images[indices], self.labels[indices])


def shifted(source: ImageSet, shift: Shift, seed: int) -> ImageSet:
    """Apply a shift to all images, in fixed chunks; seed, name and severity fix every draw.

    The result has the source's dtype: 8-bit images stay 8-bit, which rounds a shifted value by
    at most 1/510.
    """
    generator = seeded(seed, shift.name, shift.severity)
    images = torch.empty_like(source.images)
    for start in range(0, len(images), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        values = shift(as_float(source.images[chunk]), generator)
        images[chunk] = (values * 255).round() if images.dtype == torch.uint8 else values
    return ImageSet(images, source.labels)


def as_float(images: Tensor) -> Tensor:
    """Return images as float32 in [0, 1], dividing 8-bit values by 255."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def whole_batch(batch: Any) -> Any:
    """Pass a batch on as it is: ``__getitems__`` of the data has collated it already."""
    return batch


def loader(
    source: Dataset[T],
    batch_size: int,
    *,
    generator: Generator,
    shuffle: bool = False,
    num_workers: int = 0,
) -> DataLoader[T]:
    """Return a DataLoader with the usual samplers, so that a Trainer can distribute it.

    The source hands over whole batches (``__getitems__``).

    Without a generator of its own, each pass over it would draw from the global random state.
    """
    return DataLoader(
        source,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=whole_batch,
        generator=generator,
    )
