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

__all__ = [
    "SHIFTS",
    "TUNING_SHIFTS",
    "AirfoilDataModule",
    "AirfoilSelfNoiseDataModule",
    "Batch",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageSet",
    "MNISTDataModule",
    "Shift",
    "ShiftedData",
    "ShiftedImages",
    "unequal_stream",
]
