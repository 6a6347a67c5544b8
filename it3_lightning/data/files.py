"""Guards of files: packed and NumPy files read whole, and one error for what is damaged."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_AGAIN = "Delete it and fetch it again."


def damaged(path: Path, what: str, error: Exception, remedy: str = _AGAIN) -> ValueError:
    """Build the error for a file that is empty, cut off, damaged or of another kind."""
    return ValueError(
        f"Expected {path} to be {what}, got {path.stat().st_size} bytes that are none "
        f"({type(error).__name__}: {str(error).strip()}). {remedy}"
    )


def read_bytes(path: Path) -> bytes:
    """Return what a file holds, unpacked where its name ends in ``.gz``."""
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, OSError, zlib.error) as error:
        raise damaged(path, "a whole gzip file", error) from error


def mapped(path: Path) -> NDArray[Any]:
    """Map an ``.npy`` file into memory, copying a page only where somebody writes to it."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="c")
    except FileNotFoundError:
        raise
    except (EOFError, OSError, ValueError) as error:
        raise damaged(path, "a whole .npy file", error) from error
    return array


def read_npz(path: Path, names: Sequence[str], remedy: str) -> tuple[list[Tensor], str]:
    """Return some arrays of an ``.npz`` file, and the text ``settings`` in it, if there is one.

    Nothing is unpickled: a file from elsewhere cannot run code.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            settings = str(arrays["settings"]) if "settings" in arrays else ""
            return [torch.from_numpy(arrays[name]) for name in names], settings
    except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise damaged(path, f"a whole .npz file of {', '.join(names)}", error, remedy) from error
