"""Any of timm's networks, by name, with its normalisation inside and a stem for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from it3_lightning.networks.normalize import Normalize
from it3_lightning.networks.stems import give_cifar_stem
from it3_lightning.utils.messages import not_installed, unknown


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
            give_cifar_stem(name, self.model)
        usual = timm.data.resolve_model_data_config(self.model)
        self.normalize = Normalize(mean or usual["mean"], std or usual["std"])

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs."""
        outputs: Tensor = self.model(self.normalize(images))
        return outputs


def _timm() -> Any:
    """Return the package, which is an extra."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            not_installed("timm", "which has the network", "vision", error)
        ) from error
    return timm
