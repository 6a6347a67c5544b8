"""Files of airfoils: computed lift and drag, and a file like UCI's of self-noise."""

from pathlib import Path

import torch
from compute_airfoils import main


def write_polars(root: Path, *counts: int) -> Path:
    """Compute lift and drag of so many profiles, a file for each count."""
    for count in counts:
        main([f"--root={root}", f"--profiles={count}"])
    return root


def write_self_noise(folder: Path) -> Path:
    """Write a file like UCI's airfoil_self_noise.dat: 1,503 lines of six numbers."""
    draw = torch.Generator().manual_seed(0)
    low = torch.tensor([200, 0, 0.0254, 31.7, 0.0005, 104], dtype=torch.float64)
    high = torch.tensor([20000, 22, 0.3, 71, 0.058, 140], dtype=torch.float64)
    rows = low + (high - low) * torch.rand(1503, 6, dtype=torch.float64, generator=draw)
    lines = ["\t".join(f"{value:.6g}" for value in row) + "\n" for row in rows.tolist()]
    file = folder / "airfoil_self_noise.dat"
    file.write_text("".join(lines))
    return file
