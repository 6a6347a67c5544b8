"""UCI Covertype: which of seven kinds of forest covers a patch of 30 by 30 metres."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from it3_lightning.data.tabular.columns import to_table
from it3_lightning.data.tabular.reading import read
from it3_lightning.data.tabular.shifted_tables import ShiftedTables
from it3_lightning.data.tabular.table import Schema, Table

NUMERIC = (
    "Elevation",
    "Aspect",
    "Slope",
    "Horizontal_Distance_To_Hydrology",
    "Vertical_Distance_To_Hydrology",
    "Horizontal_Distance_To_Roadways",
    "Hillshade_9am",
    "Hillshade_Noon",
    "Hillshade_3pm",
    "Horizontal_Distance_To_Fire_Points",
)
BLOCKS = {
    "Wilderness_Area": tuple(f"Wilderness_Area{number}" for number in range(1, 5)),
    "Soil_Type": tuple(f"Soil_Type{number}" for number in range(1, 41)),
}
TARGET = "Cover_Type"
CLASSES = tuple("1234567")
_FILES = ("covtype.data", "covtype.data.gz")


class CovertypeDataModule(ShiftedTables):
    """Covertype as UCI publishes it: ``covtype.data``, or ``covtype.data.gz``, in ``root``.

    581,012 rows of 55 integers between commas, no header, nothing missing: ten numbers, four
    columns of which one is 1 (the wilderness area), forty of which one is 1 (the type of soil), and
    the class, 1 to 7. The two blocks are one variable each. There are 54 features; classes are
    0 to 6. The test rows are held out at random.

    Source: J. A. Blackard, "Covertype", UCI Machine Learning Repository (1998), ``covtype.info``.

    Args:
        root: folder of the file; a plain one goes first.
        kwargs: settings of :class:`~it3_lightning.data.tabular.ShiftedTables`.

    Raises:
        FileNotFoundError: neither file is there (when the data is loaded, as all that follow).
        ImportError: pandas is not installed.
        ValueError: the file is damaged or another one, or a setting is out of its range.
    """

    source: ClassVar[tuple[str, ...]] = ("root",)

    def __init__(self, root: str | Path = "data/covertype", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def load(self) -> tuple[Table, None]:
        """Return all rows."""
        file = self._file()
        columns = [*NUMERIC, *BLOCKS["Wilderness_Area"], *BLOCKS["Soil_Type"], TARGET]
        frame = read(file, names=columns)
        numbers = to_table(frame, file, Schema(NUMERIC, {}, CLASSES), TARGET, known=True)
        codes = [_code(frame, file, names) for names in BLOCKS.values()]
        schema = Schema(NUMERIC, BLOCKS, CLASSES)
        return Table(schema, numbers.numeric, torch.stack(codes, dim=1), numbers.target), None

    def _file(self) -> Path:
        for name in _FILES:
            if (file := Path(self.root) / name).is_file():
                return file
        raise FileNotFoundError(
            f"Expected {' or '.join(_FILES)} in {Path(self.root).resolve()}, got neither. Place "
            "one there, or set root to the folder that holds it."
        )


def _code(frame: Any, file: Path, names: tuple[str, ...]) -> Tensor:
    """Return which column of a block is 1, ``(N,)``; exactly one must be, the others 0."""
    block = to_table(frame.assign(none=0.0), file, Schema(names, {}, None), "none", known=True)
    wrong = ((block.numeric == 1).sum(1) != 1) | ((block.numeric == 0).sum(1) != len(names) - 1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"Expected one 1 and else 0 in the columns {names[0]} to {names[-1]} of {file}, got "
            f"another row {row + 1}, and {int(wrong.sum())} such rows in all. The file is damaged "
            "or another one: fetch it again."
        )
    return block.numeric.argmax(dim=1)
