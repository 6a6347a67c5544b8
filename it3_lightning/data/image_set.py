"""Labelled images in memory."""

import torch
from torch import Tensor

from it3_lightning.data.images import Batch, Change, Images, as_float, check_labels
from it3_lightning.data.sampling import seeded

_CHUNK = 1000  # images shifted at once: part of what a seed means, so it is no option


class ImageSet(Images):
    """Images and their labels as two tensors.

    A sample is ``(image, label)``: float32 ``(C, H, W)`` in [0, 1] and an int64 scalar (or float32
    values ``(K,)``). 8-bit images stay 8-bit in memory, or in the memory-mapped file they are a
    view of, and are divided by 255 as they are read.

    Args:
        images: ``(N, C, H, W)``, uint8, or floating point in [0, 1].
        labels: ``(N,)``, int64, or ``(N, K)``, float32.

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
        check_labels(labels, len(images))
        if images.is_floating_point() and images.numel():
            low, high = images.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"Expected images in [0, 1], got {low:.4g} to {high:.4g}. "
                    "Divide by the largest value; normalise inside the model."
                )
        self.images = images
        self.labels = labels

    def __getitem__(self, index: int) -> Batch:
        return as_float(self.images[index].clone()), self.labels[index].clone()

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole batch ``(B, C, H, W)``, ``(B,)``; DataLoader calls this if it is there."""
        chosen = torch.as_tensor(indices)
        return as_float(self.images[chosen]), self.labels[chosen]

    def select(self, indices: Tensor) -> "ImageSet":
        """Return a new set of the samples at ``indices`` ``(M,)``, in their order."""
        return ImageSet(self.images[indices], self.labels[indices])

    def shifted(self, change: Change, seed: int) -> "ImageSet":
        """Apply a shift to all images, in fixed chunks; seed, name and severity fix every draw.

        The result has the source's dtype: 8-bit images stay 8-bit, which rounds a shifted value by
        at most 1/510.
        """
        generator = seeded(seed, change.name, change.severity)
        images = torch.empty_like(self.images)
        for start in range(0, len(images), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            values = change(as_float(self.images[chunk]), generator)
            images[chunk] = (values * 255).round() if images.dtype == torch.uint8 else values
        return ImageSet(images, self.labels)
