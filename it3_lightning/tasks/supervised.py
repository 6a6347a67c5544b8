"""Base class of the tasks: a network, a loss, an optimizer; batches of ``(inputs, target)``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric

from it3_lightning.integration.batches import inputs_of, target_of


class Supervised(LightningModule):
    """An ordinary supervised module; logs ``{stage}_{name}`` of its scores in every stage.

    Scores that are no means over batches, :meth:`metrics`, are logged in validation and test, each
    dataloader by itself.

    Args:
        network: ``(B, ...) -> outputs``. Where it has ``in_features`` and ``out_features``, these
            are compared with ``num_features`` and ``num_classes`` of the data module.
        optimizer: makes the optimizer; default Adam, 1e-3.

    Raises:
        MisconfigurationException: before any batch: the network has other sizes than the data.
    """

    def __init__(self, network: nn.Module, *, optimizer: OptimizerCallable | None = None) -> None:
        super().__init__()
        self.network = network
        self.optimizer_callable = optimizer
        self._running: dict[int, Mapping[str, Metric]] = {}  # by dataloader, in one evaluation

    @abstractmethod
    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return scalars of a batch by name; ``"loss"`` is minimised."""

    def size(self, target: Tensor) -> int:
        """Return how much a batch counts in the mean of its scores over batches."""
        return len(target)

    def metrics(self) -> dict[str, Metric]:
        """Return new metrics of a whole dataloader by name; they take outputs and target."""
        return {}

    def forward(self, inputs: Any) -> Tensor:
        """Run the network."""
        outputs: Tensor = self.network(inputs)
        return outputs

    def setup(self, stage: str) -> None:
        """Refuse a network of other sizes than the data."""
        super().setup(stage)
        _check_sizes(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self._step(batch, "train")[0]

    def on_validation_epoch_start(self) -> None:
        """Begin with new metrics."""
        self._running.clear()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the scores and the metrics."""
        self._judge("val", *self._step(batch, "val")[1:], dataloader_idx)

    def on_test_epoch_start(self) -> None:
        """Begin with new metrics."""
        self._running.clear()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the scores and the metrics."""
        self._judge("test", *self._step(batch, "test")[1:], dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the outputs."""
        outputs: Tensor = self(inputs_of(batch))
        return outputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters."""
        if self.optimizer_callable is None:
            return torch.optim.Adam(self.parameters(), lr=1e-3)
        return self.optimizer_callable(self.parameters())

    def _step(self, batch: Any, stage: str) -> tuple[Tensor, Tensor, Tensor]:
        """Log the scores; return loss, outputs and target."""
        inputs, target = inputs_of(batch), target_of(batch)
        outputs = self(inputs)
        scores, size = self.scores(outputs, target), self.size(target)
        named = {f"{stage}_{name}": score for name, score in scores.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=size)
        return scores["loss"], outputs, target

    def _judge(self, stage: str, outputs: Tensor, target: Tensor, loader: int) -> None:
        """Let the metrics of a dataloader see a batch; the Trainer computes them at its end.

        They belong to one evaluation only. A metric kept on the module would mix dataloaders, and
        one that has counted in inference mode cannot count in a later ``fit``.
        """
        if self._trainer is not None and self._trainer.sanity_checking:
            return
        if loader not in self._running:
            self._running[loader] = {k: m.to(outputs.device) for k, m in self.metrics().items()}
        for name, metric in self._running[loader].items():
            metric.update(outputs, target)
            self.log(
                f"{stage}_{name}",
                metric,
                on_step=False,
                on_epoch=True,
                batch_size=len(target),
                metric_attribute="_running",
            )


def _check_sizes(module: LightningModule) -> None:
    """Compare a module's sizes with those of its Trainer's data module, where both tell them.

    ``network.in_features`` belongs to ``num_features`` of the data; ``network.out_features`` and
    ``it3_prior.channels`` belong to ``num_outputs``.

    Args:
        module: with a ``network``, attached to a Trainer.

    Raises:
        MisconfigurationException: they differ.
    """
    data = getattr(module._trainer, "datamodule", None)
    for part, size, wanted in (
        ("network", "in_features", "num_features"),
        ("network", "out_features", "num_outputs"),
        ("it3_prior", "channels", "num_outputs"),
    ):
        got = getattr(getattr(module, part, None), size, None)
        expected = getattr(data, wanted, None) if isinstance(got, int) else None
        if isinstance(expected, int) and expected != got:
            raise MisconfigurationException(
                f"Expected {part}.{size} to be {expected}, the {wanted} of {type(data).__name__}, "
                f"got {got}. Write {expected} where {part.removeprefix('it3_')} is made."
            )
