"""The forces on wing profiles, and the file that keeps them: replaced whole, checked when read."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Polars:
    """Profiles and the forces on them, all float64.

    Args:
        parameters: ``(N, 3)``: camber, position and thickness, see
            :func:`~it3_lightning.data.naca.contours`.
        lift: ``(N,)`` lift coefficients.
        drag: ``(N,)`` drag coefficients.
        confidence: ``(N,)``: the solver's own, between 0 and 1.
    """

    parameters: Tensor
    lift: Tensor
    drag: Tensor
    confidence: Tensor

    @classmethod
    def none(cls) -> Polars:
        """Return those of no profile."""
        return cls(*(torch.empty(shape, dtype=torch.float64) for shape in ((0, 3), 0, 0, 0)))

    def __len__(self) -> int:
        return len(self.lift)

    def joined(self, other: Polars) -> Polars:
        """Return these and others behind them."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in _NAMES]
        return Polars(*(torch.cat(pair) for pair in pairs))

    def good(self, least: float) -> Tensor:
        """Return ``(N,)``: lift finite, drag finite and positive, confidence at least ``least``.

        >>> one = torch.ones(3).double()
        >>> Polars(one[:, None], one, torch.tensor([1.0, 0.0, 1.0]), one / 2).good(0.5)
        tensor([ True, False,  True])
        """
        finite = self.lift.isfinite() & self.drag.isfinite()
        return finite & (self.drag > 0) & (self.confidence >= least)


_NAMES = tuple(field.name for field in fields(Polars))


def write(file: Path, settings: str, polars: Polars) -> None:
    """Put a whole new file in the place of the last one: an interruption leaves one or the other.

    Args:
        file: ``.npz``.
        settings: what the polars were computed with.
        polars: all that are known.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    arrays = {name: getattr(polars, name).numpy() for name in _NAMES}
    try:
        with part.open("wb") as stream:
            np.savez(stream, settings=np.array(settings), **arrays)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def read(file: Path, settings: str, parameters: Tensor) -> Polars:
    """Read the polars of the first of these profiles, as many as are known.

    Args:
        file: ``.npz``; where there is none, no polars are known.
        settings: what the polars must have been computed with.
        parameters: ``(N, 3)`` of all profiles.

    Raises:
        ValueError: the file is damaged, or holds the polars of other profiles or settings.
    """
    if not file.is_file():
        return Polars.none()
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            theirs = str(arrays["settings"])
            polars = Polars(*(torch.from_numpy(arrays[name]) for name in _NAMES))
    except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Expected {file} to be a whole .npz file of settings, {', '.join(_NAMES)}, got "
            f"{file.stat().st_size} bytes that cannot be read as one ({error}). Delete it: it is "
            "computed anew."
        ) from error
    counts = {len(getattr(polars, name)) for name in _NAMES}
    if (
        theirs != settings
        or len(counts) > 1
        or not torch.equal(polars.parameters, parameters[: len(polars)])
    ):
        raise ValueError(
            f"Expected {file} to hold profiles of {settings}, got {sorted(counts)} values of "
            f"{theirs}, or other profiles. Delete it: it is computed anew."
        )
    return polars
