"""it3_lightning: idempotent test-time training for any LightningModule, and methods beside it.

===============  =================================================================================
``priors``       label <-> prior: what is fed back
``conditioning`` prior -> network: how it enters, by hooks
``training``     learning to use a prior: jointly or post-hoc; an auxiliary task
``methods``      one file for each test-time method: what it minimises
``layers``       networks that train while they run: TTT layers, in plain torch
``engine``       how weights move and come back, in plain torch; ``adapter`` is the algorithm
``integration``  any LightningModule, its batches and outputs meet the engine
``callbacks``    adaptation under a Trainer: test, predict, validate
``predictor``    adaptation without a Trainer, for serving
``calibration``  what is measured on validation data and kept in the checkpoint
``tasks``        ready LightningModules; ``networks``, ``data``: what they run on
``benchmark``    compare, choose, report; ``cli``: the command ``it3``
===============  =================================================================================
"""

# ruff: noqa: E402
import sys

from lightning_utilities.core import rank_zero

# Each namespace of Lightning, as it is imported, takes the messages of both for its own logger.
_log = rank_zero.log if "pytorch_lightning" in sys.modules else None
import lightning.pytorch  # noqa: F401

_log = _log or rank_zero.log
import pytorch_lightning  # noqa: F401

rank_zero.log = _log

# isort: split
from it3_lightning.callbacks import IT3PredictionWriter, IT3TestTimeCallback, TestTimeCallback
from it3_lightning.conditioning import (
    Conditioning,
    FeatureInjection,
    ForwardArgument,
    InputConcat,
)
from it3_lightning.data import ShiftedLoaders
from it3_lightning.engine import Adaptation, BatchAdapter, Settings, adapt
from it3_lightning.engine.restore import Snapshot
from it3_lightning.engine.selection import select
from it3_lightning.integration.candidates import suggest_layers
from it3_lightning.methods import (
    EATA,
    LAME,
    MEMO,
    ROID,
    SAR,
    T3A,
    TTT,
    TTTMAE,
    ActMAD,
    Auxiliary,
    Contrastive,
    CoTTA,
    DeYO,
    Entropy,
    Idempotence,
    Iterates,
    LabelShiftEM,
    MaskedPatches,
    Objective,
    RDumb,
    Rotation,
    Tent,
    TestTimeAugmentation,
    TestTimeMethod,
    TestTimeObjective,
    TTTPlusPlus,
)
from it3_lightning.perturbations import RandomNoise
from it3_lightning.predictor import IT3Predictor, Prediction
from it3_lightning.priors import ClassPrior, LabelsPrior, MaskPrior, Prior, ValuePrior
from it3_lightning.training import AuxiliaryMixin, DualPass, IT3Mixin

__all__ = [
    "EATA",
    "LAME",
    "MEMO",
    "ROID",
    "SAR",
    "T3A",
    "TTT",
    "TTTMAE",
    "ActMAD",
    "Adaptation",
    "Auxiliary",
    "AuxiliaryMixin",
    "BatchAdapter",
    "ClassPrior",
    "CoTTA",
    "Conditioning",
    "Contrastive",
    "DeYO",
    "DualPass",
    "Entropy",
    "FeatureInjection",
    "ForwardArgument",
    "IT3Mixin",
    "IT3PredictionWriter",
    "IT3Predictor",
    "IT3TestTimeCallback",
    "Idempotence",
    "InputConcat",
    "Iterates",
    "LabelShiftEM",
    "LabelsPrior",
    "MaskPrior",
    "MaskedPatches",
    "Objective",
    "Prediction",
    "Prior",
    "RDumb",
    "RandomNoise",
    "Rotation",
    "Settings",
    "ShiftedLoaders",
    "Snapshot",
    "TTTPlusPlus",
    "Tent",
    "TestTimeAugmentation",
    "TestTimeCallback",
    "TestTimeMethod",
    "TestTimeObjective",
    "ValuePrior",
    "adapt",
    "select",
    "suggest_layers",
]
