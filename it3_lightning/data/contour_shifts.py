"""Seeded perturbations of a contour's nodes, as a poor measurement of the same profile makes them.

Each takes contours ``(B, N, 2)``, a size and a generator, and returns new ones. None changes the
profile itself, so the target stays what it was.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from it3_lightning.data.naca import normals

_WAVES = 4  # along the contour


def noise(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Add Gaussian noise to every node.

    Args:
        contours: ``(B, N, 2)``.
        size: standard deviation in chords.
        generator: source of the noise.
    """
    return contours + size * _normal(contours.shape, contours, generator)


def rotation(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Turn each profile around its quarter chord, as if it lay askew when it was measured.

    Args:
        contours: ``(B, N, 2)``.
        size: largest angle in degrees; each profile draws its own from ``U(-size, size)``.
        generator: source of the angles.

    Example:
        >>> tail = torch.tensor([[[1.0, 0.0]]])
        >>> turned = rotation(tail, 90.0, torch.Generator().manual_seed(0))
        >>> round((turned - torch.tensor([0.25, 0.0])).norm().item(), 6)
        0.75
    """
    draws = torch.rand(len(contours), generator=generator, dtype=contours.dtype)
    angles = math.radians(size) * (2 * draws - 1)
    cosine, sine = angles.cos(), angles.sin()
    turn = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    centre = torch.tensor([0.25, 0.0], dtype=contours.dtype)
    return (contours - centre) @ turn.mT + centre


def roughness(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Bend the contour outwards and inwards in a few smooth waves.

    Args:
        contours: ``(B, N, 2)``.
        size: root mean square of the displacement, in chords.
        generator: source of the waves.
    """
    count, nodes = contours.shape[:2]
    turns = 2 * math.pi * torch.arange(nodes, dtype=contours.dtype) / nodes
    phases = turns[:, None] * torch.arange(1, _WAVES + 1)
    waves = torch.cat([phases.cos(), phases.sin()], dim=1)  # (N, 2 * _WAVES)
    amplitudes = _normal((count, 2 * _WAVES), contours, generator) / math.sqrt(_WAVES)
    return contours + size * (amplitudes @ waves.T)[..., None] * normals(contours)


def resampling(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Move each node along the contour towards the next one.

    Args:
        contours: ``(B, N, 2)``.
        size: largest part of the way; each node draws its own from ``U(0, size)``.
        generator: source of the parts.
    """
    parts = torch.rand((*contours.shape[:2], 1), generator=generator, dtype=contours.dtype)
    return contours + size * parts * (contours.roll(-1, dims=1) - contours)


def _normal(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype)
