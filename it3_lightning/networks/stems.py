"""First layers for images of 32 pixels, in the place of those made for 224."""

from __future__ import annotations

from typing import Any

from torch import nn


def give_cifar_stem(name: str, model: nn.Module) -> None:
    """Have a ResNet or DLA of timm begin with a 3 x 3 convolution and two reductions fewer.

    Both then bring 32 pixels to 4, in their last three levels.

    Source: K. He et al., "Deep Residual Learning" (CVPR 2016), section 4.2, for the convolution;
    F. Yu et al., "Deep Layer Aggregation" (CVPR 2018), for the DLA.

    Args:
        name: of the network, for the error.
        model: changed in place; its new weights are random.

    Raises:
        ValueError: it has neither the stem of a ResNet nor that of a DLA.
    """
    parts: Any = model
    if all(hasattr(model, part) for part in ("conv1", "bn1", "maxpool", "layer4")):
        parts.conv1 = _convolution(parts.bn1.num_features)
        parts.maxpool = nn.Identity()
    elif all(hasattr(model, part) for part in ("base_layer", "level1", "level2", "level5")):
        parts.base_layer[0] = _convolution(parts.base_layer[0].out_channels)
        for level in (parts.level1, parts.level2):
            _keep_size(level)
    else:
        raise ValueError(
            f"Expected a ResNet or DLA for stem='cifar', got {name} ({type(model).__name__}). Take "
            "e.g. resnet18 or dla34, or stem='default'."
        )


def _convolution(channels: int) -> nn.Conv2d:
    """Return a 3 x 3 convolution of colour images, initialised as timm's are."""
    layer = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _keep_size(level: nn.Module) -> None:
    """Take strides and pooling out of a level."""
    for module in list(level.modules()):
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        for child, layer in module.named_children():
            if isinstance(layer, nn.MaxPool2d):
                setattr(module, child, nn.Identity())
