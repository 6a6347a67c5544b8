"""Aerial scenes with roads and their masks, drawn from a generator: a stand-in for photographs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from it3_lightning.data.scenes.canvas import edge, noise, paint, palette, uniform
from it3_lightning.data.scenes.curves import Curves, roads
from it3_lightning.data.scenes.ground import ground
from it3_lightning.data.scenes.objects import buildings, sunlight, trees

_SURFACES = (
    (0.40, 0.40, 0.41),  # asphalt
    (0.32, 0.32, 0.34),  # fresh asphalt
    (0.52, 0.51, 0.50),  # worn asphalt
    (0.66, 0.65, 0.62),  # concrete
    (0.57, 0.50, 0.40),  # dirt
)


@dataclass(frozen=True)
class RoadScenes:
    """Draws aerial scenes with one to four roads, and the masks of the roads.

    A scene has fields with furrows, hedges and streams; curved roads of several surfaces, 2 to 7
    pixels wide, with crossings and junctions; houses beside them, some roofs as grey as asphalt;
    trees whose crowns and shadows hide parts of the roads; light, haze and noise of its own. The
    mask is the road itself, hidden parts included. The scale is about that of aerial images of
    1 m per pixel.

    Args:
        size: height and width ``S`` in pixels.

    Raises:
        ValueError: ``size`` is below 16.

    >>> images, masks = RoadScenes(32)(2, torch.Generator().manual_seed(0))
    >>> images.shape, round(masks.float().mean().item(), 2)
    (torch.Size([2, 3, 32, 32]), 0.34)
    """

    size: int = 64

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"Expected scenes of at least 16 pixels, got {self.size}.")

    def __call__(self, scenes: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw scenes.

        Args:
            scenes: how many, ``B``.
            generator: of all draws; the global random state is never touched.

        Returns:
            Images ``(B, 3, S, S)``, uint8, and masks ``(B, 1, S, S)``, bool.
        """
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
