"""How a target or an output becomes a prior, what "don't know" is, how a prior is blurred.

A prior lives in *label space*, ``(B, C, ...)``: class probabilities, scaled values, or maps of
them. Targets and outputs are both brought there, so the same tensors feed the second pass and the
distance. The neutral prior says "don't know".
"""

from it3_lightning.priors.classes import ClassPrior
from it3_lightning.priors.labels import LabelsPrior
from it3_lightning.priors.masks import MaskPrior
from it3_lightning.priors.prior import Neutral, Prior
from it3_lightning.priors.values import ValuePrior

__all__ = ["ClassPrior", "LabelsPrior", "MaskPrior", "Neutral", "Prior", "ValuePrior"]
