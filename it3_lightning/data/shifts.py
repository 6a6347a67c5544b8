"""Registry of image shifts: each kind by name, with its level at five severities.

A shift function takes images ``(B, C, H, W)``, float32 in [0, 1], a ``level`` in the unit that is
told beside it, and the generator of all its randomness; :class:`Shift` clamps what it returns.
Lengths are in pixels of a 28-pixel image and grow with the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from it3_lightning.utils.messages import unknown

BILINEAR = InterpolationMode.BILINEAR
Severity = int | Literal["all"]
SEVERITIES = (1, 2, 3, 4, 5)
Kinds = Mapping[str, tuple[Callable[..., Any], tuple[float, float, float, float, float]]]


def parted(name: str) -> tuple[str, int | None]:
    """Return shift and severity of a test's name; None for one that tells no severity.

    >>> [parted(name) for name in ("fog/3", "shape_2", "clean")]
    [('fog', 3), ('shape_2', None), ('clean', None)]
    """
    shift, _, severity = name.rpartition("/")
    known = bool(shift) and severity in map(str, SEVERITIES)
    return (shift, int(severity)) if known else (name, None)


def check_severity(severity: object) -> None:
    """Refuse what is not an integer from 1 to 5."""
    if type(severity) is not int or severity not in SEVERITIES:
        raise ValueError(
            f"Expected severity to be one of 1, 2, 3, 4, 5, got {severity!r}. "
            "Give an integer: 1 is the weakest, 5 the strongest."
        )


@dataclass(frozen=True)
class KindOfShift:
    """One kind of shift at one severity."""

    KINDS: ClassVar[Kinds]

    name: str
    severity: int = 3

    def __post_init__(self) -> None:
        if self.name not in self.KINDS:
            raise ValueError(unknown("shift", self.name, self.KINDS))
        check_severity(self.severity)

    @property
    def level(self) -> float:
        """Strength at this severity, in the unit of the shift (degrees, deviation, share)."""
        return self.KINDS[self.name][1][self.severity - 1]


def _uniform(images: Tensor, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw from [0, 1) on the generator's device, so that the images' device changes nothing."""
    return torch.rand(shape, generator=generator, device=generator.device).to(images.device)


def _normal(images: Tensor, generator: Generator) -> Tensor:
    """Draw one standard normal number per pixel, likewise."""
    return torch.randn(images.shape, generator=generator, device=generator.device).to(images.device)


def _either(first: Tensor, second: Tensor, generator: Generator) -> Tensor:
    """Take each image from one of two batches, by a fair coin per image."""
    return torch.where(_uniform(first, (len(first), 1, 1, 1), generator) < 0.5, first, second)


def _pixels(images: Tensor, length: float) -> float:
    """Scale a length from a 28-pixel image to this one; below 14 pixels the factor stays 1/2."""
    return length * max(min(images.shape[-2:]) / 28, 0.5)


def shot_noise(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Count photons; a white pixel expects ``1 / level`` of them."""
    photons = (images / level).to(generator.device)
    return torch.poisson(photons, generator=generator).to(images.device) * level


def impulse_noise(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Set a share ``level`` of all values to black or white, half of them each."""
    draw = _uniform(images, tuple(images.shape), generator)
    salted = torch.where(draw > 1 - level / 2, 1.0, images)
    return torch.where(draw < level / 2, 0.0, salted)


def blur(images: Tensor, level: float, _: Generator) -> Tensor:
    """Blur with a Gaussian; ``level`` is its sigma in pixels of a 28-pixel image."""
    sigma = _pixels(images, level)
    reach = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)
    size = 2 * reach + 1
    blurred: Tensor = tv.gaussian_blur(images, [size, size], [sigma, sigma])
    return blurred


def contrast(images: Tensor, level: float, _: Generator) -> Tensor:
    """Pull every value towards the mean of its image; ``level`` is the share taken away."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (1 - level) * (images - mean)


def pixelation(images: Tensor, level: float, _: Generator) -> Tensor:
    """Show the image in ``level`` times fewer pixels a side, and in more below 28 pixels."""
    block = 1 + (level - 1) * min(_pixels(images, 1.0), 1.0)
    rows, columns = (_mosaic(size, max(1, round(size / block))) for size in images.shape[-2:])
    return rows.to(images.device) @ images @ columns.to(images.device).T


def _mosaic(size: int, blocks: int) -> Tensor:
    """Matrix ``(size, size)`` that averages over equal blocks; a pixel on an edge gets both."""
    edges = torch.linspace(0, size, blocks + 1)[:, None]
    pixels = torch.arange(size)
    overlap = torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)
    overlap = overlap.clamp(min=0)  # (blocks, size)
    return overlap.T @ (overlap * blocks / size)


def rotation(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Turn each image by ``level`` degrees, left or right by chance; corners become black."""
    left, right = (tv.rotate(images, sign * level, BILINEAR) for sign in (1, -1))
    return _either(left, right, generator)


def fog(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Blend to white through a smooth random veil; ``level`` is its opacity where thickest."""
    coarse = _uniform(images, (images.shape[0], 1, 4, 4), generator)
    veil = tv.resize(coarse, list(images.shape[-2:]), InterpolationMode.BICUBIC)
    opacity: Tensor = level * veil.clamp(0, 1)
    return images + opacity * (1 - images)


def motion_blur(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Smear each image along a random direction, over ``level`` pixels of a 28-pixel image."""
    height, width = images.shape[-2:]
    length = _pixels(images, level)
    angle = math.pi * _uniform(images, (images.shape[0],), generator)
    step = torch.stack([angle.cos() / width, angle.sin() / height], dim=1)  # (B, 2), half-pixels
    still = torch.eye(2, device=images.device).expand(images.shape[0], 2, 2)
    taps = torch.linspace(-length, length, 2 * math.ceil(length / 2) + 1).tolist()
    smeared = torch.zeros_like(images)
    for tap in taps:
        theta = torch.cat([still, (tap * step)[:, :, None]], dim=2)
        grid = affine_grid(theta, list(images.shape), align_corners=False)
        smeared += grid_sample(images, grid, padding_mode="border", align_corners=False)
    return smeared / len(taps)


def shear(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Slant each image by ``level`` degrees, left or right by chance."""
    how: Any = partial(tv.affine, images, 0.0, [0, 0], 1.0, interpolation=BILINEAR)
    return _either(how(shear=[level, 0.0]), how(shear=[-level, 0.0]), generator)


def occlusion(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Lay a grey square on a random place; its side is ``level`` times the shorter side."""
    height, width = images.shape[-2:]
    side = max(1, round(level * min(height, width)))
    corner = _uniform(images, (images.shape[0], 2), generator)
    inside = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=images.device)
    for axis, (size, shape) in enumerate(((height, (1, 1, -1, 1)), (width, (1, 1, 1, -1)))):
        start = (corner[:, axis] * (size - side + 1)).floor().view(-1, 1, 1, 1)
        place = torch.arange(size, device=images.device).view(shape)
        inside = inside & (place >= start) & (place < start + side)
    return torch.where(inside, 0.5, images)


_EVALUATION: Kinds = {
    # the standard deviation of normal noise
    "gaussian_noise": (lambda x, level, g: x + level * _normal(x, g), (0.05, 0.1, 0.15, 0.25, 0.4)),
    "shot_noise": (shot_noise, (0.05, 0.12, 0.25, 0.5, 1.0)),
    "impulse_noise": (impulse_noise, (0.02, 0.04, 0.07, 0.12, 0.25)),
    "blur": (blur, (0.6, 0.9, 1.25, 1.75, 2.5)),
    "contrast": (contrast, (0.2, 0.3, 0.4, 0.6, 0.8)),
    # added to every value
    "brightness": (lambda x, level, _: x + level, (0.05, 0.08, 0.12, 0.2, 0.35)),
    "pixelation": (pixelation, (1.4, 1.8, 2.4, 3.2, 4.7)),
    "rotation": (rotation, (10.0, 20.0, 30.0, 45.0, 60.0)),
    "fog": (fog, (0.1, 0.17, 0.25, 0.4, 0.6)),
}
_TUNING: Kinds = {
    # the standard deviation of normal noise at white, in proportion to the value
    "speckle_noise": (lambda x, level, g: x + level * x * _normal(x, g), (0.2, 0.4, 0.6, 0.9, 1.2)),
    # the reach of uniform noise to both sides
    "uniform_noise": (
        lambda x, level, g: x + level * (2 * _uniform(x, tuple(x.shape), g) - 1),
        (0.1, 0.2, 0.3, 0.45, 0.7),
    ),
    "motion_blur": (motion_blur, (3.0, 5.0, 7.0, 10.0, 13.0)),
    # how many of 8 bits are dropped
    "posterize": (lambda x, level, _: tv.posterize(x, 8 - round(level)), (3.0, 4.0, 5.0, 6.0, 7.0)),
    # the power of every value, which darkens the mid-tones
    "gamma": (lambda x, level, _: x**level, (1.5, 2.0, 3.0, 4.5, 6.0)),
    "shear": (shear, (10.0, 20.0, 30.0, 40.0, 50.0)),
    "occlusion": (occlusion, (0.25, 0.375, 0.5, 0.625, 0.75)),
}
_LENGTHS = ("blur", "motion_blur")  # whose levels are pixels of a 28-pixel image
SHIFTS: tuple[str, ...] = tuple(_EVALUATION)
"""The nine shifts that results are reported on."""
TUNING_SHIFTS: tuple[str, ...] = tuple(_TUNING)
"""Seven other shifts, only for choosing settings: no result is reported on them."""


@dataclass(frozen=True)
class Shift(KindOfShift):
    """One kind of image shift at one severity, a pure function of the images and a generator.

    The kinds follow Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations" (ICLR 2019); the levels are set for 28-pixel images.

    Args:
        name: One of ``SHIFTS`` or ``TUNING_SHIFTS``.
        severity: 1 (weak) to 5 (strong).
        pixel: Pixels that stand for one of a 28-pixel image in the lengths of blurs, whatever the
            size of the image: for tiles, which show more when they are larger, not more closely.
            None: lengths grow with the image.

    Raises:
        ValueError: A setting is unknown or out of its range.

    Example:
        >>> images = torch.full((1, 1, 2, 2), 0.5)
        >>> Shift("brightness", severity=3)(images)[0, 0, 0, 0].item()
        0.6200000047683716
    """

    KINDS: ClassVar[Kinds] = {**_EVALUATION, **_TUNING}

    pixel: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixel is not None and self.pixel <= 0:
            raise ValueError(f"Expected pixel > 0 or None, got {self.pixel}.")

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Shift a batch of images.

        Args:
            images: ``(B, C, H, W)``, floating point, in [0, 1].
            generator: Source of all randomness, never the global state; None for a new one with
                seed 0.

        Returns:
            A new tensor ``(B, C, H, W)`` in [0, 1], of the images' dtype and on their device,
            computed in float32.

        Raises:
            ValueError: The images have another shape, dtype or range.
        """
        _check(images)
        if images.numel() == 0:
            return images.clone()
        level = self.level
        if self.pixel is not None and self.name in _LENGTHS:  # which scale it by the image's size
            level = level * self.pixel / _pixels(images, 1.0)
        generator = generator or Generator().manual_seed(0)
        shifted: Tensor = self.KINDS[self.name][0](images.float(), level, generator)
        return shifted.clamp(0, 1).to(images.dtype)


def _check(images: Tensor) -> None:
    """Refuse anything but a floating-point batch of images in [0, 1]."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"Expected floating-point images (B, C, H, W) in [0, 1], got {tuple(images.shape)} of "
            f"{images.dtype}. Add the missing axes; turn 8 bits into floats: images.float() / 255."
        )
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"Expected values in [0, 1], got {images.min():.4g} to {images.max():.4g}. "
            "Apply a shift before normalisation, and to finite values only."
        )
