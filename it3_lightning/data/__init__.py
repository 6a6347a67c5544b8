"""Data modules that test on clean and on shifted samples, and the shifts themselves.

``base`` is the base of all of them: what they can be told, what follows a change of it, and what a
benchmark needs. ``images``, ``tables``, ``roads`` and ``ranges`` are the bases of each kind of data
on top of it; the other files say where samples come from.
"""

from it3_lightning.data.airfoils import AirfoilDataModule
from it3_lightning.data.base import ShiftedData
from it3_lightning.data.corruptions import (
    ALEXNET_ERRORS,
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    Corruption,
    mean_corruption_error,
)
from it3_lightning.data.image_sets import (
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    MNISTDataModule,
)
from it3_lightning.data.imagenet import ImageNetCDataModule
from it3_lightning.data.images import ImageFiles, Images, ImageSet, ShiftedImages
from it3_lightning.data.loaders import ImageFolders, ShiftedLoaders
from it3_lightning.data.ranges import AirfoilSelfNoiseDataModule
from it3_lightning.data.road_files import RoadsDataModule
from it3_lightning.data.roads import (
    ROAD_SHIFTS,
    ROAD_TUNING_SHIFTS,
    RoadScenes,
    RoadScenesDataModule,
    ShiftedMasks,
)
from it3_lightning.data.sampling import Batch, correlated_stream, unequal_stream
from it3_lightning.data.shifts import SHIFTS, TUNING_SHIFTS, Shift
from it3_lightning.data.table_sets import (
    AdultDataModule,
    BostonDataModule,
    BundledDataModule,
    CovertypeDataModule,
    CSVDataModule,
)
from it3_lightning.data.tables import (
    TABULAR_SHIFTS,
    TABULAR_TUNING_SHIFTS,
    ShiftedTables,
    TabularShift,
)
from it3_lightning.data.utkface import UTKFaceDataModule

__all__ = [
    "ALEXNET_ERRORS",
    "CORRUPTIONS",
    "EXTRA_CORRUPTIONS",
    "ROAD_SHIFTS",
    "ROAD_TUNING_SHIFTS",
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
    "CIFAR10DataModule",
    "CSVDataModule",
    "Corruption",
    "CovertypeDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageFiles",
    "ImageFolders",
    "ImageNetCDataModule",
    "ImageSet",
    "Images",
    "MNISTDataModule",
    "RoadScenes",
    "RoadScenesDataModule",
    "RoadsDataModule",
    "Shift",
    "ShiftedData",
    "ShiftedImages",
    "ShiftedLoaders",
    "ShiftedMasks",
    "ShiftedTables",
    "TabularShift",
    "UTKFaceDataModule",
    "correlated_stream",
    "mean_corruption_error",
    "unequal_stream",
]
