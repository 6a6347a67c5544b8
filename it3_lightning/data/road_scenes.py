"""Drawn aerial scenes as a data module: from files that a script wrote, or simple ones at once.

``examples/datasets/draw_road_scenes.py`` draws fields, houses, trees and shadows into files; the
painter here knows textured ground and roads alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from it3_lightning.data.base import check_integer
from it3_lightning.data.files import read_npz
from it3_lightning.data.roads import MaskedImages, MaskedSet, ShiftedMasks
from it3_lightning.data.sampling import seeded

_CHUNK = 16  # scenes drawn at once: part of what a seed means, so it is no option
_POINTS = 20  # of a road
_GROUNDS = ((0.36, 0.45, 0.25), (0.55, 0.52, 0.33), (0.48, 0.41, 0.31))  # meadow, grain, ploughed
_SURFACES = ((0.40, 0.40, 0.41), (0.52, 0.51, 0.50), (0.57, 0.50, 0.40))  # asphalt, worn, dirt


@dataclass(frozen=True)
class RoadScenes:
    """Draws aerial scenes of a textured ground with one or two curved roads, and their masks.

    The colours of roads and ground overlap, so brightness alone does not tell the roads.

    Args:
        size: Height and width ``S`` in pixels.

    Raises:
        ValueError: ``size`` is below 16.

    >>> images, masks = RoadScenes(32)(2, torch.Generator().manual_seed(0))
    >>> images.shape, images.dtype, masks.dtype
    (torch.Size([2, 3, 32, 32]), torch.uint8, torch.bool)
    """

    size: int = 64

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"Expected scenes of at least 16 pixels, got {self.size}.")

    def __call__(self, scenes: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw scenes.

        Args:
            scenes: How many, ``B``.
            generator: Of all draws; the global random state is never touched.

        Returns:
            Images ``(B, 3, S, S)``, uint8, and masks ``(B, 1, S, S)``, bool.
        """
        image = self._ground(scenes, generator)
        mask = torch.zeros(scenes, 1, self.size, self.size, dtype=torch.bool)
        for chance in (1.0, 0.5):
            there = torch.rand(scenes, 1, 1, 1, generator=generator) < chance
            road = (self._distances(scenes, generator) <= 0) & there
            color = _colors(_SURFACES, (scenes,), generator)[..., None, None]
            image, mask = torch.where(road, color, image), mask | road
        light = 0.85 + 0.3 * torch.rand(scenes, 1, 1, 1, generator=generator)
        seen = image * light + 0.015 * torch.randn(image.shape, generator=generator)
        return (255 * seen.clamp(0, 1)).round().to(torch.uint8), mask

    def _ground(self, scenes: int, generator: Generator) -> Tensor:
        """Draw patches of three colours, ``(B, 3, S, S)``, rough at two scales."""
        patches = self._noise(scenes, 3, 3, generator).argmax(1)
        colors = _colors(_GROUNDS, (scenes, 3), generator)
        image: Tensor = colors[torch.arange(scenes)[:, None, None], patches].movedim(-1, 1)
        for knots in (self.size // 12 + 2, self.size // 3 + 1):
            image = image * (1 + 0.1 * self._noise(scenes, 1, knots, generator))
        return image

    def _noise(self, scenes: int, channels: int, knots: int, generator: Generator) -> Tensor:
        """Draw smooth normal noise ``(B, C, S, S)`` through ``knots`` values a side."""
        coarse = torch.randn(scenes, channels, knots, knots, generator=generator)
        return F.interpolate(coarse, size=(self.size,) * 2, mode="bicubic", align_corners=True)

    def _distances(self, scenes: int, generator: Generator) -> Tensor:
        """Return the distance ``(B, 1, S, S)`` from the rim of a bent road across the scene."""
        start = 2 * math.pi * torch.rand(scenes, generator=generator)
        end = start + math.pi + 1.8 * torch.rand(scenes, generator=generator) - 0.9
        ends = torch.stack([start, end], dim=1)
        rim = torch.stack([ends.cos(), ends.sin()], dim=2)  # (B, 2, 2) on the unit circle
        middle = 0.4 * torch.randn(scenes, 1, 2, generator=generator)
        t = torch.linspace(0, 1, _POINTS * self.size // 16)[:, None]
        curve = (1 - t) ** 2 * rim[:, :1] + 2 * t * (1 - t) * middle + t**2 * rim[:, 1:]
        points = self.size / 2 + 0.75 * self.size * curve
        line = torch.arange(self.size, dtype=torch.float32)
        pixels = torch.cartesian_prod(line, line).flip(1)
        nearest = torch.cdist(pixels.expand(scenes, -1, -1), points).amin(2)
        width = 3 + 3.5 * torch.rand(scenes, 1, 1, 1, generator=generator)
        return nearest.view(scenes, 1, self.size, self.size) - width / 2


def _colors(colors: Any, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw one of the colours for each place, varied a little: ``(*shape, 3)``."""
    chosen = torch.tensor(colors)[torch.randint(len(colors), shape, generator=generator)]
    return chosen + 0.05 * torch.randn(*shape, 1, generator=generator)


class RoadScenesDataModule(ShiftedMasks):
    """Drawn scenes, clean and shifted, kept in memory: a stand-in where there are no photographs.

    Results on it say nothing about photographs. Scenes of another part or seed are others; a
    smaller size has the first ones of a larger.

    Args:
        root: Folder of the files that ``examples/datasets/draw_road_scenes.py`` wrote; None for
            the simple scenes of :class:`RoadScenes`, which need no file.
        size: Height and width of a scene, in pixels.
        train_size: Scenes to train on.
        val_size: Scenes to validate on.
        test_size: Scenes to test on.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedMasks`.

    Raises:
        FileNotFoundError: There is no file of this size and seed in ``root``.
        ValueError: A setting is out of its range, or a file is damaged or holds too few scenes.
    """

    sample_settings = ("root", "size")
    needed_sizes = ("train_size", "val_size", "test_size")
    train_size: int
    val_size: int
    test_size: int

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        size: int = 64,
        train_size: int = 512,
        val_size: int = 96,
        test_size: int = 128,
        **kwargs: Any,
    ) -> None:
        self.root = root
        self.size = size
        super().__init__(train_size=train_size, val_size=val_size, test_size=test_size, **kwargs)

    def load(self) -> dict[str, MaskedSet]:
        """Read or draw all scenes."""
        sizes = {"train": self.train_size, "validation": self.val_size, "test": self.test_size}
        if self.root is not None:
            return self._read(scene_file(self.root, self.size, self.seed), sizes)
        draw = RoadScenes(self.size)
        return {part: drawn(draw, count, self.seed, part) for part, count in sizes.items()}

    def check(self) -> None:
        """Refuse settings out of their range."""
        super().check()
        check_integer("size", self.size, 16)

    def _read(self, file: Path, counts: dict[str, int]) -> dict[str, MaskedSet]:
        """Return the first scenes of each part in a file; refuse one that is damaged or short."""
        sizes = " ".join(f"--{part} {count}" for part, count in counts.items())
        script = (
            f"Run: python examples/datasets/draw_road_scenes.py --root {self.root} --size "
            f"{self.size} --seeds {self.seed} {sizes}"
        )
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected drawn scenes in {file.resolve()}, got no such file. {script}, or leave "
                "root out for simple scenes."
            )
        names = [f"{part}_{kind}" for part in counts for kind in ("images", "masks")]
        arrays, _ = read_npz(file, names, f"Delete it. {script}")
        pairs = dict(zip(counts, zip(arrays[::2], arrays[1::2], strict=True), strict=True))
        for part, (images, masks) in pairs.items():
            place = (self.size, self.size)
            fits = images.shape[1:] == (3, *place) and masks.shape[1:] == (1, *place)
            if not fits or not counts[part] <= len(images) == len(masks):
                raise ValueError(
                    f"Expected at least {counts[part]} scenes of {self.size} pixels for {part} in "
                    f"{file}, got {tuple(images.shape)} and {tuple(masks.shape)}. {script}"
                )
            if images.dtype != torch.uint8 or masks.dtype != torch.bool:
                raise ValueError(
                    f"Expected images of uint8 and bool masks in {file}, got {images.dtype} and "
                    f"{masks.dtype}. Delete it. {script}"
                )
        return {part: MaskedImages(*(x[: counts[part]] for x in pairs[part])) for part in counts}


def drawn(draw: Any, count: int, seed: int, part: str) -> MaskedImages:
    """Draw scenes for a part, a chunk from each generator: a smaller count has the first ones."""
    chunks = [
        draw(_CHUNK, seeded(seed, "road scenes", part, start)) for start in range(0, count, _CHUNK)
    ]
    images, masks = (torch.cat(parts)[:count] for parts in zip(*chunks, strict=True))
    return MaskedImages(images, masks)


def scene_file(root: str | Path, size: int, seed: int) -> Path:
    """Return where the scenes of a size and a seed are kept."""
    return Path(root) / f"scenes_{size}_seed{seed}.npz"
