"""Draw aerial scenes with roads and their masks into files that ``RoadScenesDataModule`` reads.

python examples/datasets/draw_road_scenes.py --root data/road_scenes --seeds 0 1 2

A scene has fields with furrows, hedges and streams; curved roads of several surfaces, 2 to 7 pixels
wide, with crossings and junctions; houses beside them, some roofs as grey as asphalt; trees whose
crowns and shadows hide parts of the roads; light, haze and noise of its own. The mask is the road
itself, hidden parts included. The scale is about that of aerial images of 1 m per pixel.

Tensors of a scene are float32: images ``(B, 3, S, S)`` in [0, 1], layers ``(B, 1, S, S)``, one
number per scene ``(B, 1, 1, 1)``. Lengths are in pixels, angles in radians. Every draw comes from
the generator that is handed in.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from it3_lightning.data.roads import drawn, scene_file
from it3_lightning.utils import files

_SURFACES = (
    (0.40, 0.40, 0.41),  # asphalt
    (0.32, 0.32, 0.34),  # fresh asphalt
    (0.52, 0.51, 0.50),  # worn asphalt
    (0.66, 0.65, 0.62),  # concrete
    (0.57, 0.50, 0.40),  # dirt
)
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
_POINTS = 20  # of a curve


_AWAY = 1e4  # where curves that a scene does not have lie
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


@dataclass(frozen=True)
class DetailedScenes:
    """Draws aerial scenes with one to four roads, and the masks of the roads.

    Args:
        size: Height and width ``S`` in pixels.

    Raises:
        ValueError: ``size`` is below 16.
    """

    size: int = 64

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"Expected scenes of at least 16 pixels, got {self.size}.")

    def __call__(self, scenes: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw images ``(B, 3, S, S)``, uint8, and masks ``(B, 1, S, S)``, bool."""
        image = ground(scenes, self.size, generator)
        sun = sunlight(scenes, generator)
        curves = roads(scenes, self.size, generator)
        rims = curves.distances(self.size) - curves.width[:, :, None, None] / 2
        image = _paved(image, curves, rims, generator)
        free = rims.amin(1, keepdim=True)
        image = buildings(image, curves, free, sun, generator)
        image = trees(image, curves, sun, generator)
        image = _photographed(image, generator)
        return (255 * image).round().to(torch.uint8), free <= 0


def write(file: Path, size: int, seed: int, counts: dict[str, int]) -> None:
    """Draw the scenes of each part, and put a whole new file in the place of the last one."""
    arrays = {}
    for part, count in counts.items():
        scenes = drawn(DetailedScenes(size), count, seed, part)
        arrays[f"{part}_images"] = scenes.images.numpy()
        arrays[f"{part}_masks"] = scenes.masks.numpy()
    files.write(file, lambda stream: np.savez_compressed(stream, **arrays))  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw a file for each seed."""
    parser = argparse.ArgumentParser(description="Draw aerial scenes with roads.")
    parser.add_argument("--root", type=Path, default=Path("data/road_scenes"))
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for part, count in (("train", 512), ("validation", 96), ("test", 128)):
        parser.add_argument(f"--{part}", type=int, default=count, help="number of scenes")
    known = parser.parse_args(arguments)
    counts = {part: getattr(known, part) for part in ("train", "validation", "test")}
    for seed in known.seeds:
        file = scene_file(known.root, known.size, seed)
        write(file, known.size, seed, counts)
        print(f"{sum(counts.values())} scenes in {file}")


def _paved(image: Tensor, curves: Curves, rims: Tensor, generator: Generator) -> Tensor:
    """Pave the roads, each with a surface of its own, patched and with a verge."""
    scenes, count = curves.width.shape
    colors = palette(_SURFACES, (scenes, count), generator)
    patches = 1 + 0.06 * noise(scenes, image.shape[-1], 10.0, generator)
    grain = 1 + 0.03 * noise(scenes, image.shape[-1], 1.5, generator)
    verge = image * uniform(0.75, 1.2, (scenes, 1, 1, 1), generator)
    image = paint(image, verge, edge(rims.amin(1, keepdim=True) - 1.5, 2.0))
    for road in range(count):
        color = colors[:, road, :, None, None] * patches * grain
        image = paint(image, color, edge(rims[:, road : road + 1]))
    return image


def _photographed(image: Tensor, generator: Generator) -> Tensor:
    """Look at the scene through air and a camera: exposure, colour cast, haze, noise."""
    scenes = len(image)
    exposure = uniform(0.85, 1.15, (scenes, 1, 1, 1), generator)
    cast = 1 + 0.03 * torch.randn(scenes, 3, 1, 1, generator=generator)
    haze = uniform(0.0, 0.12, (scenes, 1, 1, 1), generator)
    seen = image * exposure * cast * (1 - haze) + 0.75 * haze
    return (seen + 0.012 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


# What all parts of a scene are drawn with: coordinates, smooth noise, paint


def uniform(low: float, high: float, shape: Sequence[int], generator: Generator) -> Tensor:
    """Draw numbers from ``U(low, high)``."""
    return low + (high - low) * torch.rand(tuple(shape), generator=generator)


def grid(size: int) -> tuple[Tensor, Tensor]:
    """Return the columns ``x`` and rows ``y`` of all pixels, each ``(1, 1, S, S)``."""
    line = torch.arange(size, dtype=torch.float32)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return columns[None, None], rows[None, None]


def noise(scenes: int, size: int, cell: float, generator: Generator, channels: int = 1) -> Tensor:
    """Draw smooth noise of mean about 0 and deviation about 1: normal values, interpolated."""
    knots = max(2, round(size / cell) + 1)
    coarse = torch.randn(scenes, channels, knots, knots, generator=generator)
    fine = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return fine / 0.7  # interpolation between knots averages


def paint(image: Tensor, color: Tensor, cover: Tensor) -> Tensor:
    """Lay a colour over an image where ``cover`` ``(B, 1, S, S)`` is 1, mixed where it is less."""
    return image + cover * (color - image)


def edge(distance: Tensor, softness: float = 1.0) -> Tensor:
    """Return the cover of a shape from the distance to its rim, negative inside: 1 to 0."""
    return (0.5 - distance / softness).clamp(0, 1)


def moved(layer: Tensor, shift: Tensor) -> Tensor:
    """Translate layers by a shift ``(B, 2)`` (x, y) in pixels."""
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


# Roads as curves: where they run, how wide they are, how far each pixel is from them


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


# The ground: fields with furrows and hedges, meadows, a stream


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


# What stands on the ground: buildings beside the roads, trees beside and over them, shadows


def shaded(image: Tensor, cover: Tensor, sun: Tensor, height: float) -> Tensor:
    """Darken an image where a layer ``(B, 1, S, S)`` casts its shadow."""
    fallen = [moved(cover, sun * height * share) for share in (0.4, 0.7, 1.0)]
    shadow = torch.stack(fallen).amax(0)
    return image * (1 - shadow * (1 - _SHADOW))


def buildings(
    image: Tensor, roads: Curves, free: Tensor, sun: Tensor, generator: Generator
) -> Tensor:
    """Build houses along the roads, none on a road."""
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
    """Choose places beside roads, ``(B, count, 2)``, and the directions of the roads there."""
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


if __name__ == "__main__":
    main()
