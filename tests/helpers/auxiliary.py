"""Networks with an auxiliary head, a stream with bad batches, and steps in plain torch."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from helpers.modules import stream, toy
from helpers.toy import LitNet, seeded
from it3_lightning import AuxiliaryMixin
from it3_lightning.engine import Adaptation, BatchAdapter, Settings
from it3_lightning.engine.types import Plain
from it3_lightning.methods import Auxiliary, TestTimeMethod


class TTTNet(AuxiliaryMixin, LitNet):
    """An ordinary module that learns an auxiliary task too."""


def headed(head: Auxiliary, seed: int = 0) -> nn.Module:
    """Make a small network in float64 with a head, both with seeded weights."""
    net = toy(seed)
    net.it3_auxiliary = seeded(head.double(), seed + 1)
    return net.eval()


def adapter_of(net: nn.Module, method: TestTimeMethod, **settings: Any) -> BatchAdapter:
    """Adapt a network of classes by SGD."""
    given = {"objective": method, "optimizer": "sgd", "lr": 0.05, **settings}
    return BatchAdapter(net, lambda x, _: net(x), lambda y: y.softmax(1), Settings(**given))


def run(adapter: BatchAdapter, x: Tensor, net: nn.Module) -> Adaptation:
    """Adapt to a batch."""
    with adapter.adapted(x, Plain(lambda inputs, _: net(inputs))) as found:
        return found


def with_refused(batches: int) -> tuple[list[Tensor], Callable[[Tensor], bool]]:
    """Return a stream in which a batch with a NaN follows each, and what says which those are."""
    good = stream(batches)
    bad = [torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 1, torch.nan, x) for x in good]
    every = [x for pair in zip(good, bad, strict=True) for x in pair]
    return every, lambda x: bool(x.isnan().any())


def body(net: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """Copy a ToyNet; return it, its features at ``dense``, and the parameters that are its own."""
    own: Any = copy.deepcopy(net)

    def features(x: Tensor) -> Tensor:
        dense: Tensor = own.dense(own.bn(own.conv(x)).relu().flatten(1))
        return dense

    named = own.named_parameters()
    return own, features, [p for n, p in named if not n.startswith("it3_")]


def descend(loss: Tensor, weights: Sequence[Tensor], lr: float) -> None:
    """Take a step of plain SGD on what the loss depends on."""
    gradients = torch.autograd.grad(loss, list(weights), allow_unused=True)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.sub_(lr * gradient)
