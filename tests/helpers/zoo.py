"""Networks of many kinds, each with a prior, and inputs for them, drawn from seeds alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.models import VisionTransformer, resnet18

from helpers.modules import Conditioned, LastOutput, drawn, images
from helpers.reference import ToyNet
from it3_lightning.engine import Enters

CLASSES = 3


class Injected(nn.Module):
    """Any network, with the embedded prior added to the output of one of its layers."""

    def __init__(self, net: nn.Module, layer: str, width: int) -> None:
        super().__init__()
        self.net = net
        self.embed = nn.Linear(CLASSES, width)
        self.prior: Tensor | None = None
        net.get_submodule(layer).register_forward_hook(self._inject)

    def _inject(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if self.prior is None:
            return None
        added: Tensor = self.embed(self.prior)
        if output.ndim == 4:
            return output + added[:, :, None, None]
        return output + (added if output.ndim == 2 else added[:, None])

    def forward(self, x: Any, prior: Tensor | None = None) -> Tensor:
        """Return logits `(B, 3)`."""
        self.prior = prior
        try:
            logits: Tensor = self.net(x)
            return logits
        finally:
            self.prior = None


class Pooled(nn.Module):
    """A layer over tokens `(B, T, C)`, and a head on their mean."""

    def __init__(self, tokens: nn.Module, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, 3)`."""
        logits: Tensor = self.head(self.tokens(x).mean(1))
        return logits


class DenseGraph(nn.Module):
    """Two graph convolutions on nodes `(B, N, F)` and adjacencies `(B, N, N)`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, graph: tuple[Tensor, Tensor]) -> Tensor:
        """Return logits `(B, 3)`."""
        nodes, adjacency = graph
        nodes = (adjacency @ self.first(nodes)).tanh()
        nodes = (adjacency @ self.second(nodes)).tanh()
        logits: Tensor = self.head(nodes.mean(1))
        return logits


def graphs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw graphs of five nodes with normalised adjacencies."""
    generator = torch.Generator().manual_seed(200 + seed)
    nodes = torch.randn(count, 5, 4, generator=generator, dtype=torch.float64)
    edges = torch.rand(count, 5, 5, generator=generator, dtype=torch.float64).round()
    return nodes, edges / edges.sum(2, keepdim=True).clamp_min(1)


def noise(*shape: int, count: int, seed: int = 0) -> Tensor:
    """Draw inputs `(count, *shape)`."""
    generator = torch.Generator().manual_seed(300 + seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def convolutional(norm: Callable[[], nn.Module]) -> nn.Module:
    """Make a small CNN with a norm layer of choice."""
    body = (nn.Conv2d(1, 4, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))
    return Conditioned(nn.Sequential(*body))


def encoder() -> nn.Module:
    """Make a small Transformer encoder with a head."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return Pooled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 8)


def vit() -> nn.Module:
    """Make a small VisionTransformer for images `(B, 3, 16, 16)`."""
    net: nn.Module = VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=CLASSES)
    return net


@dataclass(frozen=True)
class Kind:
    """A kind of network: how it is made, what it takes, and where the prior enters."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    layer: str
    where: Literal["input", "output"] = "output"
    std: float | None = 0.5

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """Return it in evaluation mode; its weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.make().eval()
            if self.std is not None:
                net = drawn(net, seed)
            return net.to(dtype)

    def batch(self, count: int, dtype: torch.dtype = torch.float64) -> Any:
        """Return a batch of inputs."""
        return tree_map(lambda leaf: leaf.to(dtype), self.inputs(count))

    @property
    def enters(self) -> Enters:
        """Where the prior enters, as the engine takes it."""
        return {self.layer: self.where}


KINDS: dict[str, Kind] = {
    "mlp": Kind(
        lambda: Conditioned(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh())),
        images,
        "body",
    ),
    "batch norm": Kind(ToyNet, images, "dense"),
    "group norm": Kind(lambda: convolutional(lambda: nn.GroupNorm(2, 4)), images, "body"),
    "layer norm": Kind(lambda: convolutional(lambda: nn.LayerNorm([4, 2, 2])), images, "body"),
    "lstm": Kind(lambda: Conditioned(LastOutput(nn.LSTM(4, 8, batch_first=True))), images, "body"),
    "transformer": Kind(
        lambda: Injected(encoder(), "tokens.layers.0", 8),
        lambda n: noise(6, 8, count=n),
        "net.tokens.layers.0",
    ),
    "vit": Kind(
        lambda: Injected(vit(), "encoder.layers.encoder_layer_0", 8),
        lambda n: noise(3, 16, 16, count=n),
        "net.encoder.layers.encoder_layer_0",
    ),
    "graph": Kind(lambda: Injected(DenseGraph(), "first", 8), graphs, "net.first"),
}
RESNET = Kind(
    lambda: Injected(resnet18(num_classes=CLASSES), "layer3", 256),
    lambda n: noise(3, 32, 32, count=n),
    "net.layer3",
    std=None,
)


def singles(inputs: Any) -> list[Any]:
    """Return every sample of a batch, each a batch of one."""
    return [rows(inputs, [index]) for index in range(len(tree_leaves(inputs)[0]))]


def rows(inputs: Any, indices: list[int]) -> Any:
    """Return the samples at these indices."""
    return tree_map(lambda leaf: leaf[indices], inputs)
