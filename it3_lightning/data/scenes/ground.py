"""The ground of a scene: fields with furrows and hedges, meadows, a stream."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from it3_lightning.data.scenes.canvas import edge, grid, noise, paint, palette, uniform
from it3_lightning.data.scenes.curves import lines

_FIELDS = 7
_CROPS = (
    (0.36, 0.45, 0.25),  # meadow
    (0.28, 0.38, 0.20),  # maize
    (0.55, 0.52, 0.33),  # ripe grain
    (0.48, 0.41, 0.31),  # ploughed, dry
    (0.36, 0.30, 0.23),  # ploughed, wet
    (0.58, 0.55, 0.47),  # stubble, about the colour of a dirt road
)
_WATER = torch.tensor([0.16, 0.24, 0.30]).view(1, 3, 1, 1)
_HEDGE = torch.tensor([0.17, 0.25, 0.13]).view(1, 3, 1, 1)


def ground(scenes: int, size: int, generator: Generator) -> Tensor:
    """Draw fields, hedges between some of them, and in some scenes a stream: ``(B, 3, S, S)``."""
    nearest, gap = _plots(scenes, size, generator)
    image = _crops(nearest, size, generator)
    image = image * (1 + 0.06 * noise(scenes, size, size / 3, generator))
    image = image * (1 + 0.07 * noise(scenes, size, 3.0, generator))
    hedged = (torch.rand(scenes, 1, 1, 1, generator=generator) < 0.5).float()
    ragged = 1.2 * noise(scenes, size, 5.0, generator)
    image = paint(image, _HEDGE, hedged * edge(gap - 2.0 + ragged, 2.0))
    return _stream(image, generator)


def _plots(scenes: int, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return the number of each pixel's field, and its distance from the next field, roughly."""
    x, y = grid(size)
    wobble = 0.05 * size * noise(scenes, size, size / 2, generator, channels=2)
    centers = uniform(-0.1 * size, 1.1 * size, (scenes, _FIELDS, 2, 1, 1), generator)
    across = x + wobble[:, :1] - centers[:, :, 0]
    down = y + wobble[:, 1:] - centers[:, :, 1]
    distance = (across.abs() ** 3 + down.abs() ** 3) ** (1 / 3)  # squarer than circles
    closest = distance.topk(2, dim=1, largest=False)
    gap = closest.values[:, 1:] - closest.values[:, :1]
    return closest.indices[:, :1], gap


def _crops(nearest: Tensor, size: int, generator: Generator) -> Tensor:
    """Colour fields by their number, with furrows of a direction and a period of their own."""
    scenes = len(nearest)
    colors = palette(_CROPS, (scenes, _FIELDS), generator)
    furrows = torch.stack(
        [
            uniform(0, math.pi, (scenes, _FIELDS), generator),  # direction
            uniform(2.5, 7.0, (scenes, _FIELDS), generator),  # period
            uniform(0, 0.10, (scenes, _FIELDS), generator),  # depth
        ],
        dim=2,
    )
    image, details = (_looked_up(table, nearest) for table in (colors, furrows))
    direction, period, depth = (detail[:, None] for detail in details.unbind(1))
    x, y = grid(size)
    phase = (x * direction.cos() + y * direction.sin()) * (2 * math.pi / period)
    return image * (1 + depth * phase.sin())


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Return ``(B, D, S, S)`` from a table ``(B, K, D)`` and numbers ``(B, 1, S, S)``."""
    scenes, _, size, _ = index.shape
    rows = index.flatten(1)[:, :, None].expand(-1, -1, table.shape[2])
    return table.gather(1, rows).movedim(2, 1).reshape(scenes, -1, size, size)


def _stream(image: Tensor, generator: Generator) -> Tensor:
    """Lead a stream through a quarter of the scenes."""
    scenes, size = len(image), image.shape[-1]
    stream = lines(scenes, size, 3.0, 6.0, generator)
    there = (torch.rand(scenes, 1, 1, 1, generator=generator) < 0.25).float()
    distance = stream.distances(size)
    width = stream.width[:, :, None, None]
    image = paint(image, _HEDGE, 0.6 * there * edge(distance - width / 2 - 1.5, 2.0))
    return paint(image, _WATER, there * edge(distance - width / 2))
