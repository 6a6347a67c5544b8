"""Read the IDX files of MNIST and its kin, plain or gzipped, and refuse damaged ones."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file

_MAGIC = {3: 2051, 1: 2049}  # number of axes -> first four bytes, for unsigned bytes


def find(folder: Path, part: str) -> tuple[Path, Path] | None:
    """Return the image and the label file of a part in a folder, or None where one is missing.

    Args:
        folder: Where to look.
        part: ``"train"`` or ``"t10k"``. The names are ``train-images-idx3-ubyte`` or
            ``train-images.idx3-ubyte``, as they are or with ``.gz``; a plain file goes first.
    """
    pair = []
    for stem, axes in ((f"{part}-images", 3), (f"{part}-labels", 1)):
        names = [f"{stem}{mark}idx{axes}-ubyte" for mark in "-."]
        files = [folder / (name + end) for end in ("", ".gz") for name in names]
        pair += [file for file in files if file.is_file()][:1]
    return (pair[0], pair[1]) if len(pair) == 2 else None


def read(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """Read a file of images and the file of their labels.

    Args:
        images: Plain or gzipped IDX file of unsigned bytes with three axes.
        labels: The same with one axis.

    Returns:
        Images ``(N, H, W)``, uint8, and labels ``(N,)``, int64.

    Raises:
        ValueError: A file is empty, cut off, damaged or of another kind, or the counts differ.

    Source: the file format at the end of Y. LeCun's page of the MNIST database.
    """
    pixels, classes = _read(images, 3), _read(labels, 1).long()
    if len(pixels) != len(classes):
        raise ValueError(
            f"Expected a label for each of the {len(pixels)} images of {images}, got "
            f"{len(classes)} in {labels}. Put files there that belong together."
        )
    return pixels, classes


def _read(path: Path, axes: int) -> Tensor:
    """Read one file: a plain one with torchvision's reader, a gzipped one in memory."""
    start = 4 * (1 + axes)
    if path.suffix == ".gz":
        data = _unpacked(path)
        shape = _shape(path, data[:start], len(data), axes)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(shape)
    with path.open("rb") as file:
        _shape(path, file.read(start), path.stat().st_size, axes)
    values: Tensor = read_image_file(str(path)) if axes == 3 else read_label_file(str(path))
    return values


def _unpacked(path: Path) -> bytes:
    """Return what a gzipped file holds."""
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"Expected {path} to be a whole gzip file, got {path.stat().st_size} bytes that do "
            f"not unpack ({error}). Delete it and fetch it again."
        ) from error


def _shape(path: Path, header: bytes, size: int, axes: int) -> tuple[int, ...]:
    """Return the shape that a header tells, after comparing it with the size of the file."""
    start = 4 * (1 + axes)
    if len(header) < start:
        raise ValueError(
            f"Expected {path} to hold at least {start} bytes, got {len(header)}. "
            "It is empty or cut off: delete it and fetch it again."
        )
    magic, *shape = struct.unpack(f">{1 + axes}I", header)
    if magic != _MAGIC[axes]:
        raise ValueError(
            f"Expected {path} to begin with {_MAGIC[axes]} (unsigned bytes, {axes} axes), got "
            f"{magic}. It is another kind of file: put the right one in its place."
        )
    if size != start + math.prod(shape) or not math.prod(shape):
        raise ValueError(
            f"Expected {path} to hold {start + math.prod(shape)} bytes for its shape "
            f"{tuple(shape)}, at least one of them a value, got {size}. "
            "It is cut off or damaged: delete it and fetch it again."
        )
    return tuple(shape)
