"""Small modules, one for each kind of target, with their data and label space written out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from helpers.toy import seeded
from it3_lightning import FeatureInjection, IT3Mixin
from it3_lightning.priors import ClassPrior, LabelsPrior, MaskPrior, Prior


class Lit(LightningModule):
    """Ordinary: a network, a loss, and batches of inputs and target."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.net = CASES[case].network()
        self.loss = CASES[case].loss

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class IT3Lit(IT3Mixin, Lit):
    """The same with priors."""


@dataclass(frozen=True)
class Case:
    """A kind of target.

    Args:
        network: makes one; the prior enters at its layer ``"1"``.
        shape: of a sample of the inputs.
        target: draws targets of as many samples, by a generator.
        loss: of outputs and targets.
        prior: makes one that knows the targets' statistics.
        encode: targets in label space, written out.
        label: outputs in label space, written out.
        known: where a target says something, written out; ``None``: all over.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: Callable[[int, torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    prior: Callable[[], Prior]
    encode: Callable[[Tensor], Tensor]
    label: Callable[[Tensor], Tensor]
    known: Callable[[Tensor], Tensor] | None = None
    kind: type[IT3Lit] = IT3Lit
    layer: str = field(default="net.1")

    def samples(self, count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw inputs and targets."""
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(count, *self.shape, generator=generator)
        return inputs, self.target(count, generator)

    def loader(self, count: int = 12, seed: int = 0) -> DataLoader[Any]:
        """Serve them by four."""
        return DataLoader(TensorDataset(*self.samples(count, seed)), batch_size=4)


def module(name: str, **args: Any) -> Any:
    """Make a module of a case with priors and seeded weights."""
    case = CASES[name]
    injection = FeatureInjection(case.layer, hidden=4)
    torch.manual_seed(0)
    return seeded(case.kind(case=name, prior=case.prior(), conditioning=injection, **args))


def _dense(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs))


def _image(channels: int) -> nn.Module:
    first = nn.Conv2d(2, 6, 3, padding=1)
    return nn.Sequential(first, nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, channels, 1))


def _labels(high: int, shape: tuple[int, ...], ignored: int | None = None) -> Any:
    def draw(count: int, generator: torch.Generator) -> Tensor:
        labels = torch.randint(high, (count, *shape), generator=generator)
        if ignored is None:
            return labels
        return labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.3, ignored)

    return draw


def _one_hot(target: Tensor, classes: int, ignored: int) -> Tensor:
    """Return rows of 0 and 1 along dimension 1; 1 / C where the target is to be ignored."""
    rows = [(target == c).float() + (target == ignored) / classes for c in range(classes)]
    return torch.stack(rows, dim=1)


def _softmax(outputs: Tensor) -> Tensor:
    return outputs.exp() / outputs.exp().sum(1, keepdim=True)


def _sigmoid(outputs: Tensor) -> Tensor:
    """Return probabilities that each label is absent and present, ``(B, L) -> (B, 2, L)``."""
    present = 1 / (1 + (-outputs).exp())
    return torch.stack([1 - present, present], dim=1)


def _some_of(y: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy of the labels that are known."""
    known = target >= 0
    return F.binary_cross_entropy_with_logits(y[known], target[known].float())


CASES: dict[str, Case] = {
    "classes with ignored labels": Case(
        network=lambda: _dense(3),
        shape=(5,),
        target=_labels(3, (), -100),
        loss=lambda y, t: F.cross_entropy(y, t, ignore_index=-100),
        prior=lambda: ClassPrior(3, ignore_index=-100),
        encode=lambda t: _one_hot(t, 3, -100),
        label=_softmax,
        known=lambda t: t != -100,
    ),
    "maps of classes with ignored pixels": Case(
        network=lambda: _image(4),
        shape=(2, 6, 6),
        target=_labels(4, (6, 6), 255),
        loss=lambda y, t: F.cross_entropy(y, t, ignore_index=255),
        prior=lambda: MaskPrior(4, ignore_index=255),
        encode=lambda t: _one_hot(t, 4, 255),
        label=_softmax,
        known=lambda t: t != 255,
    ),
    "independent labels": Case(
        network=lambda: _dense(4),
        shape=(5,),
        target=_labels(2, (4,)),
        loss=lambda y, t: F.binary_cross_entropy_with_logits(y, t.float()),
        prior=lambda: LabelsPrior(4),
        encode=lambda t: torch.stack([1 - t, t], dim=1).float(),
        label=_sigmoid,
    ),
    "independent labels, some unknown": Case(
        network=lambda: _dense(2),
        shape=(5,),
        target=_labels(2, (2,), -1),
        loss=_some_of,
        prior=lambda: LabelsPrior(2, ignore_index=-1),
        encode=lambda t: torch.stack([1 - t, t], dim=1).where(t[:, None] >= 0, 0.5),
        label=_sigmoid,
        known=lambda t: (t >= 0).any(1),
    ),
}
