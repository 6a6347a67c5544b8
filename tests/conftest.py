"""What all tests share: one thread, and small data in the real on-disk formats."""

import gzip
import struct
from pathlib import Path

import pytest
import torch
from tables import write_tables
from torch import Tensor

torch.set_num_threads(1)  # in networks this small, threads only wait for each other


def write_idx(path: Path, values: Tensor) -> None:
    """Write unsigned bytes as a gzipped IDX file: magic, sizes, values."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim)
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + sizes + values.numpy().tobytes()))


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


@pytest.fixture(scope="session")
def airfoil_data(idx_images: Path) -> Path:
    """The folder of images with a file of self-noise, where lift and drag are kept too."""
    write_self_noise(idx_images)
    return idx_images


@pytest.fixture(scope="session")
def idx_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 200 training and 80 test images of 28 x 28 in ten classes; and tables."""
    folder = tmp_path_factory.mktemp("idx")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 200), ("t10k", 80)):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    write_tables(folder / "tables")
    return folder
