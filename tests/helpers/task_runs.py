"""Small models of tasks, loaders of two kinds of samples, and what a Trainer predicts of them."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import FeatureInjection, ValuePrior
from it3_lightning.networks import MLP
from it3_lightning.tasks import IT3Regressor

Loader = DataLoader[tuple[Tensor, ...]]
COUNTS = (11, 7)  # batches of 4: the last ones are smaller, so means of batch values are wrong


def quiet(**arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def loaders(classes: int = 0) -> list[Loader]:
    """Two loaders; the second one's samples lie elsewhere."""
    sets = []
    for seed, count in enumerate(COUNTS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 3, generator=generator) + seed
        y: Tensor = torch.arange(count) % classes if classes else x.sum(1, keepdim=True) + 5
        sets.append(DataLoader(TensorDataset(x, y), batch_size=4))
    return sets


def regressor(**arguments: Any) -> IT3Regressor:
    torch.manual_seed(0)
    return IT3Regressor(
        MLP(3, 1, (8,)),
        prior=ValuePrior(mean=5.0, std=2.0),
        conditioning=FeatureInjection("network.layer0"),
        **arguments,
    )


def outputs(model: Any, trainer: Trainer, sets: list[Loader]) -> list[Tensor]:
    predicted: Any = trainer.predict(model, sets)
    return [torch.cat(batches) for batches in predicted]


def targets(sets: list[Loader]) -> list[Tensor]:
    return [torch.cat([batch[1] for batch in loader]) for loader in sets]


def seeded(module: Any, seed: int = 0) -> Any:
    """Draw every parameter anew, the embedder's too, which starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module
