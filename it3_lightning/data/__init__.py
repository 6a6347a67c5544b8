"""Data modules that test on clean and on shifted samples, and the shifts themselves."""

from it3_lightning.data.airfoils import AirfoilDataModule
from it3_lightning.data.cifar10 import CIFAR10DataModule
from it3_lightning.data.contract import ShiftedData
from it3_lightning.data.corruption_error import ALEXNET_ERRORS, mean_corruption_error
from it3_lightning.data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, Corruption
from it3_lightning.data.digits import DigitsDataModule
from it3_lightning.data.image_files import ImageFiles
from it3_lightning.data.image_set import ImageSet
from it3_lightning.data.imagenet_c import ImageNetCDataModule
from it3_lightning.data.images import Batch, Images
from it3_lightning.data.mnist import FashionMNISTDataModule, MNISTDataModule
from it3_lightning.data.road_scenes import RoadScenesDataModule
from it3_lightning.data.roads import RoadsDataModule
from it3_lightning.data.sampling import unequal_stream
from it3_lightning.data.scenes import RoadScenes
from it3_lightning.data.self_noise import AirfoilSelfNoiseDataModule
from it3_lightning.data.shifted import ShiftedImages
from it3_lightning.data.shifted_masks import ROAD_SHIFTS, ROAD_TUNING_SHIFTS, ShiftedMasks
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
