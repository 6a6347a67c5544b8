"""Any delimited file with a target column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from it3_lightning.data.tabular.columns import Task, inferred_schema, to_table
from it3_lightning.data.tabular.reading import read
from it3_lightning.data.tabular.shifted_tables import ShiftedTables
from it3_lightning.data.tabular.table import Table
from it3_lightning.messages import unknown


class CSVDataModule(ShiftedTables):
    """A CSV file, plain or gzipped (``.gz``), with a target column.

    A column in which every cell is a number is numeric, any other categorical. Empty cells, ``?``,
    ``NA``, ``NaN`` and ``null`` are missing; a target may not be. The files say which columns,
    categories and classes there are, so that the number of features is the same for every seed;
    everything that is measured, and which of the categories count, is of the training rows alone.
    A category that only the test file has is unknown: all zeros.

    Args:
        path: file of the rows to train on, and to hold out rows of where there is no ``test_path``.
        target: name of the target's column.
        task: ``"classification"``: the target is a class, in text or numbers; ``"regression"``: a
            value, which stays in its own units.
        test_path: file of the rows to test on, with the same columns.
        categorical: names of the categorical columns, for those that hold numbers; all others must
            then be numeric. ``None``: the columns of text.
        exclude: names of columns to leave out.
        names: of all columns, where the files have no header.
        separator: one character between cells.
        kwargs: settings of :class:`~it3_lightning.data.tabular.ShiftedTables`.

    Raises:
        FileNotFoundError: a file is missing (when the data is loaded, as all that follow).
        ImportError: pandas is not installed.
        ValueError: a setting is out of its range, a file is damaged, a column is not there, or a
            cell is not what its column holds.

    Example::

        CSVDataModule("houses.csv", target="price", task="regression", test_path="new.csv")
    """

    source: ClassVar[tuple[str, ...]] = (
        "path",
        "target",
        "task",
        "test_path",
        "categorical",
        "exclude",
        "names",
        "separator",
    )

    def __init__(
        self,
        path: str | Path,
        *,
        target: str,
        task: Task = "classification",
        test_path: str | Path | None = None,
        categorical: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        names: Sequence[str] | None = None,
        separator: str = ",",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if task not in get_args(Task):
            raise ValueError(unknown("task", task, get_args(Task)))
        if len(separator) != 1:
            raise ValueError(f"Expected a separator of one character, got {separator!r}.")
        self.path = path
        self.target = target
        self.task: Task = task
        self.test_path = test_path
        self.categorical = categorical
        self.exclude = exclude
        self.names = names
        self.separator = separator

    def load(self) -> tuple[Table, Table | None]:
        """Return the rows of the file, and those of the test file if there is one."""
        return self._load(Path(self.path))

    def _load(self, path: Path) -> tuple[Table, Table | None]:
        text = [*(self.categorical or ()), *[self.target] * (self.task == "classification")]
        frame = self._read(path, text)
        unlisted = [name for name in self.exclude if name not in frame]
        if unlisted:
            raise ValueError(
                f"Expected a column {unlisted[0]!r} in {path} to leave out, got "
                f"{', '.join(map(str, frame.columns[:10]))}. Correct exclude."
            )
        frame = frame.drop(columns=list(self.exclude))
        schema = inferred_schema(frame, path, self.target, self.task, self.categorical)
        rows = to_table(frame, path, schema, self.target, known=True)
        if self.test_path is None:
            return rows, None
        test = self._read(Path(self.test_path), [*schema.categorical, *text])
        return rows, to_table(test, self.test_path, schema, self.target, known=False)

    def _read(self, path: Path, text: Sequence[str]) -> Any:
        return read(path, names=self.names, text=text, separator=self.separator)
