"""Scalars of a benchmark for TensorBoard, where it is installed: a run for each row."""

from __future__ import annotations

from pathlib import Path

from it3_lightning.benchmark.results import Results

_OURS = ".it3"  # at the end of the files that are written here, and replaced


def write_scalars(results: Results, folder: Path) -> bool:
    """Write scores by seed and gains into ``tensorboard``; return whether it is installed.

    ``tensorboard --logdir FOLDER/tensorboard`` shows the rows beside each other: ``STREAM/SHIFT``
    has the score of each seed as a step, ``gain/STREAM`` the mean gain over the shifts.

    Args:
        results: of a benchmark.
        folder: of its output.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    place = folder / "tensorboard"
    for former in place.glob(f"*/events.out.tfevents.*{_OURS}"):
        former.unlink()
    for row in results.rows:
        name = f"{row.training}, {row.name}".replace("/", "_")
        with SummaryWriter(str(place / name), filename_suffix=_OURS) as writer:
            for record in results.records:
                if (record.training, record.row) == (row.training, row.name):
                    tag = f"{record.stream.replace('/', ' ')}/{record.shift.replace('/', ' ')}"
                    writer.add_scalar(tag, record.score, record.seed)
            for stream in results.streams:
                gain = results.gain(row, stream) if results.has(row, stream) else None
                if gain is not None:
                    tag = f"gain/{stream.replace('/', ' ')}"
                    writer.add_scalar(tag, gain.mean, 0)
    return True
