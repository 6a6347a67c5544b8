"""Reader of delimited files: pandas reads; damage is refused by file, column and row."""

from __future__ import annotations

import csv
import importlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from it3_lightning.data.base import damaged, read_bytes
from it3_lightning.data.tables import MISSING, UNKNOWN, Schema, Table
from it3_lightning.utils.messages import not_installed

Task = Literal["classification", "regression"]
MISSING_WORDS = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL")
"""Cells that stand for a missing value."""
_OPTIONS: dict[str, Any] = {
    "index_col": False,
    "skipinitialspace": True,
    "keep_default_na": False,
    "na_values": list(MISSING_WORDS),
    "low_memory": False,
}
_MOST = 1000  # categories of a column; more are names or numbers of rows
_FEW = 10  # names shown in an error


def read(
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    text: Sequence[str] = (),
    separator: str = ",",
    comment: str | None = None,
) -> Any:
    """Read a delimited file, plain or ``.gz``, into a pandas DataFrame of at least one row.

    Blanks after a separator and empty lines are skipped; cells that hold one of ``MISSING_WORDS``
    are missing. A column holds numbers where all its cells do, else text.

    Args:
        path: Of the file.
        names: Of the columns, where the file has no header.
        text: Columns to keep as text, though they hold numbers.
        separator: One character between cells.
        comment: First character of lines to skip.

    Raises:
        ValueError: The file is empty, cut off or damaged, or a row has too few or too many cells.
    """
    pandas, file = needed("pandas"), Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected a file {file.resolve()}, got none. Place it there, or give its path."
        )
    content, errors = read_bytes(file), pandas.errors
    damages = errors.EmptyDataError, errors.ParserError, errors.ParserWarning
    header = 0 if names is None else None
    types = dict.fromkeys(text, object) if names is None else None
    options = {**_OPTIONS, "sep": separator, "header": header, "comment": comment, "dtype": types}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", errors.ParserWarning)  # rows longer than the header
            frame = pandas.read_csv(io.BytesIO(content), **options)
    except (UnicodeDecodeError, *damages) as error:
        what = f"a table with cells separated by {separator!r}"
        remedy = "It is empty, damaged or another kind of file: fetch it again, or set separator."
        raise damaged(file, what, error, remedy) from error
    if names is not None:
        if frame.shape[1] != len(names):
            raise ValueError(
                f"Expected {len(names)} columns in {file} ({', '.join(names[:3])}, ...), got "
                f"{frame.shape[1]}. It is another file, or cut off: put the right one in its place."
            )
        frame = frame.set_axis(list(names), axis=1)
    if not len(frame):
        raise ValueError(f"Expected rows in {file}, got a header alone. Fetch the file again.")
    if frame.iloc[:, -1].isna().any():  # a row that is too short, which pandas fills up
        _check_widths(file, content.decode(), frame.shape[1], separator, comment)
    return frame


def _check_widths(file: Path, text: str, width: int, separator: str, comment: str | None) -> None:
    """Refuse rows, neither empty nor comments, that do not have as many cells as columns."""
    lines = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    for cells in lines:
        comments = bool(cells and comment and cells[0].startswith(comment))
        if cells and not comments and len(cells) != width:
            raise ValueError(
                f"Expected {width} cells in every row of {file}, got {len(cells)} in line "
                f"{lines.line_num}. The file is cut off or damaged there: fetch it again, or set "
                "separator."
            )


def needed(package: str) -> Any:
    """Import a package of the extra ``tabular``."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(not_installed(package, "which tables need", "tabular", error)) from error


def to_table(frame: Any, file: str | Path, schema: Schema, target: str, *, known: bool) -> Table:
    """Return the rows of a DataFrame as tensors.

    Args:
        frame: with all columns of the schema, and the target.
        file: named in errors.
        schema: says which columns.
        target: name of the target.
        known: whether every category must be one of the schema's; else it becomes ``UNKNOWN``.

    Raises:
        ValueError: a column is missing, or a cell is no number, category or class.
    """
    wanted = [*schema.numeric, *schema.categorical, target]
    absent = [name for name in wanted if name not in frame]
    if absent:
        raise ValueError(
            f"Expected columns {', '.join(map(repr, absent[:_FEW]))} in {file}, got "
            f"{', '.join(map(str, frame.columns[:_FEW]))}. Give the file that has them."
        )
    numbers = [_numbers(frame[name], file) for name in schema.numeric]
    codes = [
        _codes(frame[name], file, categories, known=known)
        for name, categories in schema.categorical.items()
    ]
    return Table(
        schema,
        torch.stack(numbers, 1) if numbers else torch.empty(len(frame), 0, dtype=torch.float64),
        torch.stack(codes, 1) if codes else torch.empty(len(frame), 0, dtype=torch.int64),
        _target(frame[target], file, schema.classes),
    )


def inferred_schema(
    frame: Any, file: str | Path, target: str, task: Task, categorical: Sequence[str] | None
) -> Schema:
    """Return the schema of a DataFrame."""
    missing = [name for name in (target, *(categorical or ())) if name not in frame]
    if missing:
        raise ValueError(
            f"Expected a column {missing[0]!r} in {file}, got "
            f"{', '.join(map(str, frame.columns[:_FEW]))}. Name one of these columns."
        )
    features = [name for name in frame.columns if name != target]
    if categorical is None:
        categorical = [name for name in features if _is_text(frame[name], file)]
    categories = {name: _categories(frame[name], file) for name in features if name in categorical}
    classes = _categories(frame[target], file) if task == "classification" else None
    if not features or (classes is not None and len(classes) < 2):
        raise ValueError(
            f"Expected features and at least 2 classes in {file}, got {len(features)} columns "
            f"beside {target!r} and the classes {classes}. Name another target, or task."
        )
    return Schema(tuple(n for n in features if n not in categories), categories, classes)


def _is_text(column: Any, file: str | Path) -> bool:
    """Whether a column holds text; one that holds mostly numbers is refused."""
    pandas = needed("pandas")
    if pandas.api.types.is_numeric_dtype(column):
        return bool(pandas.api.types.is_bool_dtype(column))
    words = column.dropna()
    numbers = pandas.to_numeric(words, errors="coerce").notna()
    if 2 * int(numbers.sum()) > len(words):
        odd = words[~numbers]
        raise ValueError(
            f"Expected numbers in column {column.name!r} of {file}, got {odd.iloc[0]!r} in row "
            f"{odd.index[0] + 1}. Correct the cell, or name the column in categorical."
        )
    return True


def _words(column: Any) -> Any:
    """Return the present cells of a column as text, without blanks around them."""
    return column.dropna().astype(str).str.strip()


def _categories(column: Any, file: str | Path) -> tuple[str, ...]:
    """Return the different texts of a column: numbers by size, else by the alphabet."""
    found: list[str] = sorted(set(_words(column)))
    if len(found) > _MOST:
        raise ValueError(
            f"Expected at most {_MOST} categories in column {column.name!r} of {file}, got "
            f"{len(found)}. Leave it out with exclude=[{column.name!r}], or set task to regression "
            "where it is the target."
        )
    try:
        return tuple(sorted(found, key=float))
    except ValueError:
        return tuple(found)


def _numbers(column: Any, file: str | Path) -> Tensor:
    """Return numbers ``(N,)``, float64, NaN where they are missing."""
    values = needed("pandas").to_numeric(column, errors="coerce").astype("float64")
    wrong = (values.isna() & column.notna()) | values.isin([float("inf"), -float("inf")])
    _refuse(column, wrong, file, "a finite number")
    return torch.tensor(values.to_numpy())


def _codes(column: Any, file: str | Path, categories: tuple[str, ...], *, known: bool) -> Tensor:
    """Return codes ``(N,)``: positions among the categories, MISSING or UNKNOWN."""
    words = _words(column).reindex(column.index)
    codes = words.map({name: code for code, name in enumerate(categories)})
    unknown = codes.isna() & words.notna()
    if known:
        _refuse(column, unknown, file, f"one of {', '.join(categories[:_FEW])}")
    filled = codes.astype("float64").mask(unknown, UNKNOWN).mask(words.isna(), MISSING)
    return torch.tensor(filled.to_numpy(dtype="int64"))


def _target(column: Any, file: str | Path, classes: tuple[str, ...] | None) -> Tensor:
    """Return classes ``(N,)``, int64, or values ``(N, 1)``, float32; every row must have one."""
    what = "a value" if classes is None else f"one of the classes {', '.join(classes[:_FEW])}"
    _refuse(column, column.isna(), file, what)
    if classes is None:
        return _numbers(column, file).float()[:, None]
    codes = _codes(column, file, classes, known=False)
    _refuse(column, column.notna() & (codes < 0).numpy(), file, what)
    return codes


def _refuse(column: Any, wrong: Any, file: str | Path, expected: str) -> None:
    """Refuse a column with wrong cells, and show the first."""
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise ValueError(
            f"Expected {expected} in column {column.name!r} of {file}, got {column.iloc[row]} in "
            f"row {row + 1}, and {int(wrong.sum())} such rows in all. Correct the file, or fetch "
            "it again."
        )
