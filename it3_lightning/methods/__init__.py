"""Test-time methods, one file each: what is minimised without labels, and with which settings.

A method sees the passes of a network over a batch (``base.Passes``) and says what to minimise. It
does not know how weights move and come back, so another method is another file here. ``terms`` has
the distances, filters and terms that methods share.
"""

from it3_lightning.methods.actmad import ActMAD
from it3_lightning.methods.augmentation import TestTimeAugmentation
from it3_lightning.methods.auxiliary import Auxiliary
from it3_lightning.methods.base import (
    Objective,
    Passes,
    SecondPass,
    Steps,
    TestTimeMethod,
    TestTimeObjective,
    as_method,
)
from it3_lightning.methods.contrastive import Contrastive, TTTPlusPlus
from it3_lightning.methods.cotta import CoTTA
from it3_lightning.methods.deyo import DeYO
from it3_lightning.methods.eata import EATA
from it3_lightning.methods.idempotence import Idempotence
from it3_lightning.methods.iterates import Iterates
from it3_lightning.methods.label_shift import LabelShiftEM
from it3_lightning.methods.lame import LAME
from it3_lightning.methods.masked_patches import TTTMAE, MaskedPatches
from it3_lightning.methods.memo import MEMO
from it3_lightning.methods.rdumb import RDumb
from it3_lightning.methods.roid import ROID
from it3_lightning.methods.rotation import TTT, Rotation
from it3_lightning.methods.sar import SAR
from it3_lightning.methods.t3a import T3A
from it3_lightning.methods.tent import Entropy, Tent
from it3_lightning.methods.terms import agreeing, balance_term, confident

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
    "Auxiliary",
    "CoTTA",
    "Contrastive",
    "DeYO",
    "Entropy",
    "Idempotence",
    "Iterates",
    "LabelShiftEM",
    "MaskedPatches",
    "Objective",
    "Passes",
    "RDumb",
    "Rotation",
    "SecondPass",
    "Steps",
    "TTTPlusPlus",
    "Tent",
    "TestTimeAugmentation",
    "TestTimeMethod",
    "TestTimeObjective",
    "agreeing",
    "as_method",
    "balance_term",
    "confident",
]
