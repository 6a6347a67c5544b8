"""RDumb: EATA without a regulariser, which goes back to the source every thousand batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from it3_lightning.methods.eata import EATA


@dataclass
class RDumb(EATA):
    """Adaptation that begins anew every 1000 batches (Press et al., NeurIPS 2023).

    Between two beginnings it is :class:`EATA` without a regulariser ("ETA"), which needs no source
    data. What is new is the setting ``reset=1000``: weights, optimizer and moving mean go back to
    what they were. It goes with any other method, as ``TestTimeCallback(Tent(), reset=1000)``.

    Args:
        margin: see :class:`EATA`; here by default that of the published code, ``ln(1000) / 2 - 1``
            of 1000 classes.
        epsilon: see :class:`EATA`.
        fisher_weight: see :class:`EATA`; 0 here.
        fisher_samples: see :class:`EATA`.

    Raises:
        ValueError: a value is out of range; when evaluated, predictions that are no class vectors.

    >>> RDumb().defaults["reset"], RDumb().needs_source, round(RDumb().margin, 3)
    (1000, False, 0.355)
    """

    margin: float = 0.5 - 1 / math.log(1000)
    fisher_weight: float = 0.0
    defaults: ClassVar[Mapping[str, Any]] = {**EATA.defaults, "reset": 1000}
