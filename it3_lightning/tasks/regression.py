"""Regression: squared error to train, absolute error to judge."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from it3_lightning.mixin import IT3Mixin
from it3_lightning.tasks.supervised import Supervised


class Regressor(Supervised):
    """Ordinary regression of batches ``(inputs, values)``; logs MSE as loss, and MAE.

    Args:
        network: ``(B, ...) -> (B, C)``.
        optimizer: makes the optimizer; default Adam, 1e-3.
    """

    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return squared and absolute error of outputs ``(B, C)`` against as many values."""
        target = target.reshape(outputs.shape).to(outputs.dtype)
        return {"loss": F.mse_loss(outputs, target), "mae": F.l1_loss(outputs, target)}


class IT3Regressor(IT3Mixin, Regressor):
    """The same with priors: see :class:`~it3_lightning.IT3Mixin`."""
