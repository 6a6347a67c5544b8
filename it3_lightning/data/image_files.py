"""Labelled images on disk, decoded, and shifted, only when they are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from it3_lightning.data.decoding import Decode
from it3_lightning.data.images import Batch, Change, Images, as_float, check_labels
from it3_lightning.data.sampling import seeded

Names = Sequence[str] | NDArray[np.bytes_]


class ImageFiles(Images):
    """Image files and their labels. A million of them take some 50 MB of names.

    What a shift draws for an image depends on the seed, the shift and the file's name alone: not
    on the other images, their order, the batch, or the worker that reads it.

    Args:
        folder: Where the files are.
        names: Their paths in it, ``N`` of them.
        labels: ``(N,)`` int64, or ``(N, K)`` float32.
        decode: Reads a file; see :mod:`it3_lightning.data.decoding`.
        change: A shift to apply to each image; None for none.
        seed: Of the shift.

    Raises:
        ValueError: The labels are not as many, or of another kind; when a file is read, it is
            damaged.
    """

    def __init__(
        self,
        folder: Path,
        names: Names,
        labels: Tensor,
        decode: Decode,
        *,
        change: Change | None = None,
        seed: int = 0,
    ) -> None:
        check_labels(labels, len(names))
        self.folder = folder
        self.labels = labels
        self.decode = decode
        self.change = change
        self.seed = seed
        # One array: a list of a million strings would be copied into every worker as it is read.
        self._names: NDArray[np.bytes_] = (
            names if isinstance(names, np.ndarray) else np.array([os.fsencode(n) for n in names])
        )

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole batch, float32 ``(B, 3, H, W)`` in [0, 1], and its labels."""
        images = torch.stack([self._image(index) for index in indices])
        return images, self.labels[torch.as_tensor(indices)]

    @property
    def names(self) -> list[str]:
        """Paths of the files in the folder."""
        return [os.fsdecode(name) for name in self._names]

    def path(self, index: int) -> Path:
        """Return the file of a sample."""
        return self.folder / os.fsdecode(self._names[index])

    def select(self, indices: Tensor) -> ImageFiles:
        """Return a new set of the samples at ``indices`` ``(M,)``, in their order."""
        return self._like(names=self._names[indices.numpy()], labels=self.labels[indices])

    def shifted(self, change: Change, seed: int) -> ImageFiles:
        """Return the same files, to be shifted as they are read."""
        return self._like(change=change, seed=seed)

    def elsewhere(self, folder: Path, decode: Decode) -> ImageFiles:
        """Return files of the same names and labels in another folder."""
        return self._like(folder=folder, decode=decode)

    def _like(self, **changed: Any) -> ImageFiles:
        kept = {
            "folder": self.folder,
            "names": self._names,
            "labels": self.labels,
            "decode": self.decode,
            "change": self.change,
            "seed": self.seed,
        }
        return ImageFiles(**{**kept, **changed})

    def _image(self, index: int) -> Tensor:
        image = as_float(self.decode(self.path(index)))
        if self.change is None:
            return image
        name = os.fsdecode(self._names[index])
        generator = seeded(self.seed, self.change.name, self.change.severity, name)
        return self.change(image[None], generator)[0]
