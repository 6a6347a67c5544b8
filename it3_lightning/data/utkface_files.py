"""The file names of UTKFace, which hold the ages, and lists that split them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_NAME = re.compile(r"(\d{1,3})_[01]_[0-4]_\d+\s*\.jpg(\.chip\.jpg)?", re.IGNORECASE)


def age_of(name: str) -> int | None:
    """Return the age in years that a file name tells; None where a field is missing or odd.

    The names are ``age_gender_race_datetime.jpg``; the faces that are aligned and cropped end in
    ``.jpg.chip.jpg``. Gender is 0 or 1, race 0 to 4.

    Source: Z. Zhang, Y. Song and H. Qi, "Age Progression/Regression by Conditional Adversarial
    Autoencoder" (CVPR 2017), the page of the UTKFace dataset.

    >>> age_of("25_0_1_20170116174525125.jpg.chip.jpg")
    25
    >>> age_of("61_1_20170109142408075.jpg.chip.jpg") is None  # no race
    True
    """
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1])


def find(root: Path) -> tuple[Path, list[str], list[str]]:
    """Return the folder of the images, the paths in it that tell an age, and the others, sorted.

    Args:
        root: The folder, or the one that holds it as ``UTKFace``. The images lie in it, or in
            ``part1``, ``part2`` and ``part3`` of it.

    Raises:
        FileNotFoundError: There is no image.
        ValueError: No name holds an age, or a name is there twice.
    """
    for folder in (root, root / "UTKFace"):
        names = _images(folder)
        if names:
            return folder, *_aged(folder, names)
    raise FileNotFoundError(
        f"Expected images named like 25_0_1_20170116174525125.jpg in {root.resolve()}, in UTKFace "
        "of it, or in part1 to part3 of one of them, got none. Unpack UTKFace.tar.gz there, or set "
        "root to the folder that holds them."
    )


def read_list(path: Path, names: Sequence[str]) -> list[int]:
    """Return which of the images a file lists, one name a line, in their own order.

    Args:
        path: A text file of names, with or without their folder; empty lines count for nothing.
        names: Paths of the images.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A name is not among the images, or none is listed.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a list of file names at {path.resolve()}, got no such file. Write one name "
            "a line, or leave the lists out for a split by the seed."
        )
    rows = {Path(name).name: row for row, name in enumerate(names)}
    listed = [Path(line.strip()).name for line in path.read_text().splitlines() if line.strip()]
    strange = [name for name in listed if name not in rows]
    if strange or not listed:
        raise ValueError(
            f"Expected {path} to list images that are there and whose names tell an age, one a "
            f"line, got {len(strange)} others of {len(listed)}, e.g. {strange[:3]}. Correct the "
            "list, or fetch the images."
        )
    return sorted({rows[name] for name in listed})


def _images(folder: Path) -> list[str]:
    """Return the JPEG files in a folder and its parts, sorted."""
    places = [folder, *sorted(folder.glob("part[123]"))]
    found = [file for place in places for file in place.glob("*") if _is_jpeg(file)]
    return sorted(str(file.relative_to(folder)) for file in found)


def _is_jpeg(file: Path) -> bool:
    return file.name.lower().endswith("jpg")


def _aged(folder: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """Return the names that hold an age, and the others."""
    twice = [name for name, times in Counter(Path(n).name for n in names).items() if times > 1]
    if twice:
        raise ValueError(
            f"Expected each image once in {folder}, got {len(twice)} of them in several parts, "
            f"e.g. {twice[0]}: they could be trained and tested on. Remove one copy."
        )
    kept = [name for name in names if age_of(Path(name).name) is not None]
    odd = sorted(set(names) - set(kept))
    if not kept:
        raise ValueError(
            f"Expected names like 25_0_1_20170116174525125.jpg in {folder}, got {len(odd)} others, "
            f"e.g. {odd[0]}. The age is told by the name alone: keep the published names."
        )
    return kept, odd
