"""What is minimised at test time, per sample, without labels.

An objective sees the first prediction in label space, ``y0``, and may ask for the second,
``y1 = F(x, y0)``. It does not know how the weights move, so another test-time method is another
objective on the same engine.
"""

from it3_lightning.objectives.base import Objective, SecondPass, TestTimeObjective
from it3_lightning.objectives.entropy import Entropy
from it3_lightning.objectives.idempotence import Idempotence
from it3_lightning.objectives.terms import agreeing, balance_term, confident

__all__ = [
    "Entropy",
    "Idempotence",
    "Objective",
    "SecondPass",
    "TestTimeObjective",
    "agreeing",
    "balance_term",
    "confident",
]
