"""Reads delimited files with pandas, plain or gzipped, and refuses damaged ones by name."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from it3_lightning.utils.messages import not_installed

MISSING_WORDS = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL")
"""Cells that stand for a missing value."""


def read(
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    text: Sequence[str] = (),
    separator: str = ",",
    comment: str | None = None,
) -> Any:
    """Read a delimited file into a pandas DataFrame.

    Blanks after a separator and empty lines are skipped; cells that hold one of ``MISSING_WORDS``
    are missing. A file whose name ends in ``.gz`` is unpacked.

    Args:
        path: of the file.
        names: of the columns, where the file has no header.
        text: columns to keep as text, though they hold numbers.
        separator: one character between cells.
        comment: first character of lines to skip.

    Returns:
        A DataFrame of at least one row; a column holds numbers where all its cells do, else text.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: pandas is not installed.
        ValueError: the file is empty, cut off or damaged, or a row has too few or too many cells.
    """
    pandas, file = needed("pandas"), Path(path)
    content = _content(file)
    errors = pandas.errors
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", errors.ParserWarning)  # rows longer than the header
            frame = pandas.read_csv(
                io.BytesIO(content),
                sep=separator,
                header=0 if names is None else None,
                index_col=False,
                comment=comment,
                skipinitialspace=True,
                keep_default_na=False,
                na_values=list(MISSING_WORDS),
                dtype=dict.fromkeys(text, object) if names is None else None,
                low_memory=False,
            )
    except (
        UnicodeDecodeError,
        errors.EmptyDataError,
        errors.ParserError,
        errors.ParserWarning,
    ) as error:
        raise ValueError(
            f"Expected {file} to be a table with cells separated by {separator!r}, got "
            f"{len(content)} bytes that are none ({str(error).strip()}). It is empty, damaged or "
            "another kind of file: fetch it again, or set separator."
        ) from error
    frame = frame if names is None else _named(file, frame, names)
    _check_rows(file, content, frame, separator, comment)
    return frame


def needed(package: str) -> Any:
    """Import a package of the extra ``tabular``.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(not_installed(package, "which tables need", "tabular", error)) from error


def _content(file: Path) -> bytes:
    """Return what a file holds, unpacked."""
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected a file {file.resolve()}, got none. Place it there, or give its path."
        )
    data = file.read_bytes()
    if file.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"Expected {file} to be a whole gzip file, got {len(data)} bytes that do not unpack "
            f"({error}). Delete it and fetch it again."
        ) from error


def _named(file: Path, frame: Any, names: Sequence[str]) -> Any:
    """Name the columns of a file that has no header."""
    if frame.shape[1] != len(names):
        raise ValueError(
            f"Expected {len(names)} columns in {file} ({', '.join(names[:3])}, ...), got "
            f"{frame.shape[1]}. It is another file, or cut off: put the right one in its place."
        )
    return frame.set_axis(list(names), axis=1)


def _check_rows(
    file: Path, content: bytes, frame: Any, separator: str, comment: str | None
) -> None:
    """Refuse rows that are too short, which pandas fills up."""
    width = frame.shape[1]
    if not len(frame):
        raise ValueError(f"Expected rows in {file}, got a header alone. Fetch the file again.")
    if not frame.iloc[:, -1].isna().any():
        return  # a row that is too short lacks its last cell
    for number, cells in _rows(content, separator, comment):
        if cells != width:
            raise ValueError(
                f"Expected {width} cells in every row of {file}, got {cells} in line {number}. "
                "The file is cut off or damaged there: fetch it again, or set separator."
            )


def _rows(content: bytes, separator: str, comment: str | None) -> Iterator[tuple[int, int]]:
    """Count the cells of each line that is neither empty nor a comment."""
    lines = csv.reader(io.StringIO(content.decode()), delimiter=separator, skipinitialspace=True)
    for cells in lines:
        if cells and not (comment and cells[0].startswith(comment)):
            yield lines.line_num, len(cells)
