"""Roads as curves: where they run, how wide they are, how far each pixel is from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from it3_lightning.data.scenes.canvas import grid, uniform

_POINTS = 20  # of a curve
_AWAY = 1e4  # where curves that a scene does not have lie


@dataclass(frozen=True)
class Curves:
    """Curves of several scenes.

    Args:
        points: ``(B, R, P, 2)`` as (x, y).
        width: ``(B, R)``.
    """

    points: Tensor
    width: Tensor

    def distances(self, size: int) -> Tensor:
        """Return the distance of each pixel from each curve, ``(B, R, S, S)``."""
        x, y = grid(size)
        nearest = torch.full((*self.width.shape, size, size), torch.inf)
        starts, ends = self.points[:, :, :-1], self.points[:, :, 1:]
        for start, end in zip(starts.unbind(2), ends.unbind(2), strict=True):
            nearest = torch.minimum(nearest, _from_segment(x, y, start, end))
        return nearest.sqrt()


def roads(scenes: int, size: int, generator: Generator) -> Curves:
    """Draw a road through each scene, perhaps another across it, and up to two that branch off."""
    through = [_through(scenes, size, generator) for _ in range(2)]
    branches = [_branch(road, size, generator) for road in through]
    points = torch.stack([*through, *branches], dim=1)
    chance = torch.tensor([1.0, 0.35, 0.6, 0.35])
    there = torch.rand(scenes, 4, generator=generator) < chance
    there[:, 3] &= there[:, 1]  # it branches off the second
    width = uniform(3.0, 6.5, (scenes, 4), generator)
    width[:, 2:] *= 0.75  # side roads are narrower
    return Curves(torch.where(there[:, :, None, None], points, _AWAY), width)


def lines(scenes: int, size: int, low: float, high: float, generator: Generator) -> Curves:
    """Draw a line through each scene, ``low`` to ``high`` pixels wide: a stream."""
    return Curves(
        _through(scenes, size, generator)[:, None], uniform(low, high, (scenes, 1), generator)
    )


def _through(scenes: int, size: int, generator: Generator) -> Tensor:
    """Draw curves from one side of the scenes to about the other, ``(B, P, 2)``."""
    start = uniform(0, 2 * math.pi, (scenes,), generator)
    end = start + math.pi + uniform(-0.9, 0.9, (scenes,), generator)
    return _bent(_rim(start, size), _rim(end, size), size, generator)


def _branch(road: Tensor, size: int, generator: Generator) -> Tensor:
    """Draw curves that leave a road, at about a right angle, for the rim of the scene."""
    scenes = len(road)
    at = torch.randint(_POINTS // 4, 3 * _POINTS // 4, (scenes,), generator=generator)
    index = torch.arange(scenes)
    start, ahead = road[index, at], road[index, at + 1] - road[index, at]
    side = 1 - 2 * (torch.rand(scenes, generator=generator) < 0.5).float()
    along = torch.atan2(ahead[:, 1], ahead[:, 0])
    angle = along + side * math.pi / 2 + uniform(-0.5, 0.5, (scenes,), generator)
    end = start + 1.2 * size * torch.stack([angle.cos(), angle.sin()], dim=1)
    return _bent(start, end, size, generator)


def _rim(angle: Tensor, size: int) -> Tensor:
    """Return points on a circle around the scene, ``(B, 2)``."""
    return size / 2 + 0.75 * size * torch.stack([angle.cos(), angle.sin()], dim=1)


def _bent(start: Tensor, end: Tensor, size: int, generator: Generator) -> Tensor:
    """Return cubic Bezier curves between points ``(B, 2)``, bent at random: ``(B, P, 2)``."""
    knots = [start + (end - start) * share for share in (0, 1 / 3, 2 / 3, 1)]
    for inner in (1, 2):
        bend = 0.18 * size * torch.randn(start.shape, generator=generator)
        knots[inner] = knots[inner] + bend
    t = torch.linspace(0, 1, _POINTS)[None, :, None]
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    return torch.stack([w * k[:, None] for w, k in zip(weights, knots, strict=True)]).sum(0)


def _from_segment(x: Tensor, y: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return squared distances from segments between ``(B, R, 2)``: ``(B, R, S, S)``."""
    (x0, y0), (dx, dy) = (v[..., None, None].unbind(2) for v in (start, end - start))
    share = ((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2).clamp_min(1e-6)
    share = share.clamp(0, 1)
    return (x - x0 - share * dx) ** 2 + (y - y0 - share * dy) ** 2
