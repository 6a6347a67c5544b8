"""Compute lift and drag of NACA profiles with NeuralFoil into a file for ``AirfoilDataModule``.

python examples/datasets/compute_airfoils.py --root data/airfoils --profiles 2000

The file is replaced after every hundred profiles, so that an interrupted computation goes on where
it stopped, to the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from it3_lightning.data.airfoils import POLAR_NAMES, ModelSize, Polars, ProfileSet, contours
from it3_lightning.utils import files

CHUNK = 100  # profiles between two writes of the file
NODES = 200  # of the contour that is analysed, whatever a network sees of it


def analysed(profiles: ProfileSet, parameters: Tensor) -> Polars:
    """Return the forces on profiles, one after the other: a profile's do not know its chunk."""
    try:
        from neuralfoil import get_aero_from_coordinates
    except ImportError as error:
        raise ImportError(
            f"Expected neuralfoil, which computes lift and drag, but it cannot be imported "
            f"({error}). Install it with: pip install 'it3_lightning[airfoils]'"
        ) from error
    rows = []
    for profile in contours(parameters, NODES):
        closed = torch.cat([profile, profile[:1]]).numpy()
        aero = get_aero_from_coordinates(
            closed, alpha=profiles.angle, Re=profiles.reynolds, model_size=profiles.model_size
        )
        rows.append([aero[name].item() for name in ("CL", "CD", "analysis_confidence")])
    return Polars(parameters, *torch.tensor(rows, dtype=torch.float64).unbind(1))


def write(file: Path, settings: str, polars: Polars) -> None:
    """Put a whole new file in the place of the last one: an interruption leaves one or the other.

    Args:
        file: ``.npz``.
        settings: What the polars were computed with.
        polars: All that are known.
    """
    arrays = {name: getattr(polars, name).numpy() for name in POLAR_NAMES}
    files.write(file, lambda stream: np.savez(stream, settings=np.array(settings), **arrays))


def compute(profiles: ProfileSet, root: str | Path) -> Polars:
    """Return the forces on all profiles, computing those that the file in ``root`` lacks."""
    known = profiles.known(root)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("NeuralFoil", total=profiles.count, completed=len(known))
        for chunk in torch.split(profiles.parameters()[len(known) :], CHUNK):
            if not len(chunk):
                break
            more = analysed(profiles, chunk)
            pairs = [(getattr(known, name), getattr(more, name)) for name in POLAR_NAMES]
            known = Polars(*(torch.cat(pair) for pair in pairs))
            write(profiles.file(root), profiles.settings, known)
            progress.advance(task, len(chunk))
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute what the file of these settings lacks."""
    default = ProfileSet()
    parser = argparse.ArgumentParser(description="Compute lift and drag of wing profiles.")
    parser.add_argument("--root", type=Path, default=Path("data/airfoils"))
    parser.add_argument("--profiles", type=int, default=default.count, help="how many are drawn")
    parser.add_argument("--angle", type=float, default=default.angle, help="of attack, in degrees")
    parser.add_argument("--reynolds", type=float, default=default.reynolds, help="Reynolds number")
    parser.add_argument("--model-size", choices=get_args(ModelSize), default=default.model_size)
    known = parser.parse_args(arguments)
    profiles = ProfileSet(
        count=known.profiles,
        angle=known.angle,
        reynolds=known.reynolds,
        model_size=known.model_size,
    )
    polars = compute(profiles, known.root)
    print(f"Lift and drag of {len(polars)} profiles in {profiles.file(known.root)}")


if __name__ == "__main__":
    main()
