r"""TTT-MAE: test-time training on the reconstruction of masked patches.

At test time :math:`\min_f \ell_s(g \circ f(\mathrm{mask}(x)), x)`, the squared error over the
masked patches; the decoder :math:`g` stays, and the main head predicts from :math:`f(x)`
(Gandelsman et al., Test-Time Training with Masked Autoencoders, NeurIPS 2022, after He et al., CVPR
2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.methods.auxiliary import Auxiliary, Features, images_of, perceptron
from it3_lightning.methods.base import Objective, Passes
from it3_lightning.methods.rotation import TTT


class MaskedPatches(Auxiliary):
    """Reconstructs patches that are masked: set to zero, so that any network takes the image.

    The decoder sees each patch's position in the features, no other; a masked autoencoder leaves
    masked tokens out, and has a transformer as decoder.

    Args:
        layer: name of the layer whose features the decoder sees: maps, or tokens, of which the last
            ones are the patches, row by row.
        channels: width of the layer's output.
        image_channels: of the images.
        patch: side of a patch, in pixels.
        share: of the patches that are masked.
        hidden: width of the decoder.

    Shapes:
        images ``(B, C, H, W)``, ``H`` and ``W`` multiples of ``patch``; features
        ``(B, C, h, w)``, ``(B, h, w, C)``, brought to the grid of patches, or ``(B, T, C)``.

    Raises:
        ValueError: sizes that make no sense, no patch would be masked or seen, or the features have
            no positions.

    >>> head = MaskedPatches("layer", channels=1, image_channels=1, patch=2)
    >>> for parameter in head.parameters():
    ...     _ = torch.nn.init.zeros_(parameter)
    >>> head(2 * torch.ones(2, 1, 4, 4), lambda masked: masked).tolist()  # (0 - 2)^2
    [4.0, 4.0]
    """

    def __init__(
        self,
        layer: str,
        channels: int,
        image_channels: int = 3,
        patch: int = 16,
        share: float = 0.75,
        hidden: int = 128,
    ) -> None:
        super().__init__(layer, channels)
        if patch < 1 or not 0 < share < 1:
            raise ValueError(f"Expected patch >= 1 and share in (0, 1), got {patch} and {share}.")
        self.image_channels, self.patch, self.share = image_channels, patch, share
        self.hidden = hidden
        self.head = perceptron(channels, hidden, image_channels * patch**2)

    def forward(
        self, inputs: Any, features: Features, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the mean squared error over the masked patches, ``(B,)``."""
        images = images_of(self, inputs)
        masked = self.masked(images, generator)  # (B, N)
        rows, columns = self._grid(images)
        pixels = masked.view(-1, 1, rows, columns).float()
        pixels = F.interpolate(pixels, scale_factor=float(self.patch), mode="nearest")
        found = features(images.masked_fill(pixels.bool(), 0.0))
        decoded = self.head(self._at_patches(found, rows, columns))
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        errors = (decoded - patches).square().mean(2)
        loss: Tensor = errors.masked_fill(~masked, 0.0).sum(1) / masked.sum(1)
        return loss

    def masked(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return which patches are masked, ``(B, N)`` booleans: those with the least numbers drawn.

        Raises:
            ValueError: none is, or all are.
        """
        rows, columns = self._grid(images)
        count = round(self.share * rows * columns)
        if not 0 < count < rows * columns:
            raise ValueError(
                f"Expected some of the {rows * columns} patches to be masked and some not, got "
                f"{count} masked with share={self.share}. Give a smaller patch, or another share."
            )
        drawn = torch.rand(len(images), rows * columns, generator=generator)
        return (drawn.argsort(1).argsort(1) < count).to(images.device)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Return the number of rows and columns of patches."""
        channels, height, width = images.shape[1:]
        if channels != self.image_channels or height % self.patch or width % self.patch:
            raise ValueError(
                f"Expected images (B, {self.image_channels}, H, W) with H and W multiples of "
                f"{self.patch}, got {tuple(images.shape)}. Give image_channels and patch that fit."
            )
        return height // self.patch, width // self.patch

    def _at_patches(self, features: Any, rows: int, columns: int) -> Tensor:
        """Return the features of every patch, ``(B, N, channels)``."""
        positions = self.positions(features)
        if positions.ndim == 4:
            maps = F.adaptive_avg_pool2d(positions.movedim(-1, 1), (rows, columns))
            return maps.flatten(2).transpose(1, 2)
        if positions.ndim != 3 or positions.shape[1] < rows * columns:
            raise ValueError(
                f"Expected layer {self.layer!r} to put out maps, or tokens of {rows * columns} "
                f"patches, got {tuple(positions.shape)}. Name a layer before positions are lost."
            )
        return positions[:, -rows * columns :]

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("layer", "channels", "image_channels", "patch", "share", "hidden")
        return {name: getattr(self, name) for name in names}


@dataclass
class TTTMAE(TTT):
    """Test-time training with masked autoencoders (Gandelsman et al., NeurIPS 2022).

    Steps on :class:`MaskedPatches`: every sample by itself, 20 steps from the source, each on the
    mean over many masks of the same image, by SGD with momentum. The paper masks random parts of
    the test image besides.

    Args:
        masks: number of masks in a step.
        seed: of the masks; each step draws others.

    Raises:
        ValueError: fewer than one mask, or the module has no such head.

    >>> TTTMAE().defaults["steps"]
    20
    """

    masks: int = 128
    head: ClassVar[type[Auxiliary]] = MaskedPatches
    defaults: ClassVar[Mapping[str, Any]] = {
        **TTT.defaults,
        "steps": 20,
        "optimizer": "momentum",
        "lr": 5e-3,
    }

    def __post_init__(self) -> None:
        if self.masks < 1:
            raise ValueError(f"Expected at least one mask, got {self.masks}.")

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the error of the reconstruction, the mean over the masks."""
        inputs = passes.inputs
        views = inputs.repeat_interleave(self.masks, 0) if isinstance(inputs, Tensor) else inputs
        measure = self.auxiliary_loss(passes, views).view(-1, self.masks).mean(1)
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))
