"""Download what torchvision knows where to find, if that is allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def download(
    dataset: Callable[..., Any],
    root: str | Path,
    *,
    allowed: bool,
    missing: Callable[[str], FileNotFoundError],
) -> None:
    """Have a dataset of torchvision download its files.

    Args:
        dataset: Its class.
        root: Folder of the data.
        allowed: Whether it may.
        missing: Makes the error that says which files to place where, of the reason.

    Raises:
        FileNotFoundError: It may not, or the download failed.
    """
    if not allowed:
        raise missing("download=False")
    try:
        dataset(root, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise missing(f"the download failed: {error}") from error
