"""Classification: cross-entropy and accuracy, and where asked for the area under the ROC curve."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from it3_lightning.tasks.auroc import AUROC
from it3_lightning.tasks.supervised import Supervised
from it3_lightning.training.mixin import IT3Mixin


class Classifier(Supervised):
    """Ordinary classification of batches ``(inputs, labels)``; logs loss and accuracy (0 to 1).

    Args:
        network: ``(B, ...) -> (B, C)`` logits.
        optimizer: makes the optimizer; default Adam, 1e-3.
        auroc: also log :class:`~it3_lightning.tasks.AUROC` in validation and test. It keeps the
            logits of a whole dataloader until its end.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: OptimizerCallable | None = None,
        auroc: bool = False,
    ) -> None:
        super().__init__(network, optimizer=optimizer)
        self.auroc = auroc

    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return cross-entropy and accuracy of logits ``(B, C)`` and labels ``(B,)``."""
        accuracy = (outputs.argmax(dim=1) == target).float().mean()
        return {"loss": F.cross_entropy(outputs, target), "acc": accuracy}

    def metrics(self) -> dict[str, Metric]:
        """Return the area under the ROC curve, where asked for."""
        return {"auroc": AUROC()} if self.auroc else {}


class IT3Classifier(IT3Mixin, Classifier):
    """The same with priors: see :class:`~it3_lightning.IT3Mixin`."""
