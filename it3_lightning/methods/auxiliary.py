"""Auxiliary task: a head on the features of a named layer, with a loss that needs no labels.

:class:`~it3_lightning.AuxiliaryMixin` trains it beside the main task, as ``module.it3_auxiliary``;
:class:`~it3_lightning.methods.TTT` and its like step on its loss at test time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from it3_lightning.methods.views import is_images
from it3_lightning.utils.messages import unknown

HEAD = "it3_auxiliary"  # what a module calls it

Features = Callable[[Any], Any]
"""Runs the network on inputs, neutrally, and returns what the layer puts out."""

_Head = TypeVar("_Head", bound="Auxiliary")


class Auxiliary(nn.Module, ABC):
    """A task that inputs pose by themselves: override :meth:`forward` and :meth:`init_args`.

    Args:
        layer: name of the layer whose features the head sees; ``model.named_modules()`` lists them.
            What comes after it learns nothing of the task, at test time too.
        channels: width of the layer's output.

    Raises:
        ValueError: there are no channels.
    """

    def __init__(self, layer: str, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"Expected channels >= 1, the width of {layer!r}, got {channels}.")
        self.layer, self.channels = layer, channels

    @abstractmethod
    def forward(
        self, inputs: Any, features: Features, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the loss of every sample, ``(B,)``.

        Args:
            inputs: of the network, ``(B, ...)``.
            features: runs the network on views of them.
            generator: to draw the views with, on the CPU; default: the global one.
        """

    @abstractmethod
    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""

    def pooled(self, features: Any) -> Tensor:
        """Return the mean over all positions, ``(B, channels)``.

        Args:
            features: ``(B, C)``, ``(B, T, C)``, ``(B, C, H, W)`` or ``(B, H, W, C)``.

        Raises:
            ValueError: they are something else, or of another width.
        """
        positions = self.positions(features)
        return positions.flatten(1, -2).mean(1) if positions.ndim > 2 else positions

    def positions(self, features: Any) -> Tensor:
        """Return features with the channels last, as :meth:`pooled` takes them."""
        found = features[0] if isinstance(features, tuple) else features
        if isinstance(found, Tensor) and found.ndim > 1:
            if found.ndim > 3 and found.shape[1] == self.channels:
                return found.movedim(1, -1)
            if found.shape[-1] == self.channels:
                return found
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"Expected layer {self.layer!r} to put out features (B, {self.channels}), "
            f"(B, T, {self.channels}) or (B, {self.channels}, H, W), got {got}. Give the width of "
            f"the layer as channels of {type(self).__name__}, or name another layer."
        )


def perceptron(channels: int, hidden: int, out: int) -> nn.Sequential:
    """Return a head with one hidden layer, along the last dimension.

    >>> perceptron(3, 8, 2)(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """
    return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, out))


def images_of(task: Auxiliary, inputs: Any) -> Tensor:
    """Return inputs that are images.

    Raises:
        ValueError: they are something else.
    """
    if is_images(inputs):
        return inputs
    got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
    raise ValueError(
        f"{type(task).__name__} needs floating images (B, C, H, W) as the network's only input, "
        f"got {got}. Write a task of your own: a subclass of Auxiliary."
    )


def head_of(module: nn.Module, kind: type[_Head], asks: str) -> _Head:
    """Return the auxiliary head of a module.

    Args:
        module: that was trained with it.
        kind: of the head.
        asks: who needs it.

    Raises:
        ValueError: there is none, one of another kind, or one at a layer that does not exist.
    """
    head = getattr(module, HEAD, None)
    example = "Rotation" if kind is Auxiliary else kind.__name__
    if not isinstance(head, kind):
        has = "none" if head is None else f"a {type(head).__name__}"
        raise ValueError(
            f"{asks} needs a module with an auxiliary head, {kind.__name__}, and "
            f"{type(module).__name__} has {has}. Train it with one:\n"
            f"    class TTTNet(AuxiliaryMixin, Net): pass\n"
            f"    model = TTTNet(..., auxiliary={example}('layer', channels))"
        )
    names = [name for name, _ in module.named_modules() if not name.startswith(HEAD)]
    if head.layer not in names:
        raise ValueError(unknown("layer", head.layer, names))
    return head
