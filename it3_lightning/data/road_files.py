"""Where datasets of roads keep their images and masks, and which of them are for what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from it3_lightning.data.sampling import subset
from it3_lightning.data.tiles import Pair

Layout = Literal["massachusetts", "roadtracer", "pairs"]
Part = Literal["train", "validation", "test"]
Parts = dict[Part, list[Pair]]

ROADTRACER_TEST_REGIONS = (
    "amsterdam",
    "boston",
    "chicago",
    "denver",
    "kansas city",
    "la",
    "montreal",
    "new york",
    "paris",
    "pittsburgh",
    "saltlakecity",
    "san diego",
    "tokyo",
    "toronto",
    "vancouver",
)
"""The 15 cities that RoadTracer tests on (``lib/roadcnn/dataset.py`` of its repository)."""

_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")


def massachusetts(root: Path) -> Parts:
    """Return the files of the Massachusetts Roads Dataset, in the parts it comes in.

    ``train/sat/*.tiff`` are the images and ``train/map/*.tif`` the masks, by the same stems, 1500
    by 1500 pixels of 1 m; ``valid`` and ``test`` likewise. Source: Mnih, "Machine Learning for
    Aerial Image Labeling", PhD thesis, University of Toronto, 2013.

    Raises:
        FileNotFoundError: A folder is missing or empty.
        ValueError: An image has no mask, or the other way round.
    """
    folders: dict[Part, str] = {"train": "train", "validation": "valid", "test": "test"}
    return {
        part: list(_matched(root / name / "sat", root / name / "map").values())
        for part, name in folders.items()
    }


def roadtracer(root: Path, *, seed: int, val_share: float, test_regions: Sequence[str]) -> Parts:
    """Return the files that RoadTracer's scripts write, cities of the test set apart.

    ``imagery/{city}_{x}_{y}_sat.png`` are the images and ``masks/{city}_{x}_{y}_osm.png`` the
    masks, 4096 by 4096 pixels of about 0.6 m (zoom 18); all may also lie in ``root`` itself.
    Source: Bastani et al., "RoadTracer", CVPR 2018, and the ``dataset`` folder of its repository.

    Args:
        root: folder of both.
        seed: of the choice of validation files among those of other cities.
        val_share: share of these.
        test_regions: cities to test on.

    Raises:
        FileNotFoundError: A folder is missing or empty.
        ValueError: An image has no mask, or the other way round; no file, or every file, is of a
            city to test on.
    """
    divided = (root / "imagery").is_dir() or (root / "masks").is_dir()
    images, masks = (root / "imagery", root / "masks") if divided else (root, root)
    pairs = _matched(images, masks, "_sat", "_osm")
    wanted = set(test_regions)
    test = [pair for name, pair in pairs.items() if _region(name) in wanted]
    others = [pair for name, pair in pairs.items() if _region(name) not in wanted]
    if not test or not others:
        found = sorted({_region(name) for name in pairs})
        raise ValueError(
            f"Expected images of cities to test on ({', '.join(sorted(wanted))}) and of others in "
            f"{images}, got {', '.join(found)}. Set test_regions to some of these."
        )
    (validation,), train = _drawn(others, {"validation": val_share}, seed, images)
    return {"train": train, "validation": validation, "test": test}


def folders_of_pairs(root: Path, *, seed: int, val_share: float, test_share: float) -> Parts:
    """Return the files of ``images/`` and ``masks/``, matched by their stems, parted by the seed.

    Args:
        root: folder of both.
        seed: of the choice.
        val_share: share of the files to validate on.
        test_share: share of the files to test on.

    Raises:
        FileNotFoundError: A folder is missing or empty.
        ValueError: An image has no mask, or the other way round; there are too few files.
    """
    pairs = list(_matched(root / "images", root / "masks").values())
    shares = {"test": test_share, "validation": val_share}
    (test, validation), train = _drawn(pairs, shares, seed, root / "images")
    return {"train": train, "validation": validation, "test": test}


def _drawn(
    pairs: list[Pair], shares: dict[str, float], seed: int, place: Path
) -> tuple[list[list[Pair]], list[Pair]]:
    """Draw shares of the files, at least one file each; return them and the rest."""
    drawn: list[list[Pair]] = []
    sizes = {part: max(1, round(share * len(pairs))) for part, share in shares.items()}
    if sum(sizes.values()) >= len(pairs):
        raise ValueError(
            f"Expected more than {sum(sizes.values())} pairs of files to part in {place}, got "
            f"{len(pairs)}. Add files, or lower val_share and test_share."
        )
    for part, size in sizes.items():
        chosen, rest = subset(len(pairs), size, seed, f"{part} files")
        drawn.append([pairs[index] for index in chosen.tolist()])
        pairs = [pairs[index] for index in rest.tolist()]
    return drawn, pairs


def _matched(images: Path, masks: Path, image_end: str = "", mask_end: str = "") -> dict[str, Pair]:
    """Return the pairs of two folders by the names they share, in the order of the names."""
    of_images, of_masks = _named(images, image_end), _named(masks, mask_end)
    alone = [
        *(of_images[name] for name in sorted(of_images.keys() - of_masks.keys())),
        *(of_masks[name] for name in sorted(of_masks.keys() - of_images.keys())),
    ]
    if alone:
        raise ValueError(
            f"Expected a mask in {masks} for each image in {images} and the other way round, got "
            f"{len(alone)} without: {', '.join(str(path) for path in alone[:3])}"
            f"{', ...' * (len(alone) > 3)}. Add what is missing, or remove these."
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
            f"Expected each name once in {folder}, got {twice.stem} with several endings. Remove "
            "all but one of them."
        )
    if not named:
        raise FileNotFoundError(
            f"Expected image files named *{end}.png, .tif, .tiff or .jpg in {folder.resolve()}, "
            "got none. Put the data there, or set root and layout to where it lies."
        )
    return named


def _region(name: str) -> str:
    """Return the city in ``{city}_{x}_{y}``.

    >>> _region("new york_-1_0")
    'new york'
    """
    return name.rsplit("_", 2)[0]
