"""Whether numbers are finite, in as few calls as it takes: every batch asks several times."""

from __future__ import annotations

import cmath

from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether all elements are finite: then so is their sum, unless it overflows.

    >>> import torch
    >>> all_finite(torch.full((2,), 3e38)), all_finite(torch.tensor([0.0, torch.nan]))
    (True, False)
    """
    total = values.detach().sum() if values.numel() > 1 else values
    return cmath.isfinite(total.item()) or bool(values.isfinite().all())
