"""Prediction table: whole batches of rows in part files, merged in the order of the samples."""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, Literal

from it3_lightning.utils.files import write
from it3_lightning.utils.messages import not_installed

Format = Literal["csv", "parquet"]

KEY = ("dataloader", "index")  # the first columns, by which rows are told apart and ordered
_OPEN = 64  # files read at once
_CHUNK = 10_000  # rows of a parquet table held at once


def check_format(kind: str) -> None:
    """Refuse a format that cannot be written.

    Raises:
        ValueError: it is unknown.
        ImportError: its package is missing.
    """
    if kind not in ("csv", "parquet"):
        raise ValueError(f"Expected format 'csv' or 'parquet', got {kind!r}.")
    if kind == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            text = not_installed("pyarrow", "which writes parquet files", "parquet", error)
            raise ImportError(text) from error


def write_part(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of one batch, whole or not at all, in the order of their samples.

    Args:
        file: to be written.
        rows: values by column, the same columns in all of them, those of :data:`KEY` first.
    """
    ordered = sorted(rows, key=lambda row: (row[KEY[0]], row[KEY[1]]))
    header = list(ordered[0]) if ordered else list(KEY)
    write(file, lambda stream: _write_csv(stream, header, (row.values() for row in ordered)))


def indices_in(file: Path) -> list[int]:
    """Return the indices of the samples in a part, ascending."""
    with file.open(newline="", encoding="utf-8") as stream:
        return [int(row[KEY[1]]) for row in csv.DictReader(stream)]


def merge(parts: Iterable[Path], target: Path, kind: Format) -> int:
    """Merge parts into one table with a row for each sample, in order; return their number.

    Of rows of one sample, as a sampler of several processes repeats some, the first one is kept.
    No more than a few rows are in memory, and no more than 64 files open.

    Args:
        parts: files of :func:`write_part`, in order of precedence.
        target: the file to be written, whole or not at all.
        kind: of the table.
    """
    counted = _Counted()
    with TemporaryDirectory(dir=target.parent) as folder, ExitStack() as stack:
        files, level = list(parts), 0
        while len(files) > _OPEN:
            groups = [files[i : i + _OPEN] for i in range(0, len(files), _OPEN)]
            files = [_joined(g, Path(folder, f"{level}-{i}.csv")) for i, g in enumerate(groups)]
            level += 1
        header, rows = _read(files, stack)
        own = counted(_first_of_each(rows))
        save = _write_csv if kind == "csv" else _write_parquet
        write(target, lambda stream: save(stream, header, own))
    return counted.number


class _Counted:
    """Counts what is iterated over."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, rows: Iterable[list[str]]) -> Iterator[list[str]]:
        for row in rows:
            self.number += 1
            yield row


def _joined(files: Sequence[Path], target: Path) -> Path:
    """Merge some parts into a larger one."""
    with ExitStack() as stack:
        header, rows = _read(files, stack)
        write(target, lambda stream: _write_csv(stream, header, rows))
    return target


def _read(files: Sequence[Path], stack: ExitStack) -> tuple[list[str], Iterator[list[str]]]:
    """Return the columns of some parts, and their rows in order.

    Raises:
        ValueError: they have different columns.
    """
    opened = [stack.enter_context(f.open(newline="", encoding="utf-8")) for f in files]
    tables = [csv.reader(stream) for stream in opened]
    headers = [next(table) for table in tables]
    for file, header in zip(files, headers, strict=True):
        if header != headers[0]:
            raise ValueError(
                f"Expected columns {', '.join(headers[0])}, as in {files[0].name}, got "
                f"{', '.join(header)} in {file.name}: predict_step returned one thing for some "
                "batches, and another for others."
            )
    return headers[0], heapq.merge(*tables, key=_key)


def _key(row: Sequence[str]) -> tuple[int, int]:
    return int(row[0]), int(row[1])


def _first_of_each(rows: Iterable[list[str]]) -> Iterator[list[str]]:
    last = None
    for row in rows:
        if _key(row) != last:
            yield row
        last = _key(row)


def _write_csv(stream: IO[bytes], header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows([_text(value) for value in row] for row in rows)
    text.detach()


def _text(value: Any) -> str:
    """Return a value as text: nothing as an empty one, numbers so that they are read back."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


_INTEGERS = (*KEY, "predicted_class", "source_class")
_FLAGS = ("moved", "skipped", "gated")
_PATHS = ("predicted_map", "source_map")


def _write_parquet(stream: IO[bytes], header: Sequence[str], rows: Iterator[list[str]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    types = {
        **dict.fromkeys(_INTEGERS, pa.int64()),
        **dict.fromkeys(_FLAGS, pa.bool_()),
        **dict.fromkeys(_PATHS, pa.string()),
    }
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in header])
    with parquet.ParquetWriter(stream, schema) as table:
        while chunk := list(islice(rows, _CHUNK)):
            columns = zip(header, zip(*chunk, strict=True), strict=True)
            values = {name: [_value(name, text) for text in column] for name, column in columns}
            table.write_table(pa.table(values, schema=schema))


def _value(name: str, text: str) -> Any:
    """Return what a text of a column stands for."""
    if text == "" or name in _PATHS:
        return text or None
    if name in _FLAGS:
        return text == "True"
    return int(text) if name in _INTEGERS else float(text)
