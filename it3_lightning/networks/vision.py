"""Vision networks of torchvision and timm by name, with their normalisation inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from it3_lightning.utils.messages import not_installed, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


class TimmNetwork(nn.Module):
    """Normalises images and runs a network of ``timm``, which is its ``model``.

    Args:
        name: of the network, such as ``"resnet18"``, ``"dla34"`` or ``"vit_base_patch16_224"``.
        num_classes: outputs ``C``.
        stem: ``"cifar"`` has ResNets and DLAs begin with a 3 x 3 convolution and without their
            first two reductions of size, for images of 32 pixels; ``"default"``: as it is.
        pretrained: whether timm downloads its weights, once.
        image_size: height and width of the images, for networks that must know it (transformers);
            ``None``: their own.
        mean: of each channel in the training images; ``None``: as timm has it for this network.
        std: standard deviation of the same.

    Shapes:
        ``(B, 3, H, W)`` in [0, 1] to ``(B, C)``.

    Raises:
        ImportError: timm is not installed.
        ValueError: there is no such network, it has no stem to change, or a changed stem is to have
            pretrained weights.

    >>> import torch
    >>> network = TimmNetwork("resnet18", num_classes=10, stem="cifar").eval()
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.model.conv1.stride
    (torch.Size([2, 10]), (1, 1))
    """

    def __init__(
        self,
        name: str,
        *,
        num_classes: int = 1000,
        stem: Literal["default", "cifar"] = "default",
        pretrained: bool = False,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if stem not in ("default", "cifar"):
            raise ValueError(unknown("stem", stem, ["default", "cifar"]))
        if stem == "cifar" and pretrained:
            raise ValueError(
                "Expected pretrained=False with stem='cifar', got True: timm's weights are for "
                "another stem. Train the network, or leave its stem as it is."
            )
        timm = _timm()
        if not timm.is_model(name):
            raise ValueError(unknown("timm network", name, timm.list_models()))
        sized = {} if image_size is None else {"img_size": image_size}
        try:
            self.model: nn.Module = timm.create_model(
                name, pretrained=pretrained, num_classes=num_classes, **sized
            )
        except TypeError as error:
            raise ValueError(
                f"Expected no image_size for {name}, got {image_size} ({error}): it takes images "
                "of any size. Leave image_size out."
            ) from error
        if stem == "cifar":
            _give_cifar_stem(name, self.model)
        usual = timm.data.resolve_model_data_config(self.model)
        self.normalize = Normalize(mean or usual["mean"], std or usual["std"])

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs."""
        outputs: Tensor = self.model(self.normalize(images))
        return outputs


class Normalize(nn.Module):
    """Subtracts a mean and divides by a standard deviation, channel by channel.

    Both belong to the code, not to the weights: no checkpoint holds them.

    Args:
        mean: of each channel, in [0, 1].
        std: of each channel, positive.

    Shapes:
        ``(B, C, H, W) -> (B, C, H, W)``.

    Raises:
        ValueError: they have different lengths, or a deviation is not positive.

    >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(
                f"Expected a mean and a positive standard deviation for each channel, got {mean} "
                f"and {std}. Write e.g. mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]."
            )
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images."""
        return (images - self.mean) / self.std


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


def _timm() -> Any:
    """Return the package, which is an extra."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            not_installed("timm", "which has the network", "vision", error)
        ) from error
    return timm


def _give_cifar_stem(name: str, model: nn.Module) -> None:
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
