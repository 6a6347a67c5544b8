"""Classification: cross-entropy and accuracy."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from it3_lightning.mixin import IT3Mixin
from it3_lightning.tasks.supervised import Supervised


class Classifier(Supervised):
    """Ordinary classification of batches ``(inputs, labels)``; logs loss and accuracy (0 to 1).

    Args:
        network: ``(B, ...) -> (B, C)`` logits.
        optimizer: makes the optimizer; default Adam, 1e-3.
    """

    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return cross-entropy and accuracy of logits ``(B, C)`` and labels ``(B,)``."""
        accuracy = (outputs.argmax(dim=1) == target).float().mean()
        return {"loss": F.cross_entropy(outputs, target), "acc": accuracy}


class IT3Classifier(IT3Mixin, Classifier):
    """The same with priors: see :class:`~it3_lightning.IT3Mixin`."""
