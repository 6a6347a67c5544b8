"""Take a LightningModule as it is, train it with priors by subclassing, adapt it at test time."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from it3_lightning import ClassPrior, FeatureInjection, IT3Mixin, IT3TestTimeCallback
from it3_lightning.data import DigitsDataModule


class LitDigits(LightningModule):
    """Your own module: nothing in it knows of priors."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * width, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
        self.train_acc = MulticlassAccuracy(10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        logits = self(images)
        self.train_acc(logits, labels)
        self.log("train_acc", self.train_acc)
        return F.cross_entropy(logits, labels)

    def test_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("test_acc", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class IT3Digits(IT3Mixin, LitDigits):
    """The same module, trained with and without a prior of the label."""


def main(max_epochs: int = 10) -> dict[str, float]:
    """Train, test as it is, test with adaptation; return both accuracies by shift."""
    seed_everything(0, verbose=False)
    data = DigitsDataModule(shifts=("gaussian_noise", "contrast"), severity=4)
    # net.4 is the first dense layer: the embedded prior is added to its output
    model = IT3Digits(width=16, prior=ClassPrior(10), conditioning=FeatureInjection("net.4"))
    options: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    Trainer(max_epochs=max_epochs, **options).fit(model, data.train_dataloader())

    adapt = IT3TestTimeCallback(steps=1, norm_stats="batch", reset="never", anchor="ema")
    runs: dict[str, list[Callback]] = {"source": [], "adapted": [adapt]}
    scores: dict[str, float] = {}
    for name, callbacks in runs.items():
        trainer = Trainer(callbacks=callbacks, **options)
        for shift, row in zip(data.test_names, trainer.test(model, datamodule=data), strict=True):
            key = next(key for key in row if key.startswith("test_acc"))
            scores[f"{name} {shift}"] = row[key]
    return scores


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:24s} {accuracy:.3f}")
