"""Read UCI's file of airfoil self-noise, and refuse a damaged one."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

Column = Literal["frequency", "angle", "chord", "velocity", "thickness", "level"]

FILE = "airfoil_self_noise.dat"

_ROWS = 1503
_RANGES = MappingProxyType(  # of the published file, in Hz, degrees, m, m/s, m, dB
    {
        "frequency": (200, 20000),
        "angle": (0, 22.2),
        "chord": (0.0254, 0.3048),
        "velocity": (31.7, 71.3),
        "thickness": (0.0004, 0.0585),
        "level": (103.3, 141.0),
    }
)


def read(file: Path) -> Tensor:
    """Read the measurements, ``(1503, 6)``, float64: the five features and the sound level.

    Args:
        file: ``airfoil_self_noise.dat``, as UCI publishes it.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is empty, cut off, damaged or another file.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected {file.resolve()}, got no such file. Get 'Airfoil Self-Noise' of the UCI "
            f"Machine Learning Repository, and place {FILE} there, or set root to its folder."
        )
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    rows = [_row(file, number, line) for number, line in enumerate(lines, 1)]
    if len(rows) != _ROWS:
        raise ValueError(
            f"Expected {_ROWS} measurements in {file}, got {len(rows)}. It is empty, cut off or "
            "another file: put the published one in its place."
        )
    return torch.tensor(rows, dtype=torch.float64)


def _row(file: Path, number: int, line: str) -> list[float]:
    """Return the numbers of a line; refuse others than six, each in its published range."""
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        values = []
    pairs = zip(values, _RANGES.values(), strict=False)
    fits = [low <= value <= high for value, (low, high) in pairs]
    if len(values) != len(_RANGES) or not all(fits):
        ranges = ", ".join(f"{name} {low} to {high}" for name, (low, high) in _RANGES.items())
        raise ValueError(
            f"Expected six numbers ({ranges}) in line {number} of {file}, got {line[:80]!r}. It is "
            "damaged or another file: put the published one in its place."
        )
    return values
