"""Reader of delimited files: cells are text, typed by column; damage is refused by its place."""

from __future__ import annotations

import csv
import importlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from it3_lightning.data.base import damaged, read_bytes
from it3_lightning.data.tables import MISSING, UNKNOWN, Schema, Table
from it3_lightning.utils.messages import not_installed

Task = Literal["classification", "regression"]
MISSING_WORDS = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL")
"""Cells that stand for a missing value."""
_MOST = 1000  # categories of a column; more are names or numbers of rows
_FEW = 10  # names shown in an error
_EXACT = 2**53  # smaller whole numbers are float64 as they are
_COMMA = r"[-+]?[\d.]*,[\d.,]*(?:[eE][-+]?\d+)?"  # a number with a decimal comma, or thousands
_LONG = 80  # characters of a cell shown in an error
_AGAIN = "Correct the file, or fetch it again."
_NUMBERS = (
    "Numbers have a point (pandas.read_csv(..., decimal=',') reads commas), are finite in float32, "
    "and whole ones below 2**53: correct the file, or name a column of codes in categorical."
)


def read(
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    separator: str = ",",
    comment: str | None = None,
) -> Any:
    """Read a delimited file, plain or ``.gz``, into a pandas DataFrame of at least one row.

    Every column is categorical: its cells are the text in the file without the blanks around it,
    or missing where that is one of ``MISSING_WORDS``. Empty lines are skipped.

    Args:
        path: Of the file, in UTF-8.
        names: Of the columns, where the file has no header.
        separator: One character between cells.
        comment: First character of lines to skip.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, cut off or damaged, a row has too few or too many cells, or
            two columns have the same name.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected a file {file.resolve()}, got none. Place it there, or give its path."
        )
    cells = _cells(file, separator, comment)
    if names is None:
        header, cells = cells.iloc[0].str.strip(), cells.iloc[1:]
        names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    if cells.shape[1] != len(names):
        raise ValueError(
            f"Expected {len(names)} columns in {file} ({', '.join(names[:3])}, ...), got "
            f"{cells.shape[1]}. It is another file, or cut off: put the right one in its place."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"Expected different names of columns in {file}, got {twice[0]!r} twice. Rename one."
        )
    if not len(cells):
        raise ValueError(f"Expected rows in {file}, got a header alone. Fetch the file again.")
    return cells.reset_index(drop=True).set_axis(list(names), axis=1).apply(_texts)


def _cells(file: Path, separator: str, comment: str | None) -> Any:
    """Return all cells of a file as text, the header too."""
    content, pandas = read_bytes(file), needed("pandas")
    errors = pandas.errors.EmptyDataError, pandas.errors.ParserError
    try:
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise pandas.errors.ParserError("NUL characters")
        frame = pandas.read_csv(
            io.StringIO(text),
            sep=separator,
            comment=comment,
            header=None,
            dtype=object,
            na_filter=False,
            skipinitialspace=True,
            low_memory=False,
        )
        if (frame.iloc[:, -1] == "").any():  # a row that is too short, which pandas fills up
            _check_widths(file, text, frame.shape[1], separator, comment)
    except (UnicodeDecodeError, csv.Error, *errors) as error:
        what = f"a table in UTF-8 with cells separated by {separator!r}"
        remedy = (
            "It is empty, damaged, in another encoding or of another kind: fetch it again, save it "
            "in UTF-8, or set separator."
        )
        raise damaged(file, what, error, remedy) from error
    return frame


def _check_widths(file: Path, text: str, width: int, separator: str, comment: str | None) -> None:
    """Refuse rows, neither empty nor comments, that do not have as many cells as columns."""
    lines = csv.reader(io.StringIO(text, None), delimiter=separator, skipinitialspace=True)
    for cells in lines:
        skipped = cells in ([], [""]) or (comment and cells[0].startswith(comment))
        if len(cells) != width and not skipped:
            raise ValueError(
                f"Expected {width} cells in every row of {file}, got {len(cells)} in line "
                f"{lines.line_num}. The file is cut off or damaged there: fetch it again, or set "
                "separator."
            )


def _texts(column: Any) -> Any:
    """Return the cells of a column without blanks around them, as categories or missing."""
    pandas = needed("pandas")
    places, texts = pandas.factorize(column)
    words = [None if text.strip() in MISSING_WORDS else text.strip() for text in texts]
    codes, categories = pandas.factorize(np.array(words, dtype=object))
    return pandas.Series(pandas.Categorical.from_codes(codes[places], categories))


def needed(package: str) -> Any:
    """Import a package of the extra ``tabular``."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(not_installed(package, "which tables need", "tabular", error)) from error


def to_table(frame: Any, file: str | Path, schema: Schema, target: str, *, known: bool) -> Table:
    """Return the rows of a DataFrame that :func:`read` made of a file as tensors.

    Categories that are not the schema's become ``UNKNOWN``, or are refused where all must be
    ``known``; so is a column that is missing, and a cell that is no number or class.
    """
    check_columns(frame, file, (*schema.numeric, *schema.categorical, target), "Use another file.")
    none = torch.empty(0, len(frame))
    numbers = [_numbers(frame[name], file)[None] for name in schema.numeric]
    codes = [
        _codes(frame[name], file, categories, known=known)[None]
        for name, categories in schema.categorical.items()
    ]
    return Table(
        schema,
        torch.cat([none.double(), *numbers]).T.contiguous(),
        torch.cat([none.long(), *codes]).T.contiguous(),
        _target(frame[target], file, schema.classes),
    )


def check_columns(frame: Any, file: str | Path, names: Sequence[str], remedy: str) -> None:
    """Refuse a file that lacks a column."""
    absent = [name for name in names if name not in frame]
    if absent:
        raise ValueError(
            f"Expected a column {absent[0]!r} in {file}, got {', '.join(frame.columns[:_FEW])}. "
            f"{remedy}"
        )


def inferred_schema(
    frame: Any, file: str | Path, target: str, task: Task, categorical: Sequence[str] | None
) -> Schema:
    """Return the schema of a DataFrame."""
    named = (target, *(categorical or ()))
    check_columns(frame, file, named, "Correct target, categorical, exclude or separator.")
    features = [name for name in frame.columns if name != target]
    if categorical is None:
        categorical = [name for name in features if not _is_numeric(frame[name], file)]
    categories = {name: _categories(frame[name], file) for name in features if name in categorical}
    classes = _classes(frame[target], file) if task == "classification" else None
    if not features or (classes is not None and len(classes) < 2):
        raise ValueError(
            f"Expected features and at least 2 classes in {file}, got {len(features)} columns "
            f"beside {target!r} and the classes {classes}. Name another target, or task."
        )
    return Schema(tuple(n for n in features if n not in categories), categories, classes)


def _values(words: Any) -> Any:
    """Return what words say as numbers, float64, NaN where they are none."""
    return np.asarray(needed("pandas").to_numeric(words, errors="coerce"), dtype="float64")


def _is_numeric(column: Any, file: str | Path) -> bool:
    """Whether a column holds numbers; one that holds mostly numbers, or decimal commas, is refused.

    One that holds nothing counts as numeric.
    """
    words = column.cat.categories
    odd = np.isnan(_values(words))
    if not odd.any():
        return True
    like_numbers = column.isin(words[~odd | words.str.fullmatch(_COMMA)])
    if 2 * int(like_numbers.sum()) > int(column.notna().sum()):
        _refuse(column, column.isin(words[odd]), file, "a finite number", _NUMBERS)
    return False


def _categories(column: Any, file: str | Path) -> tuple[str, ...]:
    """Return the different texts of a column: numbers by size, else by the alphabet."""
    found: list[str] = sorted(column.cat.categories)
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


def _classes(column: Any, file: str | Path) -> tuple[str, ...]:
    """Return the classes of a column; one that is written in two ways is refused."""
    classes, written = _categories(column, file), dict[object, str]()
    for name, value in zip(classes, _values(list(classes)), strict=True):
        word = name.casefold() if len(name) > 1 else name  # the letters a and A may be two
        other = written.setdefault(word if np.isnan(value) else value, name)
        if other != name:
            raise ValueError(
                f"Expected each class in column {column.name!r} of {file} to be written in one "
                f"way, got {other!r} and {name!r}. Write them alike, or rename one."
            )
    return classes


def _numbers(column: Any, file: str | Path) -> Tensor:
    """Return numbers ``(N,)``, float64, NaN where they are missing."""
    words = column.cat.categories
    values = torch.from_numpy(np.append(_values(words), np.nan))
    wrong = ~values[:-1].float().isfinite().numpy()
    if (values.abs() >= _EXACT).any():
        wrong |= (values[:-1].abs() >= _EXACT).numpy() & words.str.fullmatch(r"[-+]?\d+")
    if wrong.any():
        _refuse(column, column.isin(words[wrong]), file, "a finite number", _NUMBERS)
    return values[torch.tensor(column.cat.codes.to_numpy(), dtype=torch.int64)]


def _codes(
    column: Any, file: str | Path, categories: tuple[str, ...], *, known: bool, what: str = ""
) -> Tensor:
    """Return codes ``(N,)``: positions among the categories, MISSING (-1) or UNKNOWN."""
    codes = needed("pandas").Index(categories, dtype=object).get_indexer(column.astype(object))
    unknown = column.notna().to_numpy() & (codes == MISSING)
    names = f"{what}{', '.join(categories[:_FEW])}"
    if known:
        _refuse(column, unknown, file, f"one of {names}")
    elif unknown.any() and (codes == MISSING).all():
        rank_zero_warn(
            f"Expected categories {names} in column {column.name!r} of {file}, got none of them, "
            f"but {str(column[unknown].iloc[0])[:_LONG]!r}. All its cells count as unknown: write "
            "them as in the file to train on."
        )
    return torch.from_numpy(np.where(unknown, UNKNOWN, codes))


def _target(column: Any, file: str | Path, classes: tuple[str, ...] | None) -> Tensor:
    """Return classes ``(N,)``, int64, or values ``(N, 1)``, float32; every row must have one."""
    what = "a value" if classes is None else f"one of the classes {', '.join(classes[:_FEW])}"
    _refuse(column, column.isna(), file, what)
    if classes is None:
        return _numbers(column, file).float()[:, None]
    return _codes(column, file, classes, known=True, what="the classes ")


def _refuse(column: Any, wrong: Any, file: str | Path, expected: str, remedy: str = _AGAIN) -> None:
    """Refuse a column with wrong cells, and show the first."""
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"Expected {expected} in column {column.name!r} of {file}, got "
            f"{str(column.iloc[row])[:_LONG]} in row {row + 1}, and {int(wrong.sum())} such rows "
            f"in all. {remedy}"
        )
