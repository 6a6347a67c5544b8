"""Ready LightningModules around a network: plain ones, and the same with priors."""

from it3_lightning.tasks.auroc import AUROC
from it3_lightning.tasks.classification import Classifier, IT3Classifier
from it3_lightning.tasks.regression import IT3Regressor, Regressor

__all__ = ["AUROC", "Classifier", "IT3Classifier", "IT3Regressor", "Regressor"]
