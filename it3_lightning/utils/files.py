"""Files: written whole or not at all, and read back only as they were written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

_DIGEST = "digest"


def write(file: Path, content: str | Callable[[IO[bytes]], object]) -> None:
    """Put a whole new file in the place of the last one: an interruption leaves one or the other.

    Args:
        file: its folder is made where it is missing.
        content: text, written as UTF-8, or what writes bytes into a stream.
    """
    target = file.resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            if isinstance(content, str):
                stream.write(content.encode())
            else:
                content(stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_json(file: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write plain data as JSON, with a digest that :func:`read_json` compares."""
    plain = json.loads(json.dumps(content))
    write(file, json.dumps({**plain, _DIGEST: _digest(plain)}, indent=indent))


def read_json(file: Path) -> dict[str, Any]:
    """Return what :func:`write_json` wrote; a file without a digest is taken as it is.

    Raises:
        ValueError: it is no JSON, or not what was written.
    """
    content = json.loads(file.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"Expected a mapping, got a {type(content).__name__}.")
    if content.pop(_DIGEST, None) not in (None, _digest(content)):
        raise ValueError("Expected what was written, got a content of another digest.")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_archive(file: str | Path) -> None:
    """Refuse what is not, byte for byte, an archive that ``torch.save`` wrote.

    ``torch.load`` compares no checksums: changed bytes would be read as other weights.

    Raises:
        ValueError: it is none, or not what was written.
    """
    with Path(file).open("rb") as stream:
        try:
            archive = zipfile.ZipFile(stream)
            summed = any(entry.CRC for entry in archive.infolist())  # torch can leave them out
            broken = archive.testzip() if summed else None
        except Exception as error:  # zipfile has no common type for damage
            raise ValueError(f"Expected a file of torch.save, got another: {file}.") from error
    if broken is not None:
        raise ValueError(f"Expected a file as torch.save wrote it, got a damaged one: {file}.")


def load_plain(file: str | Path) -> Any:
    """Return the plain data that ``torch.save`` wrote into a file, on the CPU.

    Raises:
        ValueError: it is damaged, of another program, or holds more than plain data.
    """
    archive = zipfile.is_zipfile(file)  # the former format is none, and has no checksums
    if archive:
        check_archive(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common type for damage
        if archive and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{str(file)!r} holds objects besides weights, which are not loaded: they could "
                "run code. Save the weights alone, torch.save(model.state_dict(), path), and give "
                "that path."
            ) from error
        raise ValueError(
            f"Expected weights that torch.save wrote, got another or a damaged file: {file}."
        ) from error
