"""The loss of a training step and its gradients: as trained, and written out by hand."""

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from helpers.toy import IT3Net, quiet, samples
from it3_lightning import DualPass

Grads = dict[str, Tensor]

X, Y = samples(6)[0].double(), samples(6)[1]
ONE_HOT = F.one_hot(Y, 3).double()
EXACT = DualPass(perturb_prior=False)


class Recorded(Callback):
    """Seeds the first step, and keeps its loss and gradients."""

    def __init__(self) -> None:
        self.grads: Grads = {}
        self.loss = torch.tensor(0.0)

    def on_train_batch_start(self, *_: Any) -> None:
        torch.manual_seed(7)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        named = pl_module.named_parameters()
        self.grads = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.loss = outputs["loss"]


def one(batch: Any) -> Any:
    """Serve one batch, as it is."""
    return DataLoader(cast(Any, [batch]), batch_size=None)


def step_once(model: LightningModule, batch: Any) -> Recorded:
    """Train on one batch, with the global generator at seed 7 when the step starts."""
    recorded = Recorded()
    quiet(max_steps=1, callbacks=[recorded]).fit(model, one(batch))
    return recorded


def by_hand(model: IT3Net, loss: Callable[[Callable[..., Tensor]], Tensor]) -> Recorded:
    """Differentiate a loss of f(x, p), written with plain functions of the model's weights."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    embedder = "it3_conditioning.embedders.net-dense"

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def f(x: Tensor, prior: Tensor | None) -> Tensor:
        x = F.conv2d(x, weights["net.conv.weight"], weights["net.conv.bias"])
        affine = weights["net.bn.weight"], weights["net.bn.bias"]
        x = F.batch_norm(x, None, None, *affine, training=True).relu().flatten(1)
        features = linear("net.dense", x)
        if prior is not None:
            features = features + linear(
                f"{embedder}.last", linear(f"{embedder}.first", prior).relu()
            )
        return linear("net.head", features.relu())

    recorded = Recorded()
    recorded.loss = loss(f)
    grads = torch.autograd.grad(recorded.loss, list(weights.values()), allow_unused=True)
    recorded.grads = {
        n: torch.zeros_like(weights[n]) if g is None else g
        for n, g in zip(weights, grads, strict=True)
    }
    return recorded


def agree(actual: Recorded, expected: Recorded) -> None:
    torch.testing.assert_close(actual.loss, expected.loss.detach())
    assert actual.grads.keys() == expected.grads.keys()
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(actual.grads[name], gradient, msg=name)
