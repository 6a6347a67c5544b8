"""What users run: ``Trainer.predict`` with a callback and the defaults, scope ``sample``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from costs.clock import Piece, Plan, side_by_side
from costs.extent import Extent
from costs.items import Item, Job, Required, Row
from costs.networks import CLASSES, Subject
from costs.peer import Peer, one_by_one
from it3_lightning import (
    ClassPrior,
    FeatureInjection,
    Idempotence,
    IT3Mixin,
    IT3TestTimeCallback,
)

_SECTION = "Under a Trainer: predict, scope sample, defaults, against torch-ttt on single images"
_BATCHES = (4, 40)  # batches of 64 images; the first pays for the selection of a backend
_SINGLE = 4  # images that torch-ttt takes in a round


class Classifier(LightningModule):
    """A network whose step predicts.

    Args:
        network: images to logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return a loss, so that it can be mixed with priors."""
        return self(batch).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Predict: a gate is calibrated meanwhile."""
        self(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return logits."""
        return self(batch)  # type: ignore[no-any-return]


class WithPriors(IT3Mixin, Classifier):
    """The same with priors."""


def jobs(extent: Extent, device: torch.device) -> Iterator[Job]:
    """Yield a comparison for a short and for a long run."""
    for batches in _BATCHES if extent.batch > 2 else (1,):
        label = f"under a Trainer: {extent.small.name}, {batches} batches of {extent.batch}"
        yield Job(label, partial(_compare, extent, batches, device))


def module_of(subject: Subject) -> LightningModule:
    """Return a module around the subject's plain network, its embedder with random weights."""
    layer = f"net.{subject.architecture.layer(subject.entry)}"
    module = WithPriors(
        subject.plain, prior=ClassPrior(CLASSES), conditioning=FeatureInjection(layer)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in module.it3_parts()[1].parameters():
            nn.init.normal_(parameter, std=0.3)
    return module.eval()


def predict(module: LightningModule, loader: DataLoader[Any], accelerator: str) -> None:
    """Predict as users do, with a new callback."""
    callback = IT3TestTimeCallback(scope="sample", objective=Idempotence(reliability=None))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers, which the data needs none of
        trainer.predict(module, loader)


def _compare(extent: Extent, batches: int, device: torch.device) -> list[Item]:
    subject = Subject.of(extent.small, "first", device)
    count = batches * extent.batch
    loader: DataLoader[Any] = DataLoader(subject.images(count).cpu(), batch_size=extent.batch)  # type: ignore[arg-type]
    some = subject.images(_SINGLE)
    layer = subject.architecture.layer(subject.entry)
    peer = Peer(subject.plain, layer, subject.images(2), steps=1, lr=1e-4)
    module = module_of(Subject.of(extent.small, "first", device))
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    pieces = [
        Piece("ours", lambda _: predict(module, loader, accelerator), per=count),
        Piece("torch-ttt", partial(one_by_one, peer), lambda: some, len(some)),
    ]
    plan = Plan(extent.plan.seconds, extent.plan.least, 20, extent.plan.clock)
    return [
        Row.timed(
            side_by_side(pieces, plan),
            section=_SECTION,
            case=f"{subject.name}, {batches} batches of {extent.batch}, a new run each time",
            against="torch-ttt",
            ours=["ours"],
            other=["torch-ttt"],
            required=Required(4.8),
            judged=batches == _BATCHES[0],
        )
    ]
