"""What all tests share: one thread, and small data in the real on-disk formats."""

import gzip
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
import torch
from helpers.airfoil_files import write_polars, write_self_noise
from helpers.tables import write_tables
from torch import Tensor

torch.set_num_threads(1)  # in networks this small, threads only wait for each other


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Let logs and figures be again as they were: scripts that tests run set both."""
    logs = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [log.level for log in logs]
    with matplotlib.rc_context():
        yield
    for log, level in zip(logs, levels, strict=True):
        log.setLevel(level)


def write_idx(path: Path, values: Tensor) -> None:
    """Write unsigned bytes as a gzipped IDX file: magic, sizes, values."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim)
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + sizes + values.numpy().tobytes()))


@pytest.fixture(scope="session")
def airfoil_data(idx_images: Path) -> Path:
    """The folder of images with a file of self-noise, and lift and drag of 400 profiles."""
    write_self_noise(idx_images)
    return write_polars(idx_images, 400)


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
