"""A small convolutional network with BatchNorm, whose dense layers have names to inject at."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SmallCNN(nn.Module):
    """Two strided convolutions with BatchNorm, two dense layers, a linear head.

    Args:
        in_channels: of the images.
        num_classes: outputs ``C``.
        image_size: height and width of the images, in pixels.
        width: channels of the first convolution; the second has twice as many.
        hidden: features of the first dense layer; the second has half as many.

    Shapes:
        ``(B, in_channels, image_size, image_size) -> (B, C)`` logits.

    >>> import torch
    >>> SmallCNN(1, 10, 28)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        *,
        width: int = 16,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"Expected images of at least 4 pixels, got {image_size}.")
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 5, stride=2, padding=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
        )
        quarter = (image_size + 3) // 4
        self.dense1 = nn.Linear(2 * width * quarter**2, hidden)
        self.dense2 = nn.Linear(hidden, hidden // 2)
        self.head = nn.Linear(hidden // 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        hidden = F.relu(self.dense1(self.features(images)))
        logits: Tensor = self.head(F.relu(self.dense2(hidden)))
        return logits
