"""Tables: their data modules, the features made of them, and their shifts."""

from it3_lightning.data.tabular.adult import AdultDataModule
from it3_lightning.data.tabular.boston import BostonDataModule
from it3_lightning.data.tabular.bundled import BundledDataModule
from it3_lightning.data.tabular.covertype import CovertypeDataModule
from it3_lightning.data.tabular.csv_file import CSVDataModule
from it3_lightning.data.tabular.preprocessing import Layout, Preprocessing
from it3_lightning.data.tabular.row_set import RowSet
from it3_lightning.data.tabular.shifted_tables import ShiftedTables
from it3_lightning.data.tabular.shifts import (
    TABULAR_SHIFTS,
    TABULAR_TUNING_SHIFTS,
    TabularShift,
)
from it3_lightning.data.tabular.table import Schema, Table

__all__ = [
    "TABULAR_SHIFTS",
    "TABULAR_TUNING_SHIFTS",
    "AdultDataModule",
    "BostonDataModule",
    "BundledDataModule",
    "CSVDataModule",
    "CovertypeDataModule",
    "Layout",
    "Preprocessing",
    "RowSet",
    "Schema",
    "ShiftedTables",
    "Table",
    "TabularShift",
]
