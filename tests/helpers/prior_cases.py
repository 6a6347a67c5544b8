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
from it3_lightning.priors import ClassPrior, LabelsPrior, MaskPrior, Prior, ValuePrior


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


class Heads(nn.Module):
    """Features, and of them two heads: values, and scores of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(5, 8), nn.Linear(8, 8)
        self.values, self.scores = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map `(B, 5)` to values `(B, 2)` and logits `(B, 3)`."""
        features = self.middle(self.first(x)).tanh()
        return self.values(features), self.scores(features)


class IT3Heads(IT3Lit):
    """Feeds the scores back; its targets are rows of two values and a class."""

    def it3_outputs(self, returned: Any) -> Tensor:
        """Return the scores."""
        scores: Tensor = returned[1]
        return scores

    def it3_target(self, batch: Any) -> Tensor:
        """Return the classes."""
        classes: Tensor = batch[1][:, 2].long()
        return classes


def _of_heads(y: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.mse_loss(y[0], target[:, :2]) + F.cross_entropy(y[1], target[:, 2].long())


def _values_and_class(count: int, generator: torch.Generator) -> Tensor:
    classes = torch.randint(3, (count, 1), generator=generator)
    return torch.cat([torch.randn(count, 2, generator=generator), classes], dim=1)


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
        kind: of the module.
        layer: where the prior enters.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: Callable[[int, torch.Generator], Tensor]
    loss: Callable[[Any, Tensor], Tensor]
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


def _values(*shape: int, holes: float = 0.0) -> Any:
    """Draw values around 3, some of which may be missing."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        values = 3 + 2 * torch.randn(count, *shape, generator=generator)
        return values.masked_fill(torch.rand(values.shape, generator=generator) < holes, torch.nan)

    return draw


def _finite(y: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of the values that are there."""
    known = target.isfinite()
    return F.mse_loss(y.reshape(target.shape)[known], target[known])


def _of_tokens(y: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of outputs (B, T, C)."""
    return F.cross_entropy(y.flatten(0, 1), target.flatten(), ignore_index=-100)


def _series(channels: int) -> nn.Module:
    convolutions = nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 6, 1)
    return nn.Sequential(*convolutions, nn.Tanh(), nn.Conv1d(6, channels, 3, padding=1))


class Forecaster(nn.Module):
    """A recurrent layer, and values of some steps to come, made of its last state."""

    def __init__(self, steps: int, channels: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(2, 6, batch_first=True)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, steps * channels)
        self.shape = (steps, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map series (B, S, 2) to forecasts (B, steps, channels)."""
        last = self.middle(self.recurrent(x)[0][:, -1])
        forecasts: Tensor = self.head(last.tanh()).unflatten(1, self.shape)
        return forecasts


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
    "labels of tokens, classes last, some ignored": Case(
        network=lambda: _dense(3),
        shape=(6, 5),
        target=_labels(3, (6,), -100),
        loss=_of_tokens,
        prior=lambda: ClassPrior(3, layout="BTC", ignore_index=-100),
        encode=lambda t: _one_hot(t, 3, -100),
        label=lambda y: _softmax(y.transpose(1, 2)),
        known=lambda t: t != -100,
    ),
    "labels of tokens, classes first": Case(
        network=lambda: _series(3),
        shape=(2, 3),
        target=_labels(3, (3,)),
        loss=F.cross_entropy,
        prior=lambda: ClassPrior(3, layout="BCT"),
        encode=lambda t: _one_hot(t, 3, -1),
        label=_softmax,
    ),
    "maps of values": Case(
        network=lambda: _image(2),
        shape=(2, 6, 6),
        target=_values(2, 6, 6),
        loss=_finite,
        prior=lambda: ValuePrior(2, layout="BCHW", mean=[3.0, 2.0], std=[2.0, 4.0]),
        encode=lambda t: torch.stack([(t[:, 0] - 3) / 2, (t[:, 1] - 2) / 4], dim=1),
        label=lambda y: torch.stack([(y[:, 0] - 3) / 2, (y[:, 1] - 2) / 4], dim=1),
    ),
    "a map of values with holes": Case(
        network=lambda: _image(1),
        shape=(2, 6, 6),
        target=_values(6, 6, holes=0.2),
        loss=_finite,
        prior=lambda: ValuePrior(layout="BCHW", mean=3.0, std=2.0),
        encode=lambda t: ((t - 3) / 2).nan_to_num(0.0).unsqueeze(1),
        label=lambda y: (y - 3) / 2,
        known=lambda t: t.isfinite(),
    ),
    "a series of values": Case(
        network=lambda: nn.Sequential(*_dense(1).children(), nn.Flatten()),
        shape=(6, 5),
        target=_values(6),
        loss=_finite,
        prior=lambda: ValuePrior(layout="BTC", mean=3.0, std=2.0),
        encode=lambda t: ((t - 3) / 2).unsqueeze(1),
        label=lambda y: ((y - 3) / 2).unsqueeze(1),
    ),
    "series of several values": Case(
        network=lambda: _dense(2),
        shape=(6, 5),
        target=_values(6, 2),
        loss=_finite,
        prior=lambda: ValuePrior(2, layout="BTC", mean=[3.0, 2.0], std=[2.0, 4.0]),
        encode=lambda t: torch.stack([(t[..., 0] - 3) / 2, (t[..., 1] - 2) / 4], dim=1),
        label=lambda y: torch.stack([(y[..., 0] - 3) / 2, (y[..., 1] - 2) / 4], dim=1),
    ),
    "a forecast as one vector": Case(
        network=lambda: Forecaster(4, 2),
        shape=(5, 2),
        target=_values(4, 2),
        loss=_finite,
        prior=lambda: ValuePrior(8, mean=3.0, std=[2.0 + i for i in range(8)]),
        encode=lambda t: (t.reshape(-1, 8) - 3) / (2 + torch.arange(8)),
        label=lambda y: (y.reshape(-1, 8) - 3) / (2 + torch.arange(8)),
        layer="net.middle",
    ),
    "one head of two": Case(
        network=Heads,
        shape=(5,),
        target=_values_and_class,
        loss=_of_heads,
        prior=lambda: ClassPrior(3),
        encode=lambda t: _one_hot(t, 3, -1),
        label=_softmax,
        kind=IT3Heads,
        layer="net.middle",
    ),
}
