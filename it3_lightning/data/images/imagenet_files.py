"""The folders of ImageNet and of ImageNet-C, a class each, by the order of the thousand synsets."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from it3_lightning.utils.messages import not_installed, unknown

_ENDS = (".jpeg", ".jpg", ".png")


@cache
def synsets() -> dict[str, int]:
    """Return the class of each synset: its place among the 1,000 of ILSVRC 2012, sorted.

    Raises:
        ImportError: timm, which lists them, is not installed.

    >>> synsets()["n01440764"], synsets()["n15075141"]  # tench, toilet paper
    (0, 999)
    """
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError as error:
        raise ImportError(
            not_installed("timm", "which lists ImageNet's classes", "vision", error)
        ) from error
    info: Any = ImageNetInfo()
    return {str(name): index for index, name in enumerate(info.label_names())}


def synset_folders(folder: Path) -> list[str]:
    """Return the synsets that a folder has folders of, sorted; not all need be there.

    Raises:
        FileNotFoundError: There is no such folder, or no folder in it.
        ValueError: A folder in it is no synset of the thousand.
    """
    found = sorted(e.name for e in os.scandir(folder) if e.is_dir()) if folder.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"Expected folders named by synsets, such as n01440764, in {folder.resolve()}, got "
            f"{'none in it' if folder.is_dir() else 'no such folder'}. Unpack ImageNet there, each "
            "image in the folder of its class."
        )
    strange = [name for name in found if name not in synsets()]
    if strange:
        raise ValueError(
            f"Expected folders of {folder} to be synsets of ImageNet's 1,000 classes, got "
            f"{len(strange)} others. {unknown('synset', strange[0], synsets())} Move them away."
        )
    return found


def listing(folder: Path) -> tuple[list[str], Tensor]:
    """Return the images in the synset folders of a folder, sorted, and their classes.

    Args:
        folder: Holds ``n01440764`` and the like, and these hold the images.

    Returns:
        ``N`` paths in the folder, and ``(N,)`` int64 from 0 to 999: a class is the same whichever
        others are there.

    Raises:
        FileNotFoundError: There is no such folder, or no folder in it.
        ValueError: A folder in it is no synset of the thousand, or holds no image.
    """
    images = {synset: _images(folder / synset) for synset in synset_folders(folder)}
    names = [f"{synset}/{image}" for synset, there in images.items() for image in there]
    classes = [synsets()[synset] for synset, there in images.items() for _ in there]
    return names, torch.tensor(classes)


def corrupted_folder(folder: Path, name: str, severity: int) -> Path:
    """Return where ImageNet-C has a corruption at a severity.

    Args:
        folder: Holds ``gaussian_noise`` and the like, by themselves or in ``noise``, ``blur``,
            ``weather``, ``digital`` and ``extra``, as the archives are called; these hold the
            severities ``1`` to ``5``, and these the synset folders.
        name: Of the corruption.
        severity: 1 to 5.

    Raises:
        FileNotFoundError: It is in neither place.
    """
    places = [folder / name, *sorted(folder.glob(f"*/{name}"))]
    for place in places:
        if (place / str(severity)).is_dir():
            return place / str(severity)
    raise FileNotFoundError(
        f"Expected {name}/{severity} of ImageNet-C in {folder.resolve()} or in a folder of it, got "
        "no such folder. Unpack the archive that holds it there, set corrupted to the folder that "
        'does, or have the corruptions made with corruptions="made".'
    )


def check_same_images(folder: Path, names: list[str]) -> None:
    """Refuse a folder of ImageNet-C that lacks some of the clean images.

    Raises:
        ValueError: An image is missing, or a synset is unknown.
    """
    there = set(listing(folder)[0])
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(
            f"Expected all {len(names)} clean test images in {folder}, corrupted, got "
            f"{len(names) - len(missing)} of them; e.g. {missing[0]} is not there. Unpack the "
            "archive anew, or keep as many images in val."
        )


def _images(folder: Path) -> list[str]:
    """Return the names of the images in a synset folder, sorted."""
    names = sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(_ENDS))
    if not names:
        raise ValueError(
            f"Expected images ({', '.join(_ENDS)}) in {folder}, got none. Unpack the synset's "
            "archive there, or remove the folder."
        )
    return names
