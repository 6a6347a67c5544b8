"""The networks that are timed, and where a prior enters them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn

from it3_lightning.conditioning import FeatureInjection
from it3_lightning.networks import SmallCNN
from it3_lightning.priors import ClassPrior

CLASSES = 10

Entry = Literal["first", "late"]


@dataclass(frozen=True)
class Architecture:
    """A network, by how it is made.

    Args:
        name: in tables.
        make: returns it, untrained.
        shape: of one input, ``(C, H, W)``.
        first: the first layer.
        late: a layer in the last third.
        chain: takes the network apart into modules that run one after the other, where it can be.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    first: str
    late: str
    chain: Callable[[nn.Module], Sequence[nn.Module]] | None = None

    def layer(self, entry: Entry) -> str:
        """Return the name of the layer behind which the prior enters."""
        return self.first if entry == "first" else self.late


class Conditioned(nn.Module):
    """A network and where a prior enters it, by an embedder with random weights.

    Args:
        network: to wrap.
        layer: behind which an embedding of the prior is added.
    """

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        self.net = network
        self.enters = f"net.{layer}"
        self.it3_conditioning = FeatureInjection(self.enters)
        self.it3_conditioning.attach(self, ClassPrior(CLASSES))
        for last in (self.embedder().get_parameter(f"last.{n}") for n in ("weight", "bias")):
            nn.init.normal_(last, std=0.3)

    def embedder(self) -> nn.Module:
        """Return what turns a prior into what is added."""
        (embedder,) = self.it3_conditioning.embedders.values()
        return embedder

    def forward(self, images: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return logits."""
        with self.it3_conditioning.given(prior):
            logits: Tensor = self.net(images)
        return logits


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode, twice: as it is, and conditioned; the same weights in both.

    Args:
        architecture: of the network.
        entry: where the prior enters.
        plain: the network.
        conditioned: a copy of it, conditioned.
    """

    architecture: Architecture
    entry: Entry
    plain: nn.Module
    conditioned: Conditioned

    @classmethod
    def of(cls, architecture: Architecture, entry: Entry, device: torch.device) -> Subject:
        """Make the network: random weights, the statistics of its BatchNorm from random images."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = architecture.make()
            _take_statistics(network, torch.randn(32, *architecture.shape))
            conditioned = Conditioned(copy.deepcopy(network), architecture.layer(entry))
        conditioned = conditioned.eval().to(device)
        return cls(architecture, entry, network.eval().to(device), conditioned)

    @property
    def name(self) -> str:
        """The network and where the prior enters."""
        return f"{self.architecture.name}, prior at {self.architecture.layer(self.entry)}"

    def images(self, number: int, *, seed: int = 0) -> Tensor:
        """Return random images ``(number, C, H, W)`` on the network's device."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(number, *self.architecture.shape, generator=generator)
        return images.to(next(self.plain.parameters()).device)

    def split(self) -> tuple[nn.Sequential, nn.Sequential]:
        """Return the conditioned network as what runs before the prior enters, and after.

        Raises:
            ValueError: it is not known as a chain of modules.
        """
        if self.architecture.chain is None:
            raise ValueError(f"Expected a chain of modules, got {self.name}. Give it a chain.")
        network = self.conditioned.net
        chain = list(self.architecture.chain(network))
        entry = network.get_submodule(self.architecture.layer(self.entry))
        place = next(i for i, module in enumerate(chain) if module is entry) + 1
        return nn.Sequential(*chain[:place]), nn.Sequential(*chain[place:])


def small_cnn(width: int = 16, hidden: int = 128) -> Architecture:
    """Return the library's small network on 28 x 28 pixels.

    Args:
        width: channels of its first convolution.
        hidden: features of its first dense layer.
    """
    make = partial(SmallCNN, width=width, hidden=hidden)
    return Architecture("small CNN", make, (1, 28, 28), "features.0", "dense1", _dense_chain)


def resnet18(*, cifar: bool = False) -> Architecture:
    """Return torchvision's ResNet-18 on 32 x 32 pixels.

    Args:
        cifar: with a stem for small images, 3 x 3 without stride and pooling.
    """
    make = _cifar_resnet18 if cifar else partial(torchvision.models.resnet18, num_classes=CLASSES)
    name = "ResNet-18, CIFAR stem" if cifar else "ResNet-18"
    return Architecture(name, make, (3, 32, 32), "conv1", "layer4", _pooled_chain)


def resnet50() -> Architecture:
    """Return torchvision's ResNet-50 on 224 x 224 pixels."""
    make = partial(torchvision.models.resnet50, num_classes=CLASSES)
    return Architecture("ResNet-50", make, (3, 224, 224), "conv1", "layer4", _pooled_chain)


def vit() -> Architecture:
    """Return torchvision's ViT-B/16 on 224 x 224 pixels."""
    make = partial(torchvision.models.vit_b_16, num_classes=CLASSES)
    return Architecture("ViT-B/16", make, (3, 224, 224), "conv_proj", "encoder.ln")


def _dense_chain(network: nn.Module) -> Sequence[nn.Module]:
    dense = [network.get_submodule(name) for name in ("dense1", "dense2", "head")]
    return [*network.get_submodule("features").children(), *_between(dense, nn.ReLU())]


def _pooled_chain(network: nn.Module) -> Sequence[nn.Module]:
    *features, head = network.children()
    return [*features, nn.Flatten(), head]


def _between(modules: Sequence[nn.Module], separator: nn.Module) -> list[nn.Module]:
    first, *others = modules
    return [first, *(m for other in others for m in (separator, other))]


def _cifar_resnet18() -> nn.Module:
    network: nn.Module = torchvision.models.resnet18(num_classes=CLASSES)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


@torch.no_grad()
def _take_statistics(network: nn.Module, images: Tensor) -> None:
    """Let BatchNorm have the statistics of these images, as after training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches, of which there is one
    network.train()(images)
