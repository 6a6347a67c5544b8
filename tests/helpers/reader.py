"""What a reader of the documents has: a module, data, a Trainer, two checkpoints."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import it3_lightning
from it3_lightning import ClassPrior, FeatureInjection, IT3Mixin
from it3_lightning.engine import Settings


class LitNet(LightningModule):
    """Any LightningModule: ten classes of small images."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential()
        self.net.add_module("layer1", nn.Conv2d(3, width, 3, padding=1))
        self.net.add_module("norm", nn.BatchNorm2d(width))
        self.net.add_module("layer2", nn.Conv2d(width, width, 3, padding=1))
        self.net.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.net.add_module("flat", nn.Flatten())
        self.net.add_module("head", nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class IT3Net(IT3Mixin, LitNet):
    """The same with priors."""


class Images(LightningDataModule):
    """Sixteen images, for everything."""

    def _loader(self) -> DataLoader[Any]:
        draws = torch.Generator().manual_seed(0)
        images = torch.randn(16, 3, 8, 8, generator=draws)
        return DataLoader(TensorDataset(images, torch.arange(16) % 10), batch_size=8)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


def reader(folder: Path) -> dict[str, Any]:
    """Return the names that a reader has at hand, with checkpoints in a folder."""

    def trainer(**given: Any) -> Trainer:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        settings = {"accelerator": "cpu", **dict.fromkeys(quiet, False), **given}
        return Trainer(**{**settings, "max_epochs": 1})

    data = Images()

    def make_model(width: int = 8) -> IT3Net:
        conditioning = FeatureInjection("net.layer2")
        return IT3Net(width=width, prior=ClassPrior(10), conditioning=conditioning)

    for name, model in (("plain", LitNet()), ("it3", make_model(64))):
        fitting = trainer()
        fitting.fit(model, data)
        fitting.save_checkpoint(folder / f"{name}.ckpt")
    names = {name: getattr(it3_lightning, name) for name in it3_lightning.__all__}
    own: dict[str, Any] = {
        "LitNet": LitNet,
        "IT3Net": IT3Net,
        "Trainer": trainer,
        "Settings": Settings,
    }
    images = torch.randn(4, 3, 8, 8)
    sets = ("train_set", "val_set", "test_set", "night", "rain", "blurred")
    drawn = {name: TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8)) for name in sets}
    own["make_model"] = make_model
    return {**names, **own, **drawn, "data": data, "model": model, "images": images}
