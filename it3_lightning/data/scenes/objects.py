"""What stands on the ground: buildings beside the roads, trees beside and over them, shadows."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from it3_lightning.data.scenes.canvas import edge, grid, moved, noise, paint, palette, uniform
from it3_lightning.data.scenes.curves import Curves

_HOUSES = 7
_TREES = 26
_ROOFS = (
    (0.52, 0.29, 0.22),  # tiles
    (0.45, 0.36, 0.30),
    (0.47, 0.47, 0.48),  # slate, as grey as asphalt
    (0.66, 0.66, 0.65),  # gravel, as bright as concrete
    (0.80, 0.80, 0.78),
)
_LEAVES = torch.tensor([0.17, 0.27, 0.13]).view(1, 3, 1, 1)
_SHADOW = torch.tensor([0.42, 0.45, 0.55]).view(1, 3, 1, 1)


def shaded(image: Tensor, cover: Tensor, sun: Tensor, height: float) -> Tensor:
    """Darken an image where a layer ``(B, 1, S, S)`` casts its shadow.

    Args:
        image: ``(B, 3, S, S)``.
        cover: of what stands there.
        sun: ``(B, 2)``, the shadow of something one pixel high.
        height: of what stands there.
    """
    fallen = [moved(cover, sun * height * share) for share in (0.4, 0.7, 1.0)]
    shadow = torch.stack(fallen).amax(0)
    return image * (1 - shadow * (1 - _SHADOW))


def buildings(
    image: Tensor, roads: Curves, free: Tensor, sun: Tensor, generator: Generator
) -> Tensor:
    """Build houses along the roads, none on a road.

    Args:
        image: ``(B, 3, S, S)``.
        roads: along which.
        free: distance ``(B, 1, S, S)`` from the rim of the nearest road.
        sun: see :func:`shaded`.
        generator: of all draws.
    """
    scenes, size = len(image), image.shape[-1]
    colors = palette(_ROOFS, (scenes, _HOUSES), generator)
    centers, angles = _sites(roads, generator)
    sides = uniform(3.0, 7.0, (scenes, _HOUSES, 2), generator)
    settled = torch.rand(scenes, 1, generator=generator) < 0.6
    there = settled & (torch.rand(scenes, _HOUSES, generator=generator) < 0.7)
    covers = _rectangles(size, centers, angles, sides) * there[:, :, None, None]
    covers = covers * edge(1.5 - free)
    image = shaded(image, covers.amax(1, keepdim=True), sun, 3.0)
    for house in range(_HOUSES):
        color = colors[:, house, :, None, None]
        image = paint(image, color, covers[:, house : house + 1])
    return image


def trees(image: Tensor, roads: Curves, sun: Tensor, generator: Generator) -> Tensor:
    """Plant trees, half of them beside a road, where crowns and shadows hide some of it."""
    scenes, size = len(image), image.shape[-1]
    beside, _ = _sites(roads, generator, count=_TREES, nearest=-0.5, farthest=5.0)
    anywhere = uniform(0, size, (scenes, _TREES, 2), generator)
    by_road = torch.rand(scenes, _TREES, 1, generator=generator) < 0.6
    centers = torch.where(by_road, beside, anywhere)
    density = torch.rand(scenes, 1, generator=generator)
    there = torch.rand(scenes, _TREES, generator=generator) < density
    radii = uniform(1.5, 4.5, (scenes, _TREES), generator)
    x, y = grid(size)
    offsets = [c[:, :, None, None] for c in centers.unbind(2)]
    distance = ((x - offsets[0]) ** 2 + (y - offsets[1]) ** 2).sqrt() - radii[:, :, None, None]
    distance = torch.where(there[:, :, None, None], distance, torch.inf).amin(1, keepdim=True)
    crowns = edge(distance + 0.8 * noise(scenes, size, 2.5, generator), 1.5)
    image = shaded(image, crowns, sun, 2.5)
    texture = 1 + 0.22 * noise(scenes, size, 2.0, generator)
    return paint(image, _LEAVES * texture, crowns)


def _sites(
    roads: Curves,
    generator: Generator,
    *,
    count: int = _HOUSES,
    nearest: float = 4.0,
    farthest: float = 9.0,
) -> tuple[Tensor, Tensor]:
    """Choose places beside roads, ``(B, count, 2)``, and the directions of the roads there.

    ``nearest`` and ``farthest`` are measured from the rim of the road.
    """
    scenes, number, points, _ = roads.points.shape
    shape = (scenes, count)
    road = torch.randint(number, shape, generator=generator)
    at = torch.randint(points - 1, shape, generator=generator)
    scene = torch.arange(scenes)[:, None]
    here, ahead = roads.points[scene, road, at], roads.points[scene, road, at + 1]
    step = ahead - here
    angle = torch.atan2(step[..., 1], step[..., 0])
    side = 1 - 2 * (torch.rand(shape, generator=generator) < 0.5).float()
    away = roads.width[scene, road] / 2 + uniform(nearest, farthest, shape, generator)
    normal = torch.stack([-angle.sin(), angle.cos()], dim=2)
    along = torch.rand(*shape, 1, generator=generator)
    return here + along * step + (side * away)[:, :, None] * normal, angle


def _rectangles(size: int, centers: Tensor, angles: Tensor, sides: Tensor) -> Tensor:
    """Return the covers ``(B, N, S, S)`` of turned rectangles; ``sides`` are half lengths."""
    x, y = grid(size)
    cx, cy = (c[:, :, None, None] for c in centers.unbind(2))
    cos, sin = angles.cos()[:, :, None, None], angles.sin()[:, :, None, None]
    along = ((x - cx) * cos + (y - cy) * sin).abs() - sides[:, :, 0, None, None]
    across = ((y - cy) * cos - (x - cx) * sin).abs() - sides[:, :, 1, None, None]
    return edge(torch.maximum(along, across))


def sunlight(scenes: int, generator: Generator) -> Tensor:
    """Draw where shadows fall, ``(B, 2)``: 0.5 to 1.2 pixels for each of height, any direction."""
    angle = uniform(0, 2 * math.pi, (scenes,), generator)
    length = uniform(0.5, 1.2, (scenes,), generator)
    return length[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
