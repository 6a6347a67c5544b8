"""Views of images that methods compare predictions on, and the random numbers they are drawn by."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.transforms import v2

View = Callable[[Any], Any]
"""Makes a view of inputs ``(B, ...)``, as transforms of torchvision do."""

_LARGE_PRIME = 1_000_003  # so that the steps after one seed are not those after the next


def crop_and_flip(inputs: Any) -> Any:
    """Return images moved by up to an eighth of their size, mirrored or not, all of them alike.

    Args:
        inputs: images ``(B, C, H, W)``, possibly nested; other leaves are handed on.
    """
    return tree_map(_moved, inputs)


def jitter_and_warp(inputs: Any) -> Any:
    """Return images in other colours, turned, moved, scaled, blurred, mirrored and noisy.

    The views of CoTTA's published code (Wang et al., CVPR 2022), without its change of gamma:
    brightness by 0.6 to 1.4, contrast by 0.7 to 1.3, saturation by 0.5 to 1.5, hue by 0.06; turned
    by up to 15 degrees, moved by up to an eighth of the size, scaled by 0.9 to 1.1; blurred by up
    to 0.5 pixels; mirrored or not; noise of 0.005. All images of a batch are changed alike.

    Args:
        inputs: images ``(B, C, H, W)`` in [0, 1] with one or three channels, possibly nested; other
            leaves are handed on.

    Raises:
        ValueError: images with values outside [0, 1], as normalised ones have.
    """
    return tree_map(_warped, inputs)


@contextmanager
def drawn_by(seed: int, step: int, inputs: Any = None) -> Iterator[None]:
    """Let what is drawn within depend on these numbers alone, and put the generators back.

    They are those of torch, of Python and of NumPy.

    Args:
        seed: of a method.
        step: which of its steps draws.
        inputs: on whose devices numbers may be drawn.

    >>> with drawn_by(0, 1):
    ...     first = torch.rand(1)
    >>> with drawn_by(0, 1):
    ...     torch.rand(1) == first
    tensor([True])
    """
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_cuda]
    devices = sorted({tensor.get_device() for tensor in tensors})
    number = (seed * _LARGE_PRIME + step) % 2**32  # torch's generator takes note of 32 bits
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            of_devices = [torch.cuda.default_generators[device] for device in devices]
            for generator in (torch.default_generator, *of_devices):
                generator.manual_seed(number)
            random.seed(number)
            np.random.seed(number)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def is_images(leaf: Any) -> TypeGuard[Tensor]:
    """Whether a leaf of the inputs is images ``(B, C, H, W)``."""
    return isinstance(leaf, Tensor) and leaf.ndim == 4 and leaf.is_floating_point()


def _moved(leaf: Any) -> Any:
    if not is_images(leaf):
        return leaf
    size = list(leaf.shape[-2:])
    crop = v2.RandomCrop(size, padding=[side // 8 for side in reversed(size)])
    return v2.RandomHorizontalFlip()(crop(leaf))


def _warped(leaf: Any) -> Any:
    if not is_images(leaf):
        return leaf
    if leaf.numel() and (leaf.amin() < 0 or leaf.amax() > 1):
        raise ValueError(
            f"jitter_and_warp expects images in [0, 1], got values in [{leaf.amin().item():.3g}, "
            f"{leaf.amax().item():.3g}]. Normalise inside the network, or use crop_and_flip or a "
            "transform of your own."
        )
    height, width = leaf.shape[-2:]
    return v2.Compose(
        [
            v2.ColorJitter((0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (-0.06, 0.06)),
            v2.Pad([width // 2, height // 2], padding_mode="edge"),
            v2.RandomAffine(
                degrees=15,
                translate=(1 / 16, 1 / 16),
                scale=(0.9, 1.1),
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.GaussianBlur(kernel_size=5, sigma=(0.001, 0.5)),
            v2.CenterCrop([height, width]),
            v2.RandomHorizontalFlip(),
            v2.GaussianNoise(sigma=0.005),
        ]
    )(leaf)
