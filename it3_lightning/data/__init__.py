"""Data modules that test on clean and on shifted samples, and the shifts themselves."""

from it3_lightning.data.airfoils import AirfoilDataModule
from it3_lightning.data.contract import ShiftedData
from it3_lightning.data.digits import DigitsDataModule
from it3_lightning.data.image_set import Batch, ImageSet
from it3_lightning.data.mnist import FashionMNISTDataModule, MNISTDataModule
from it3_lightning.data.sampling import unequal_stream
from it3_lightning.data.self_noise import AirfoilSelfNoiseDataModule
from it3_lightning.data.shifted import ShiftedImages
from it3_lightning.data.shifts import SHIFTS, TUNING_SHIFTS, Shift
from it3_lightning.data.tabular import (
    TABULAR_SHIFTS,
    TABULAR_TUNING_SHIFTS,
    AdultDataModule,
    BostonDataModule,
    BundledDataModule,
    CovertypeDataModule,
    CSVDataModule,
    ShiftedTables,
    TabularShift,
)

__all__ = [
    "SHIFTS",
    "TABULAR_SHIFTS",
    "TABULAR_TUNING_SHIFTS",
    "TUNING_SHIFTS",
    "AdultDataModule",
    "AirfoilDataModule",
    "AirfoilSelfNoiseDataModule",
    "Batch",
    "BostonDataModule",
    "BundledDataModule",
    "CSVDataModule",
    "CovertypeDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageSet",
    "MNISTDataModule",
    "Shift",
    "ShiftedData",
    "ShiftedImages",
    "ShiftedTables",
    "TabularShift",
    "unequal_stream",
]
