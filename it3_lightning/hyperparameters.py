"""Arguments of a module as plain data, so that checkpoints load with ``weights_only=True``."""

from __future__ import annotations

from typing import Any

from it3_lightning.conditioning import Conditioning
from it3_lightning.dual_pass import DualPass
from it3_lightning.priors import Prior
from it3_lightning.specs import spec


def plain(value: Any) -> Any:
    """Return a prior, a conditioning or settings of the label pass as what would make them again.

    All else stays.

    >>> plain(DualPass(label_weight=0.5))["label_weight"], plain(3)
    (0.5, 3)
    """
    if isinstance(value, Prior | Conditioning):
        return spec(value)
    if isinstance(value, DualPass):
        return value.init_args()
    return value
