"""Classification: cross-entropy and accuracy, and where asked for the area under the ROC curve."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from it3_lightning.tasks.supervised import Supervised
from it3_lightning.training.auxiliary import AuxiliaryMixin
from it3_lightning.training.mixin import IT3Mixin


class Classifier(Supervised):
    """Ordinary classification of batches ``(inputs, labels)``; logs loss and accuracy (0 to 1).

    Args:
        network: ``(B, ...) -> (B, C)`` logits.
        optimizer: makes the optimizer; default Adam, 1e-3.
        ignore_index: the label of samples that count in no loss and no score, such as -100; give it
            to ``ClassPrior`` too.
        auroc: also log :class:`~it3_lightning.tasks.AUROC` in validation and test. It keeps the
            logits of a whole dataloader until its end.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: OptimizerCallable | None = None,
        ignore_index: int | None = None,
        auroc: bool = False,
    ) -> None:
        super().__init__(network, optimizer=optimizer)
        self.ignore_index = ignore_index
        self.auroc = auroc

    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return cross-entropy and accuracy of logits ``(B, C)`` and labels ``(B,)``."""
        if self.ignore_index is None:
            accuracy = (outputs.argmax(dim=1) == target).float().mean()
            return {"loss": F.cross_entropy(outputs, target), "acc": accuracy}
        kept = target != self.ignore_index
        count, known = kept.sum().clamp_min(1), target.masked_fill(~kept, 0)
        losses = F.cross_entropy(outputs, known, reduction="none")
        right = (outputs.argmax(dim=1) == known) & kept
        return {"loss": (losses * kept).sum() / count, "acc": right.sum() / count}

    def size(self, target: Tensor) -> int:
        """Return the number of samples that count."""
        return (
            len(target) if self.ignore_index is None else int((target != self.ignore_index).sum())
        )

    def metrics(self) -> dict[str, Metric]:
        """Return the area under the ROC curve, where asked for."""
        return {"auroc": AUROC(self.ignore_index)} if self.auroc else {}


class IT3Classifier(IT3Mixin, Classifier):
    """The same with priors: see :class:`~it3_lightning.IT3Mixin`."""


class TTTClassifier(AuxiliaryMixin, Classifier):
    """The same with an auxiliary task: see :class:`~it3_lightning.AuxiliaryMixin`."""


class AUROC(Metric):
    """Mean over the classes present of the area under each one's ROC curve against the others.

    For two classes that is the binary AUROC. It differs from ``MulticlassAUROC`` where a class has
    no sample: that counts as 0 there, and is left out here. With a single class in all it is NaN.

    Args:
        ignore_index: the label of samples that do not count.

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

    def __init__(self, ignore_index: int | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Keep a batch."""
        if self.ignore_index is not None:
            kept = labels != self.ignore_index
            logits, labels = logits[kept], labels[kept]
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
