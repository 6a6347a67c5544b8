"""What all parts of a scene are drawn with: pixel coordinates, smooth noise, paint.

Tensors of a scene are float32: images ``(B, 3, S, S)`` in [0, 1], layers ``(B, 1, S, S)``, one
number per scene ``(B, 1, 1, 1)``. Lengths are in pixels, angles in radians. Every draw comes from
the generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def uniform(low: float, high: float, shape: Sequence[int], generator: Generator) -> Tensor:
    """Draw numbers from ``U(low, high)``."""
    return low + (high - low) * torch.rand(tuple(shape), generator=generator)


def grid(size: int) -> tuple[Tensor, Tensor]:
    """Return the columns ``x`` and rows ``y`` of all pixels, each ``(1, 1, S, S)``.

    >>> grid(2)[0].flatten()
    tensor([0., 1., 0., 1.])
    """
    line = torch.arange(size, dtype=torch.float32)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return columns[None, None], rows[None, None]


def noise(scenes: int, size: int, cell: float, generator: Generator, channels: int = 1) -> Tensor:
    """Draw smooth noise of mean about 0 and deviation about 1: normal values, interpolated.

    Args:
        scenes: number ``B``.
        size: of the scene, ``S``.
        cell: distance between the drawn values.
        generator: of all draws.
        channels: number ``C``.

    Returns:
        ``(B, C, S, S)``.
    """
    knots = max(2, round(size / cell) + 1)
    coarse = torch.randn(scenes, channels, knots, knots, generator=generator)
    fine = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return fine / 0.7  # interpolation between knots averages


def paint(image: Tensor, color: Tensor, cover: Tensor) -> Tensor:
    """Lay a colour over an image where ``cover`` ``(B, 1, S, S)`` is 1, and mix where it is less.

    >>> paint(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), torch.full((1, 1, 1, 1), 0.25)).sum()
    tensor(0.7500)
    """
    return image + cover * (color - image)


def edge(distance: Tensor, softness: float = 1.0) -> Tensor:
    """Return the cover of a shape from the distance to its rim, negative inside: 1 to 0.

    >>> edge(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([1.0000, 0.5000, 0.0000])
    """
    return (0.5 - distance / softness).clamp(0, 1)


def moved(layer: Tensor, shift: Tensor) -> Tensor:
    """Translate layers by a shift ``(B, 2)`` (x, y) in pixels: shadows lie beside what casts them.

    >>> layer = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
    >>> moved(layer, torch.tensor([[1.0, 0.0]])).flatten()
    tensor([0., 1., 0., 0.])
    """
    size = layer.shape[-1]
    theta = torch.eye(2, 3).repeat(layer.shape[0], 1, 1)
    theta[:, :, 2] = -2 * shift / size
    where = F.affine_grid(theta, list(layer.shape), align_corners=False)
    return F.grid_sample(layer, where, align_corners=False)


def palette(
    colors: Sequence[Sequence[float]], shape: Sequence[int], generator: Generator
) -> Tensor:
    """Draw one of the colours for each place, varied a little: ``(*shape, 3)``."""
    chosen = torch.randint(len(colors), tuple(shape), generator=generator)
    light = 0.04 * torch.randn(*shape, 1, generator=generator)
    tint = 0.015 * torch.randn(*shape, 3, generator=generator)
    return (torch.tensor(colors)[chosen] + light + tint).clamp(0, 1)
