"""What all tasks share: a network, a loss, an optimizer; batches of ``(inputs, target)``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from it3_lightning.batches import inputs_of, target_of


class Supervised(LightningModule):
    """An ordinary supervised module; logs ``{stage}_{name}`` of its scores in every stage.

    Args:
        network: ``(B, ...) -> outputs``.
        optimizer: makes the optimizer; default Adam, 1e-3.
    """

    def __init__(self, network: nn.Module, *, optimizer: OptimizerCallable | None = None) -> None:
        super().__init__()
        self.network = network
        self.optimizer_callable = optimizer

    @abstractmethod
    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return scalars of a batch by name; ``"loss"`` is minimised."""

    def forward(self, inputs: Any) -> Tensor:
        """Run the network."""
        outputs: Tensor = self.network(inputs)
        return outputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the scores."""
        self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the scores."""
        self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the outputs."""
        outputs: Tensor = self(inputs_of(batch))
        return outputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters."""
        if self.optimizer_callable is None:
            return torch.optim.Adam(self.parameters(), lr=1e-3)
        return self.optimizer_callable(self.parameters())

    def _step(self, batch: Any, stage: str) -> Tensor:
        inputs, target = inputs_of(batch), target_of(batch)
        scores = self.scores(self(inputs), target)
        named = {f"{stage}_{name}": score for name, score in scores.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(target))
        return scores["loss"]
