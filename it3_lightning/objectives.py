"""The former place of `it3_lightning.methods`, for imports of earlier versions."""

from it3_lightning.methods import (
    Entropy,
    Idempotence,
    Objective,
    SecondPass,
    TestTimeObjective,
    agreeing,
    balance_term,
    confident,
)

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
