"""Any of torchvision's classification networks, by name, with its normalisation inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision import models

from it3_lightning.networks.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from it3_lightning.utils.messages import unknown


class TorchvisionNetwork(nn.Module):
    """Normalises images and runs a network of ``torchvision.models``, which is its ``model``.

    Args:
        name: of the network, such as ``"resnet50"``.
        num_classes: outputs ``C``. Where pretrained weights have another number, all but the last
            layer is taken from them.
        weights: name of pretrained weights, such as ``"DEFAULT"`` or ``"IMAGENET1K_V1"``, which
            torchvision downloads once; ``None``, or ``"none"`` on the command line: random weights.
        mean: of each channel in the training images; ImageNet's.
        std: standard deviation of the same.

    Shapes:
        ``(B, 3, H, W)`` in [0, 1] to ``(B, C)``.

    Raises:
        ValueError: there is no such network, or it has no such weights.

    >>> import torch
    >>> network = TorchvisionNetwork("resnet18", num_classes=10).eval()
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.model.conv1.stride
    (torch.Size([2, 10]), (2, 2))
    """

    def __init__(
        self,
        name: str,
        *,
        num_classes: int = 1000,
        weights: str | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        known = models.list_models(module=models)
        if name not in known:
            raise ValueError(unknown("torchvision network", name, known))
        self.normalize = Normalize(mean, std)
        self.model: nn.Module = _built(name, num_classes, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs."""
        outputs: Tensor = self.model(self.normalize(images))
        return outputs


def _built(name: str, num_classes: int, weights: str | None) -> nn.Module:
    """Return a network with as many outputs, its layers from the weights where these fit."""
    if weights is None or weights.lower() == "none":
        plain: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
        return plain
    known: Any = models.get_model_weights(name)
    if weights not in known.__members__:
        raise ValueError(unknown(f"weights of {name}", weights, known.__members__))
    trained: nn.Module = models.get_model(name, weights=known[weights])
    if num_classes == len(known[weights].meta["categories"]):
        return trained
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    own = model.state_dict()
    fitting = {k: v for k, v in trained.state_dict().items() if v.shape == own[k].shape}
    model.load_state_dict({**own, **fitting})
    return model
