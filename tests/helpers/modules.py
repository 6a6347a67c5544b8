"""Small float64 networks whose forward takes a prior, and what a module is, bit for bit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from helpers.reference import ToyNet
from it3_lightning.engine import Forward


def drawn(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and buffer of a network anew, in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return net


def toy(seed: int = 0) -> ToyNet:
    """Make a ToyNet with random weights and statistics."""
    net = drawn(ToyNet(), seed)
    assert isinstance(net, ToyNet)
    return net


def images(count: int = 6, seed: int = 0) -> Tensor:
    """Draw images `(count, 1, 4, 4)`."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)


def stream(batches: int) -> list[Tensor]:
    """Draw batches of six images."""
    return [images(seed=index) for index in range(batches)]


SHIFTS = (-0.3, 0.0, 0.4)


class Brighter:
    """Views that anyone can repeat: the same few shifts of brightness, one after the other."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Make the next view."""
        shift = SHIFTS[self.calls % len(SHIFTS)]
        self.calls += 1
        return images + shift


def takes_prior(net: Callable[..., Any]) -> Forward:
    """Call a network whose forward takes the prior as its second argument."""

    def forward(inputs: Any, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net(inputs, prior)
        return outputs

    return forward


class Conditioned(nn.Module):
    """Any body `(B, ...) -> (B, 8)` with a linear head, the prior embedded and added in between."""

    def __init__(self, body: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.body = body
        self.embed = nn.Linear(classes, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return logits `(B, classes)`."""
        features: Tensor = self.body(x)
        if prior is not None:
            features = features + self.embed(prior)
        logits: Tensor = self.head(features.tanh())
        return logits


class LastOutput(nn.Module):
    """The last output of a recurrent layer: rows of an image are the steps of a sequence."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, 1, 4, 4)` to `(B, hidden)`."""
        output: Tensor = self.recurrent(x.squeeze(1))[0][:, -1]
        return output


class Tied(nn.Module):
    """Two layers that share one weight, registered in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, 1, 4, 4)` to `(B, 8)`."""
        features: Tensor = self.last(self.second(self.first(x.flatten(1)).tanh()).tanh())
        return features


def bits(module: nn.Module) -> dict[str, Any]:
    """Note all that a module is: storage, values, flags, gradients, buffers, modes, attributes."""
    noted: dict[str, Any] = {}
    for name, p in module.named_parameters():
        noted[f"{name} as parameter"] = (id(p), p.data_ptr(), p.requires_grad, id(p.grad))
        noted[f"{name} in value"] = _bytes(p)
        noted[f"{name} in gradient"] = None if p.grad is None else _bytes(p.grad)
    for owner_name, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            noted[f"{owner_name}.{name} as buffer"] = id(buffer)
            noted[f"{owner_name}.{name} in value"] = None if buffer is None else _bytes(buffer)
        noted[f"{owner_name} in mode"] = owner.training
        noted[f"{owner_name} in attributes"] = {key: id(v) for key, v in vars(owner).items()}
    return noted


def changed(before: dict[str, Any], module: nn.Module) -> list[str]:
    """Name what is no longer as it was."""
    now = bits(module)
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def same(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> bool:
    """Whether the tensors of all pairs are equal to the last bit."""
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def _bytes(tensor: Tensor) -> bytes:
    return (
        tensor.detach()
        .to_dense()
        .clone()
        .reshape(-1)
        .contiguous()
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


class Scale(nn.Module):
    """``w x + v p``: with the anchor at (W, V) the distance is ``(w x - W x - V w x)^2``."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return `(B, 1)`."""
        out: Tensor = self.w * x
        return out if prior is None else out + self.v * prior


class Restless(nn.Module):
    """Does in its forward all that a network may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy()
        self.dropout = nn.Dropout(0.5).train()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1), persistent=False)
        self.register_buffer("empty", None)
        self.seen: Tensor | None = None
        self.gone = "to be removed"

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return logits `(B, 3)`."""
        assert isinstance(self.calls, Tensor)
        self.calls += 1
        self.last = torch.rand(1)
        self.empty = torch.ones(1)
        self.register_buffer("late", torch.ones(1))
        logits: Tensor = self.net(x, prior)
        self.seen = logits
        self.extra = [logits]
        self.dropout.training = not self.dropout.training
        if hasattr(self, "gone"):
            del self.gone
        return logits


def in_use(net: nn.Module) -> nn.Module:
    """Give a network gradients of former training, and parameters that need none."""
    for index, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
        parameter.requires_grad_(index % 3 > 0)
    return net


def restless() -> Restless:
    """Make one in use."""
    net = in_use(Restless())
    assert isinstance(net, Restless)
    return net


def predictions(*shape: int, seed: int = 0) -> Tensor:
    """Draw probabilities, of classes along dimension 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.softmax(1)
