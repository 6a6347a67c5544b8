"""What a predictor says of a batch: adapted and source outputs, distances, what was skipped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from it3_lightning.engine import Adaptation


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of one batch. All tensors are detached and on the input's device.

    Args:
        outputs: ``(B, ...)``, the network's outputs from the adapted weights, from the source's
            where a sample was skipped: its first prediction, or what the predictor is asked for.
        source_outputs: ``(B, ...)``, outputs of the network as it was trained, without a prior.
        distance: ``(B,)``, the objective's measure with the source weights. With
            :class:`~it3_lightning.Idempotence` it is the idempotence distance
            :math:`d(y_0, F(x, y_0))`, in units of its ``distance``, a score of how unlike the
            training data a sample is: the larger, the more (Durasov et al., ZigZag, TMLR 2024). NaN
            where it was not measured; 0 everywhere where the conditioning has not been trained.
        distance_adapted: ``(B,)``, the same with the adapted weights.
        skipped: ``(B,)`` booleans, the samples that got the source prediction.
        reason: why they were skipped.
        gated: ``(B,)`` booleans, the samples within the gate, which were not adapted to.
    """

    outputs: Tensor
    source_outputs: Tensor
    distance: Tensor
    distance_adapted: Tensor
    skipped: Tensor
    reason: str | None
    gated: Tensor

    def split(self) -> list[Prediction]:
        """Return the predictions of the single samples, each a batch of one.

        >>> y, d = torch.tensor([[1.0], [2.0]]), torch.tensor([0.1, 0.2])
        >>> no = torch.tensor([False, False])
        >>> [p.outputs.item() for p in Prediction(y, y, d, d, no, None, no).split()]
        [1.0, 2.0]
        """
        parts = []
        for index, skipped in enumerate(self.skipped.tolist()):
            rows: dict[str, Any] = {
                name: value[index : index + 1]
                for name, value in vars(self).items()
                if isinstance(value, Tensor)
            }
            parts.append(replace(self, **rows, reason=self.reason if skipped else None))
        return parts

    @classmethod
    def of(cls, adaptation: Adaptation, device: torch.device) -> Prediction:
        """Return what came of an adaptation that measured, on a device."""
        outputs, source = adaptation.outputs, adaptation.source_outputs
        assert outputs is not None
        assert source is not None
        nowhere = torch.full(adaptation.skipped.shape, float("nan"))
        gated = adaptation.gated
        before, after = adaptation.distance_source, adaptation.distance_adapted
        return cls(
            outputs=outputs.to(device),
            source_outputs=source.to(device),
            distance=(nowhere if before is None else before).to(device),
            distance_adapted=(nowhere if after is None else after).to(device),
            skipped=adaptation.skipped.to(device),
            reason=adaptation.reason,
            gated=(torch.zeros_like(adaptation.skipped) if gated is None else gated).to(device),
        )
