"""What each shift does to an image, as a pure function of the images, one level and a generator.

Every function takes images ``(B, C, H, W)``, float32 in [0, 1], a ``level`` in the unit its
docstring names, and the generator that all of its randomness comes from. It returns a tensor of
the same shape that may leave [0, 1]; :class:`~it3_lightning.data.shifts.Shift` clamps it, and
holds the five levels of each. Lengths are in pixels of a 28-pixel image and grow with the image.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

BILINEAR = InterpolationMode.BILINEAR


def _uniform(images: Tensor, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw from [0, 1) on the generator's device, so that the images' device changes nothing."""
    return torch.rand(shape, generator=generator, device=generator.device).to(images.device)


def _normal(images: Tensor, generator: Generator) -> Tensor:
    """Draw one standard normal number per pixel."""
    draw = torch.randn(images.shape, generator=generator, device=generator.device)
    return draw.to(images.device)


def _either(first: Tensor, second: Tensor, generator: Generator) -> Tensor:
    """Take each image from one of two batches, by a fair coin per image."""
    coin = _uniform(first, (first.shape[0], 1, 1, 1), generator)
    return torch.where(coin < 0.5, first, second)


def pixels(images: Tensor, length: float) -> float:
    """Scale a length from a 28-pixel image to this one.

    Below 14 pixels the factor stays 1/2: a blur of a fifth of a pixel would change nothing.
    """
    return length * max(min(images.shape[-2:]) / 28, 0.5)


def gaussian_noise(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Add normal noise; ``level`` is its standard deviation."""
    return images + level * _normal(images, generator)


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
    sigma = pixels(images, level)
    reach = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)
    size = 2 * reach + 1
    blurred: Tensor = tv.gaussian_blur(images, [size, size], [sigma, sigma])
    return blurred


def contrast(images: Tensor, level: float, _: Generator) -> Tensor:
    """Pull every value towards the mean of its image; ``level`` is the share taken away."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (1 - level) * (images - mean)


def brightness(images: Tensor, level: float, _: Generator) -> Tensor:
    """Add ``level`` to every value."""
    return images + level


def pixelation(images: Tensor, level: float, _: Generator) -> Tensor:
    """Show the image in ``level`` times fewer pixels a side.

    Below 28 pixels the excess over 1 shrinks with the image, at most to a half of itself.
    """
    block = 1 + (level - 1) * min(pixels(images, 1.0), 1.0)
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


def speckle_noise(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Add normal noise in proportion to the value; ``level`` is its deviation at white."""
    return images + level * images * _normal(images, generator)


def uniform_noise(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Add noise that is uniform between ``-level`` and ``level``."""
    return images + level * (2 * _uniform(images, tuple(images.shape), generator) - 1)


def motion_blur(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Smear each image along a random direction, over ``level`` pixels of a 28-pixel image."""
    height, width = images.shape[-2:]
    length = pixels(images, level)
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


def posterize(images: Tensor, level: float, _: Generator) -> Tensor:
    """Drop the lowest ``level`` of 8 bits."""
    coarse: Tensor = tv.posterize(images, 8 - round(level))
    return coarse


def gamma(images: Tensor, level: float, _: Generator) -> Tensor:
    """Raise every value to the power ``level``, which darkens the mid-tones."""
    return images**level


def shear(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Slant each image by ``level`` degrees, left or right by chance."""
    left, right = (
        tv.affine(images, 0.0, [0, 0], 1.0, [sign * level, 0.0], interpolation=BILINEAR)
        for sign in (1, -1)
    )
    return _either(left, right, generator)


def occlusion(images: Tensor, level: float, generator: Generator) -> Tensor:
    """Lay a grey square on a random place; its side is ``level`` times the shorter side."""
    height, width = images.shape[-2:]
    side = max(1, round(level * min(height, width)))
    corner = _uniform(images, (images.shape[0], 2), generator)
    top = (corner[:, 0] * (height - side + 1)).floor().view(-1, 1, 1, 1)
    left = (corner[:, 1] * (width - side + 1)).floor().view(-1, 1, 1, 1)
    row = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    column = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    inside = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return torch.where(inside, 0.5, images)
