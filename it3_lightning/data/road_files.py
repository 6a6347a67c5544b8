"""Reader of aerial images with masks of the roads: layouts of folders, and tiles of large files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from it3_lightning.data.base import check_choice, check_integer, check_share
from it3_lightning.data.images import as_float, read_image, read_rgb, read_size
from it3_lightning.data.roads import FILES_AT_ONCE, MaskedSet, ShiftedMasks
from it3_lightning.data.sampling import Batch, subset

Layout = Literal["massachusetts", "roadtracer", "pairs"]
Parts = dict[str, list["Pair"]]
ROADTRACER_TEST_REGIONS = (
    *("amsterdam", "boston", "chicago", "denver", "kansas city", "la", "montreal", "new york"),
    *("paris", "pittsburgh", "saltlakecity", "san diego", "tokyo", "toronto", "vancouver"),
)
"""The 15 cities that RoadTracer tests on (``lib/roadcnn/dataset.py`` of its repository)."""
_PARTS = ("train", "validation", "test")
_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Pair:
    """An image file and the file of its mask."""

    image: Path
    mask: Path


class Tiles(MaskedSet):
    """All whole tiles of some images, row by row; what is left at the right and below is not used.

    Only the headers of the files are read at first. The last few decoded files are kept.
    """

    def __init__(self, pairs: Sequence[Pair], tile: int) -> None:
        self.pairs = tuple(pairs)
        self.tile = tile
        places = [_grid(number, pair, tile) for number, pair in enumerate(self.pairs)]
        self._places = torch.cat(places) if places else torch.zeros(0, 3, dtype=torch.int64)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitems__(self, indices: list[int]) -> Batch:
        crops = []
        for number, top, left in self._places[torch.as_tensor(indices)].tolist():
            window = slice(top, top + self.tile), slice(left, left + self.tile)
            crops.append([pixels[:, *window] for pixels in self._decoded(number)])
        images, masks = (torch.stack(parts) for parts in zip(*crops, strict=True))
        return as_float(images), masks.float()

    @property
    def files(self) -> Tensor:
        """Number of the file each tile lies in."""
        return self._places[:, 0]

    def select(self, indices: Tensor) -> Tiles:
        """Return the tiles at ``indices``, in their order."""
        chosen = Tiles((), self.tile)
        chosen.pairs, chosen._places = self.pairs, self._places[indices]
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        """Leave the decoded files behind: a worker process reads its own."""
        return {**vars(self), "_kept": {}}

    def _decoded(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a whole image and its mask; the file used longest ago makes room."""
        if number not in self._kept:
            pair = self.pairs[number]
            while len(self._kept) >= FILES_AT_ONCE:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = pil_to_tensor(read_rgb(pair.image)), _mask(pair.mask)
        self._kept[number] = self._kept.pop(number)  # the newest
        return self._kept[number]


@dataclass(eq=False)
class RoadsDataModule(ShiftedMasks):
    """Tiles of aerial images and of the masks of their roads, clean and shifted, read as needed.

    Sizes count tiles. Images are parted before they are cut, so no two parts share an image.

    Args:
        root: Folder of the data.
        layout: How the files lie in it.
            ``"massachusetts"``: ``train/sat/*.tiff`` and ``train/map/*.tif``, ``valid``, ``test``
            likewise (Massachusetts Roads Dataset, Mnih 2013);
            ``"roadtracer"``: ``imagery/{city}_{x}_{y}_sat.png`` and
            ``masks/{city}_{x}_{y}_osm.png`` (RoadTracer, Bastani et al. 2018);
            ``"pairs"``: ``images/*`` and ``masks/*`` with the same stems, parted by the seed.
        tile: Height and width of a tile, in pixels; tiles are cut from the top left.
        val_share: Share of the files to validate on, where the layout does not say which.
        test_share: Share of the files to test on, for ``"pairs"``.
        test_regions: Cities to test on, for ``"roadtracer"``; default: those of its authors.

    Raises:
        FileNotFoundError: A folder is missing or empty.
        ValueError: A setting is out of its range; an image and a mask do not belong together; when
            it is read, a file is damaged, or a mask holds other values than 0 and 255, or 0 and 1,
            colours or transparency.
    """

    sample_settings = ("root", "layout", "tile", "val_share", "test_share", "test_regions")

    root: str | Path = "data/roads"
    _: KW_ONLY
    layout: Layout = "massachusetts"
    tile: int = 256
    val_share: float = 0.1
    test_share: float = 0.2
    test_regions: Sequence[str] = ROADTRACER_TEST_REGIONS

    def load(self) -> dict[str, MaskedSet]:
        """Find the files and cut them into tiles, without reading more than their headers."""
        return {part: Tiles(pairs, self.tile) for part, pairs in self._parts().items()}

    def check(self) -> None:
        """Refuse settings out of their range."""
        super().check()
        check_integer("tile", self.tile, 1)
        check_choice("layout", self.layout, get_args(Layout))
        for name in ("val_share", "test_share"):
            check_share(name, getattr(self, name))
        if isinstance(self.test_regions, str):
            raise ValueError(
                f"Expected test_regions to be a list of names, got {self.test_regions!r}. "
                f"Write [{self.test_regions}]."
            )

    def _parts(self) -> Parts:
        """Return the files of each part, as the layout has them."""
        root = Path(self.root)
        if self.layout == "massachusetts":
            folders = {part: root / part.replace("validation", "valid") for part in _PARTS}
            found = {part: _matched(f / "sat", f / "map") for part, f in folders.items()}
            return {part: list(pairs.values()) for part, pairs in found.items()}
        if self.layout == "roadtracer":
            return self._roadtracer(root)
        pairs = list(_matched(root / "images", root / "masks").values())
        shares = {"test": self.test_share, "validation": self.val_share}
        return _drawn(pairs, shares, self.seed, root / "images")

    def _roadtracer(self, root: Path) -> Parts:
        """Return the files that RoadTracer's scripts write, cities of the test set apart."""
        divided = (root / "imagery").is_dir() or (root / "masks").is_dir()
        images, masks = (root / "imagery", root / "masks") if divided else (root, root)
        pairs = _matched(images, masks, "_sat", "_osm")
        cities = [name.rsplit("_", 2)[0] for name in pairs]  # of {city}_{x}_{y}
        parted: tuple[list[Pair], list[Pair]] = [], []
        for city, pair in zip(cities, pairs.values(), strict=True):
            parted[city in self.test_regions].append(pair)
        others, test = parted
        if not test or not others:
            wanted = ", ".join(sorted(set(self.test_regions)))
            raise ValueError(
                f"Expected images of cities to test on ({wanted}) and of others in {images}, got "
                f"{', '.join(sorted(set(cities)))}. Set test_regions to some of these."
            )
        return {"test": test, **_drawn(others, {"validation": self.val_share}, self.seed, images)}


def _drawn(pairs: list[Pair], shares: dict[str, float], seed: int, place: Path) -> Parts:
    """Draw shares of the files, at least one file each; what is left is to train on."""
    drawn: Parts = {}
    sizes = {part: max(1, round(share * len(pairs))) for part, share in shares.items()}
    if sum(sizes.values()) >= len(pairs):
        raise ValueError(
            f"Expected more than {sum(sizes.values())} pairs of files to part in {place}, got "
            f"{len(pairs)}. Add files, or lower val_share and test_share."
        )
    for part, size in sizes.items():
        chosen, rest = subset(len(pairs), size, seed, f"{part} files")
        drawn[part] = [pairs[index] for index in chosen.tolist()]
        pairs = [pairs[index] for index in rest.tolist()]
    return {**drawn, "train": pairs}


def _matched(images: Path, masks: Path, image_end: str = "", mask_end: str = "") -> dict[str, Pair]:
    """Return the pairs of two folders by the names they share, in the order of the names."""
    of_images, of_masks = _named(images, image_end), _named(masks, mask_end)
    alone = [of_images.get(n) or of_masks[n] for n in sorted(of_images.keys() ^ of_masks.keys())]
    if alone:
        raise ValueError(
            f"Expected a mask in {masks} for each image in {images} and the other way round, got "
            f"{len(alone)} without: {', '.join(map(str, alone[:3]))}{', ...' * (len(alone) > 3)}. "
            "Add what is missing, or remove these."
        )
    return {name: Pair(of_images[name], of_masks[name]) for name in sorted(of_images)}


def _named(folder: Path, end: str) -> dict[str, Path]:
    """Return the image files of a folder whose stems end so, by the stems' beginnings."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a folder {folder.resolve()}, got none. Set root to the folder of the data, "
            "and layout to how it lies there: massachusetts, roadtracer or pairs."
        )
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES]
    files = [path for path in files if path.stem.endswith(end)]
    named = {path.stem.removesuffix(end): path for path in files}
    if len(named) < len(files):
        twice = next(path for path in files if path not in named.values())
        raise ValueError(
            f"Expected each name once in {folder}, got several {twice.stem}. Keep one."
        )
    if not named:
        raise FileNotFoundError(
            f"Expected image files named *{end}.png, .tif, .tiff or .jpg in {folder.resolve()}, "
            "got none. Put the data there, or set root and layout to where it lies."
        )
    return named


def _grid(number: int, pair: Pair, tile: int) -> Tensor:
    """Return the places of a file's tiles, int64 ``(N, 3)``: its number, top, left."""
    (width, height), other = (read_size(path) for path in (pair.image, pair.mask))
    if (width, height) != other:
        raise ValueError(
            f"Expected an image and its mask to have the same size, got {width} x {height} in "
            f"{pair.image} and {other[0]} x {other[1]} in {pair.mask}. Pair the files of one scene."
        )
    if min(width, height) < tile:
        raise ValueError(
            f"Expected images of at least tile={tile} pixels a side, got {width} x {height} in "
            f"{pair.image}. Lower tile."
        )
    starts = [torch.arange(0, side - tile + 1, tile) for side in (height, width)]
    corners = torch.cartesian_prod(*starts)
    return torch.cat([torch.full((len(corners), 1), number), corners], dim=1)


def _mask(path: Path) -> Tensor:
    """Return a mask, bool ``(1, H, W)``; its file holds one of two values and nothing else."""
    pixels = np.asarray(read_image(path, "RGBA"))
    grey = pixels[..., 0] if pixels.ndim == 3 else pixels
    plain = pixels.ndim == 2 or bool((pixels == Image.fromarray(grey).convert("RGBA")).all())
    high = grey.max()
    if not (plain and high in (0, 1, 255) and ((grey == 0) | (grey == high)).all()):
        found = np.unique(grey)
        values = ", ".join(map(str, found[:8])) + ", ..." * (len(found) > 8)
        raise ValueError(
            f"Expected a mask of 0 and 255, or of 0 and 1, in {path}, got "
            f"{f'the values {values}' if plain else 'colours or transparency'}. Save it without "
            "colours, smoothing or lossy compression; is it perhaps the image?"
        )
    return torch.from_numpy(grey > 0)[None]
