"""Data modules that test on clean and on shifted samples, and the shifts themselves.

``contract`` says what a benchmark needs of a data module. ``settings``, ``held_out`` and ``graded``
are the base of all of them here: what they can be told, what follows a change of it, severities.
``images``, ``tabular``, ``roads`` and ``airfoils`` say where samples come from and how they shift.
"""

from it3_lightning.data.airfoils.lift import AirfoilDataModule
from it3_lightning.data.airfoils.self_noise import AirfoilSelfNoiseDataModule
from it3_lightning.data.contract import Batch, ShiftedData
from it3_lightning.data.images.base import Images
from it3_lightning.data.images.cifar10 import CIFAR10DataModule
from it3_lightning.data.images.corruption_error import ALEXNET_ERRORS, mean_corruption_error
from it3_lightning.data.images.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, Corruption
from it3_lightning.data.images.digits import DigitsDataModule
from it3_lightning.data.images.image_files import ImageFiles
from it3_lightning.data.images.image_set import ImageSet
from it3_lightning.data.images.imagenet_c import ImageNetCDataModule
from it3_lightning.data.images.mnist import FashionMNISTDataModule, MNISTDataModule
from it3_lightning.data.images.shifted import ShiftedImages
from it3_lightning.data.images.shifts import SHIFTS, TUNING_SHIFTS, Shift
from it3_lightning.data.images.utkface import UTKFaceDataModule
from it3_lightning.data.roads.drawn import RoadScenesDataModule
from it3_lightning.data.roads.photographs import RoadsDataModule
from it3_lightning.data.roads.scenes import RoadScenes
from it3_lightning.data.roads.shifted_masks import ROAD_SHIFTS, ROAD_TUNING_SHIFTS, ShiftedMasks
from it3_lightning.data.sampling import unequal_stream
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
    "ShiftedMasks",
    "ShiftedTables",
    "TabularShift",
    "UTKFaceDataModule",
    "mean_corruption_error",
    "unequal_stream",
]
