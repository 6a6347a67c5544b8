"""Ready LightningModules around a network: plain ones, the same with priors, or with a head."""

from it3_lightning.tasks.classification import (
    AUROC,
    Classifier,
    IT3Classifier,
    TTTClassifier,
)
from it3_lightning.tasks.regression import IT3Regressor, Regressor
from it3_lightning.tasks.segmentation import (
    Completeness,
    Correctness,
    IT3Segmenter,
    Quality,
    RelaxedScore,
    Segmenter,
)

__all__ = [
    "AUROC",
    "Classifier",
    "Completeness",
    "Correctness",
    "IT3Classifier",
    "IT3Regressor",
    "IT3Segmenter",
    "Quality",
    "Regressor",
    "RelaxedScore",
    "Segmenter",
    "TTTClassifier",
]
