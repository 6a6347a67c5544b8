"""The area under the ROC curve of class scores, over a whole dataloader."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat


class AUROC(Metric):
    """Mean over the classes present of the area under each one's ROC curve against the others.

    For two classes that is the binary AUROC. It differs from ``MulticlassAUROC`` where a class has
    no sample: that counts as 0 there, and is left out here. With a single class in all it is NaN.

    Shapes:
        ``update`` takes logits ``(B, C)`` and labels ``(B,)``; ``compute`` returns a scalar.

    >>> metric = AUROC()
    >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
    >>> metric.compute()
    tensor(1.)
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Keep a batch."""
        self.logits.append(logits.detach())
        self.labels.append(labels)

    def compute(self) -> Tensor:
        """Return the mean area; in double precision, in which confident scores still differ."""
        labels = dim_zero_cat(self.labels)
        scores = dim_zero_cat(self.logits).double().softmax(dim=1)
        present = sorted(set(labels.tolist()))
        if len(present) < 2:
            return torch.tensor(float("nan"), device=labels.device)
        areas = [binary_auroc(scores[:, label], (labels == label).long()) for label in present]
        return torch.stack(areas).mean().float()
