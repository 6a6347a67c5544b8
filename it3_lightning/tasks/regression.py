"""Regression: squared error to train, absolute error to judge."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanSquaredError, Metric

from it3_lightning.tasks.supervised import Supervised
from it3_lightning.training.mixin import IT3Mixin


class Regressor(Supervised):
    """Ordinary regression of batches ``(inputs, values)``; logs MSE as loss, and MAE.

    In validation and test also RMSE: the root of the mean over the whole dataloader, in the units
    of the values as MAE is.

    Args:
        network: ``(B, ...) -> (B, C)``.
        optimizer: makes the optimizer; default Adam, 1e-3.
    """

    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return squared and absolute error of outputs ``(B, C)`` against as many values."""
        target = _like(target, outputs)
        return {"loss": F.mse_loss(outputs, target), "mae": F.l1_loss(outputs, target)}

    def metrics(self) -> dict[str, Metric]:
        """Return the root of the mean squared error."""
        return {"rmse": RootMeanSquaredError()}


class RootMeanSquaredError(MeanSquaredError):
    """Torchmetrics' root of the mean squared error, of targets ``(B,)`` or ``(B, C)``.

    >>> import torch
    >>> metric = RootMeanSquaredError()
    >>> metric.update(torch.tensor([[3.0], [4.0]]), torch.zeros(2))
    >>> round(metric.compute().item(), 4)  # the root of 25 / 2
    3.5355
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(squared=False, **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch."""
        super().update(preds.detach().contiguous(), _like(target, preds).contiguous())


class IT3Regressor(IT3Mixin, Regressor):
    """The same with priors: see :class:`~it3_lightning.IT3Mixin`."""


def _like(target: Tensor, outputs: Tensor) -> Tensor:
    """Return the target in the shape and dtype of the outputs."""
    return target.reshape(outputs.shape).to(outputs.dtype)
