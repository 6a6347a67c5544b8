"""Decorators of images with masks (shifted, turned), the base of their data modules, drawn scenes.

``examples/datasets/draw_road_scenes.py`` draws fields, houses, trees and shadows into files; the
painter here knows textured ground and roads alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from it3_lightning.data.base import ShiftedData, check_equal, check_integer, read_npz
from it3_lightning.data.images import as_float, check_pixels
from it3_lightning.data.sampling import Batch, Samples, Views, chosen, seeded
from it3_lightning.data.shifts import Severity, Shift
from it3_lightning.utils.messages import undefined

ROAD_SHIFTS = ("contrast", "blur", "gaussian_noise")
"""The shifts that results on roads are reported on."""
ROAD_TUNING_SHIFTS = ("gamma", "motion_blur", "speckle_noise")
"""Other shifts, only for choosing settings: no result is reported on them."""
_GEOMETRIC = ("rotation", "shear")  # they move the pixels, and the masks would stay
_PIXEL = 2.0  # of a tile, for one of a 28-pixel image: severity 3 blurs by 2.5 pixels
TURNS = 8  # orientations of a square: four rotations, each also mirrored
FILES_AT_ONCE = 4  # decoded and kept: four of 4096 x 4096 pixels are 268 MB
_CHUNK = 16  # scenes drawn at once: part of what a seed means, so it is no option
_POINTS = 20  # of a road
_GROUNDS = ((0.36, 0.45, 0.25), (0.55, 0.52, 0.33), (0.48, 0.41, 0.31))  # meadow, grain, ploughed
_SURFACES = ((0.40, 0.40, 0.41), (0.52, 0.51, 0.50), (0.57, 0.50, 0.40))  # asphalt, worn, dirt


class MaskedSet(Samples):
    """Images, float32 ``(B, C, H, W)`` in [0, 1] in a batch, and masks, ``(B, 1, H, W)`` 0 or 1."""

    @property
    def files(self) -> Tensor:
        """Number of the file each sample lies in, int64 ``(N,)``: one file is read as a whole."""
        return torch.zeros(len(self), dtype=torch.int64)

    @abstractmethod
    def select(self, indices: Tensor) -> MaskedSet:
        """Return a new set of the samples at ``indices`` ``(M,)``, in their order."""


@dataclass(eq=False)
class MaskedImages(MaskedSet):
    """Images and masks as two tensors; 8-bit images are divided by 255 as they are read.

    Args:
        images: ``(N, C, H, W)``, uint8, or floating point in [0, 1].
        masks: ``(N, 1, H, W)``, bool.

    Raises:
        ValueError: A shape, dtype or range is another.
    """

    images: Tensor
    masks: Tensor

    def __post_init__(self) -> None:
        check_pixels(self.images)
        count, _, height, width = self.images.shape
        if self.masks.shape != (count, 1, height, width) or self.masks.dtype != torch.bool:
            raise ValueError(
                f"Expected one bool mask (1, {height}, {width}) for each of {count} images, got "
                f"{tuple(self.masks.shape)} of {self.masks.dtype}. Convert with masks > 0."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return as_float(self.images[chosen]), self.masks[chosen].float()

    def select(self, indices: Tensor) -> MaskedImages:
        """Return a new set of the samples at ``indices``."""
        return MaskedImages(self.images[indices], self.masks[indices])


@dataclass(eq=False)
class Shifted(Samples):
    """The same samples under a shift, which is computed as they are asked for; masks stay.

    The seed, the shift and the position of a sample in the source fix every draw.
    """

    source: MaskedSet
    shift: Shift
    seed: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> Batch:
        images, masks = self.source.__getitems__(indices)
        kind = self.seed, self.shift.name, self.shift.severity
        pairs = zip(images, indices, strict=True)
        return torch.cat([self.shift(x[None], seeded(*kind, index)) for x, index in pairs]), masks


class Turned(Views):
    """Square samples in one of their eight orientations: an aerial image has no up."""

    def views(self, rows: list[int], draws: list[int]) -> Batch:
        """Return images and masks rotated by ``draw % 4`` quarters, and mirrored from 4 on."""
        turned = []
        for values in self.source.__getitems__(rows):
            rotated = [value.rot90(draw, (1, 2)) for value, draw in zip(values, draws, strict=True)]
            pairs = zip(rotated, draws, strict=True)
            turned.append(torch.stack([x.flip(2) if draw >= 4 else x for x, draw in pairs]))
        return turned[0], turned[1]


@dataclass(eq=False)
class TileOrder(Sampler[int]):
    """Goes through all tiles once: through the files in random order, a few of them at a time.

    The tiles of these few are mixed, so each file is read once in an epoch. Each tile comes as
    ``index + count * draw``, the draw below ``turns``.
    """

    files: Tensor
    _: KW_ONLY
    generator: Generator
    at_once: int
    turns: int = 1

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[int]:
        numbers, files = torch.unique(self.files, return_inverse=True)
        place = torch.randperm(len(numbers), generator=self.generator)
        mixed = torch.randperm(len(files), generator=self.generator)
        order = mixed[(place[files] // self.at_once)[mixed].argsort(stable=True)]
        turns = torch.randint(self.turns, order.shape, generator=self.generator)
        yield from (order + len(files) * turns).tolist()


@dataclass(eq=False)
class ShiftedMasks(ShiftedData):
    """Images with masks for training, and held-out ones clean and under shifts for testing.

    A subclass says in :meth:`load` where they come from. Each batch is ``(images, masks)``: float32
    ``(B, 3, T, T)`` in [0, 1] and float32 ``(B, 1, T, T)`` of 0 and 1. Shifts are those that move
    no pixels, ``ROAD_SHIFTS`` and ``ROAD_TUNING_SHIFTS`` among them; the lengths of their blurs are
    pixels, whatever ``T`` is. There are no classes, so ``stream`` must be ``"equal"``.

    Args:
        augment: Whether training shows each image in one of its eight orientations, at random.
    """

    SHIFTS = ROAD_SHIFTS
    TUNING_SHIFTS = ROAD_TUNING_SHIFTS

    _: KW_ONLY
    batch_size: int = 16
    eval_batch_size: int = 16
    severity: Severity = 3
    augment: bool = True

    def load(self) -> dict[str, MaskedSet]:
        """Return all samples: ``"train"``, ``"validation"`` and ``"test"``."""
        raise undefined(self, "load(self) -> dict[str, MaskedSet]", "Return the samples by use.")

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, in an order that is new in every epoch."""
        self.setup("fit")
        train = self._splits["train"]
        generator, turns = seeded(self.seed, "order", self._epoch), TURNS if self.augment else 1
        order = TileOrder(train.files, generator=generator, at_once=FILES_AT_ONCE, turns=turns)
        source = Turned(train) if self.augment else train
        return self._loader(source, self.batch_size, sampler=order)

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        super().check()
        check_equal(self.stream, "masks have no classes that could be more frequent")

    def change(self, name: str, severity: int) -> Shift:
        """Return the shift of a name; refuse one that moves pixels."""
        if name in _GEOMETRIC:
            raise ValueError(
                f"Expected shifts that leave every pixel in its place, got {name}: the masks would "
                f"no longer fit. Leave {name} out."
            )
        return Shift(name, severity, _PIXEL)

    def split(self) -> dict[str, MaskedSet]:
        """Return as many samples of each part as the sizes say."""
        parts = self.load()
        names = {"train": "train_size", "validation": "val_size", "test": "test_size"}
        return {p: chosen(parts[p], getattr(self, n), self.seed, n) for p, n in names.items()}

    def shifted(self, name: str) -> Shifted:
        """Return the held-out images under a shift, to be computed as they are asked for."""
        shift = self.change(*self.wanted()[name])
        return Shifted(self._splits[self.evaluate_on], shift, self.seed)


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
        """Draw ``B`` scenes: images ``(B, 3, S, S)``, uint8, and masks ``(B, 1, S, S)``, bool."""
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


@dataclass(eq=False)
class RoadScenesDataModule(ShiftedMasks):
    """Drawn scenes, clean and shifted, kept in memory: a stand-in where there are no photographs.

    Results on it say nothing about photographs. Fewer scenes are the first ones of more.

    Args:
        root: Folder of the files that ``examples/datasets/draw_road_scenes.py`` wrote; None for
            the simple scenes of :class:`RoadScenes`, which need no file.
        size: Height and width of a scene, in pixels.
        train_size: Scenes to train on.
        val_size: Scenes to validate on.
        test_size: Scenes to test on.

    Raises:
        FileNotFoundError: There is no file of this size and seed in ``root``.
        ValueError: A setting is out of its range, or a file is damaged or holds too few scenes.
    """

    sample_settings = ("root", "size")
    needed_sizes = ("train_size", "val_size", "test_size")

    root: str | Path | None = None
    _: KW_ONLY
    size: int = 64
    train_size: int = 512
    val_size: int = 96
    test_size: int = 128

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
        options = f"--root {self.root} --size {self.size} --seeds {self.seed} {sizes}"
        script = f"Run: python examples/datasets/draw_road_scenes.py {options}"
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected drawn scenes in {file.resolve()}, got no such file. {script}, or leave "
                "root out for simple scenes."
            )
        names = [f"{part}_{kind}" for part in counts for kind in ("images", "masks")]
        arrays, _ = read_npz(file, names, f"Delete it. {script}")
        found: dict[str, MaskedSet] = {}
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        for (part, count), pair in zip(counts.items(), pairs, strict=True):
            shapes = [(count, channels, self.size, self.size) for channels in (3, 1)]
            fits = [tuple(x[:count].shape) for x in pair] == shapes and len(pair[0]) == len(pair[1])
            if not fits or [x.dtype for x in pair] != [torch.uint8, torch.bool]:
                got = " and ".join(f"{tuple(x.shape)} of {x.dtype}" for x in pair)
                raise ValueError(
                    f"Expected at least {count} scenes of {self.size} pixels for {part} in {file}, "
                    f"uint8 with bool masks, got {got}. Delete it. {script}"
                )
            found[part] = MaskedImages(*(x[:count] for x in pair))
        return found


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
