"""UCI Adult: whether somebody earns more than 50,000 dollars a year."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from it3_lightning.data.tabular.columns import to_table
from it3_lightning.data.tabular.reading import read
from it3_lightning.data.tabular.shifted_tables import ShiftedTables
from it3_lightning.data.tabular.table import Schema, Table

COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation"),
    *("relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week"),
    *("native-country", "income"),
)
NUMERIC = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
CLASSES = ("<=50K", ">50K")
_FILES = ("adult.data", "adult.test")

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
CATEGORIES = {name: tuple(values.split(", ")) for name, values in _CATEGORIES.items()}


class AdultDataModule(ShiftedTables):
    """Adult as UCI publishes it: the files ``adult.data`` and ``adult.test`` in ``root``.

    32,561 rows to train on and 16,281 to test on, cells between commas and blanks, no header, ``?``
    where a value is missing. ``adult.test`` begins with the line ``|1x3 Cross validator``, and its
    labels end in a dot. There are 105 features: six numbers, and the 99 categories that
    ``adult.names`` lists of eight columns. Class 1 earns more than 50,000 dollars.

    Source: B. Becker and R. Kohavi, "Adult", UCI Machine Learning Repository (1996).

    Args:
        root: folder of the two files.
        kwargs: settings of :class:`~it3_lightning.data.tabular.ShiftedTables`.

    Raises:
        FileNotFoundError: a file is missing (when the data is loaded, as all that follow).
        ImportError: pandas is not installed.
        ValueError: a file is damaged or another one, or a setting is out of its range.
    """

    source: ClassVar[tuple[str, ...]] = ("root",)

    def __init__(self, root: str | Path = "data/adult", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def load(self) -> tuple[Table, Table]:
        """Return the rows of the two files."""
        folder = Path(self.root)
        absent = [name for name in _FILES if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"Expected the files {' and '.join(_FILES)} in {folder.resolve()}, got no "
                f"{' and no '.join(absent)}. Place them there, or set root to their folder."
            )
        train, test = (self._table(folder / name) for name in _FILES)
        return train, test

    def _table(self, file: Path) -> Table:
        frame = read(file, names=COLUMNS, comment="|")
        if file.name == "adult.test":
            frame["income"] = frame["income"].replace(r"\.$", "", regex=True)
        schema = Schema(NUMERIC, CATEGORIES, CLASSES)
        return to_table(frame, file, schema, "income", known=file.name == "adult.data")
