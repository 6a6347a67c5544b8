"""An ordinary LightningModule, the same with priors, their data, and what a module is bitwise."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from helpers.reference import ToyNet
from it3_lightning import (
    ClassPrior,
    FeatureInjection,
    Idempotence,
    IT3Mixin,
    IT3TestTimeCallback,
)
from it3_lightning.methods import Objective, SecondPass

Batch = tuple[Tensor, Tensor]


class LitNet(LightningModule):
    """Ordinary: knows nothing of priors."""

    def __init__(self, hidden: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.net = ToyNet(hidden=hidden)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class IT3Net(IT3Mixin, LitNet):
    """The same with priors."""


class Validated(IT3Net):
    """Logs a loss of validation samples; a gate is calibrated meanwhile."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Draws(IT3Net):
    """Draws random numbers in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(1)


class Marked(IT3Net):
    """Has all that could be left behind; its steps may fail."""

    fails: BaseException | None
    calls: Tensor

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.fails = None
        self.register_buffer("calls", torch.zeros(1), persistent=False)
        self.net.conv.weight.requires_grad_(False)
        for parameter in self.net.head.parameters():
            parameter.grad = torch.ones_like(parameter)

    def forward(self, x: Tensor) -> Tensor:
        self.passes = 1  # an attribute made on the way
        return super().forward(x)

    def _step(self, batch: Batch) -> Tensor:
        outputs: Tensor = self(batch[0])
        self.calls.add_(1)
        if self.fails is not None and self.calls >= 2:
            raise self.fails
        return outputs

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch).sum()

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        return self._step(batch).sum()

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        return self._step(batch)


class Raises(Idempotence):
    """An objective that fails at the second batch."""

    batches = 0

    def __call__(self, y0: Tensor, second: SecondPass, valid: Tensor | None = None) -> Objective:
        type(self).batches += 1
        if type(self).batches > 3:
            raise ValueError("engine")
        return super().__call__(y0, second, valid)


def parts(**args: Any) -> dict[str, Any]:
    """Make a prior and a conditioning for three classes."""
    made = {"prior": ClassPrior(3), "conditioning": FeatureInjection("net.dense", hidden=4)}
    return {**made, **args}


def seeded(module: nn.Module, seed: int = 0) -> Any:
    """Draw every parameter anew, the embedder's too, which starts at zero, and move the buffers."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.copy_(0.6 * draw)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.fill_(0.1)
    return module


def net(kind: Any = IT3Net, **args: Any) -> Any:
    """Make a module with priors and seeded weights."""
    return seeded(kind(**parts(**args)))


def adapting(**settings: Any) -> IT3TestTimeCallback:
    """Adapt as published, far enough to be seen."""
    published = Idempotence(reliability=None)
    given = {"objective": published, "optimizer": "sgd", "lr": 0.05, **settings}
    return IT3TestTimeCallback(**given)


def samples(count: int = 12, seed: int = 0) -> Batch:
    """Draw images `(B, 1, 4, 4)` and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.get_default_dtype())
    return images, torch.randint(3, (count,), generator=generator)


def loader(count: int = 12, batch: int = 4, seed: int = 0, **kwargs: Any) -> DataLoader[Any]:
    """Serve samples in order."""
    return DataLoader(TensorDataset(*samples(count, seed)), batch_size=batch, **kwargs)


def quiet(**kwargs: Any) -> Trainer:
    """Make a Trainer that writes nothing."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(**{**settings, **kwargs})


@contextmanager
def ending(error: BaseException | None) -> Iterator[None]:
    """Expect a run to end with this error, if any; Lightning turns Ctrl-C into ``SystemExit``."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        if error is None:
            yield
        else:
            with pytest.raises((type(error), SystemExit)):
                yield
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning disables on Ctrl-C


@contextmanager
def doubles() -> Iterator[None]:
    """Make new tensors float64 within, so that sums in another order agree."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def everything(module: nn.Module) -> dict[str, Any]:
    """Note what a module is: parameters, buffers, gradients, flags, modes, names of attributes."""
    noted: dict[str, Any] = {}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        noted[f"parameter {name}"] = parameter.detach().clone()
        noted[f"grad {name}"] = None if gradient is None else gradient.clone()
        noted[f"flags {name}"] = (parameter.requires_grad, parameter.is_inference())
        noted[f"storage {name}"] = parameter.data_ptr()
    for name, buffer in module.named_buffers():
        noted[f"buffer {name}"] = buffer.clone()
        noted[f"inference {name}"] = buffer.is_inference()
    for name, child in module.named_modules():
        noted[f"mode {name}"] = child.training
        noted[f"attributes {name}"] = sorted(vars(child))
        noted[f"hooks {name}"] = (len(child._forward_hooks), len(child._forward_pre_hooks))
    return noted


def predicted(model: Any, *callbacks: Any, data: Any = None, **kwargs: Any) -> Tensor:
    """Predict the samples of a loader, all batches as one."""
    batches: Any = quiet(callbacks=list(callbacks), **kwargs).predict(model, data or loader())
    return torch.cat(list(batches))


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what is not bitwise the same."""
    return [
        name
        for name in {**before, **after}
        if name not in before or name not in after or not _equal(before[name], after[name])
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))
    return bool(a == b)
