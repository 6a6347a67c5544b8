"""it3_lightning: idempotent test-time training (IT3) for any PyTorch Lightning module."""

from it3_lightning.callback import IT3TestTimeCallback
from it3_lightning.conditioning import (
    Conditioning,
    FeatureInjection,
    ForwardArgument,
    InputConcat,
)
from it3_lightning.dual_pass import DualPass
from it3_lightning.engine import Adaptation, BatchAdapter, Settings, adapt
from it3_lightning.mixin import IT3Mixin
from it3_lightning.objectives import Entropy, Idempotence, Objective, TestTimeObjective
from it3_lightning.perturbations import RandomNoise
from it3_lightning.prediction import Prediction
from it3_lightning.predictor import IT3Predictor
from it3_lightning.priors import ClassPrior, MaskPrior, Prior, ValuePrior
from it3_lightning.selection import select
from it3_lightning.snapshot import Snapshot

__all__ = [
    "Adaptation",
    "BatchAdapter",
    "ClassPrior",
    "Conditioning",
    "DualPass",
    "Entropy",
    "FeatureInjection",
    "ForwardArgument",
    "IT3Mixin",
    "IT3Predictor",
    "IT3TestTimeCallback",
    "Idempotence",
    "InputConcat",
    "MaskPrior",
    "Objective",
    "Prediction",
    "Prior",
    "RandomNoise",
    "Settings",
    "Snapshot",
    "TestTimeObjective",
    "ValuePrior",
    "adapt",
    "select",
]
