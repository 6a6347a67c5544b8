"""Seeded image shifts in five severities: nine to evaluate on, seven others to tune on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from it3_lightning.data import shift_functions as functions
from it3_lightning.messages import unknown

_Function = Callable[[Tensor, float, Generator], Tensor]
_Levels = tuple[float, float, float, float, float]

_EVALUATION: Mapping[str, tuple[_Function, _Levels]] = MappingProxyType(
    {
        "gaussian_noise": (functions.gaussian_noise, (0.05, 0.1, 0.15, 0.25, 0.4)),
        "shot_noise": (functions.shot_noise, (0.05, 0.12, 0.25, 0.5, 1.0)),
        "impulse_noise": (functions.impulse_noise, (0.02, 0.04, 0.07, 0.12, 0.25)),
        "blur": (functions.blur, (0.6, 0.9, 1.25, 1.75, 2.5)),
        "contrast": (functions.contrast, (0.2, 0.3, 0.4, 0.6, 0.8)),
        "brightness": (functions.brightness, (0.05, 0.08, 0.12, 0.2, 0.35)),
        "pixelation": (functions.pixelation, (1.4, 1.8, 2.4, 3.2, 4.7)),
        "rotation": (functions.rotation, (10.0, 20.0, 30.0, 45.0, 60.0)),
        "fog": (functions.fog, (0.1, 0.17, 0.25, 0.4, 0.6)),
    }
)

_TUNING: Mapping[str, tuple[_Function, _Levels]] = MappingProxyType(
    {
        "speckle_noise": (functions.speckle_noise, (0.2, 0.4, 0.6, 0.9, 1.2)),
        "uniform_noise": (functions.uniform_noise, (0.1, 0.2, 0.3, 0.45, 0.7)),
        "motion_blur": (functions.motion_blur, (3.0, 5.0, 7.0, 10.0, 13.0)),
        "posterize": (functions.posterize, (3.0, 4.0, 5.0, 6.0, 7.0)),
        "gamma": (functions.gamma, (1.5, 2.0, 3.0, 4.5, 6.0)),
        "shear": (functions.shear, (10.0, 20.0, 30.0, 40.0, 50.0)),
        "occlusion": (functions.occlusion, (0.25, 0.375, 0.5, 0.625, 0.75)),
    }
)

_LENGTHS = ("blur", "motion_blur")  # whose levels are pixels of a 28-pixel image

SHIFTS: tuple[str, ...] = tuple(_EVALUATION)
"""The nine shifts that results are reported on."""

TUNING_SHIFTS: tuple[str, ...] = tuple(_TUNING)
"""Seven other shifts, only for choosing settings: no result is reported on them."""

_ALL = MappingProxyType({**_EVALUATION, **_TUNING})


@dataclass(frozen=True)
class Shift:
    """One kind of image shift at one severity, a pure function of the images and a generator.

    The kinds follow Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations" (ICLR 2019); the levels are set for 28-pixel images, and the
    lengths in them grow with the image, unless ``pixel`` says otherwise.

    Args:
        name: One of ``SHIFTS`` or ``TUNING_SHIFTS``.
        severity: 1 (weak) to 5 (strong).
        pixel: Pixels that stand for one of a 28-pixel image in the lengths of blurs, whatever the
            size of the image: for tiles, which show more when they are larger, not more closely.
            None: lengths grow with the image.

    Raises:
        ValueError: The name is unknown, the severity is not one of 1, 2, 3, 4, 5, or ``pixel`` is
            not positive.

    Example:
        >>> images = torch.full((1, 1, 2, 2), 0.5)
        >>> Shift("brightness", severity=3)(images)[0, 0, 0, 0].item()
        0.6200000047683716
    """

    name: str
    severity: int = 3
    pixel: float | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown name, a severity that is not an integer from 1 to 5, a bad pixel."""
        if self.name not in _ALL:
            raise ValueError(unknown("shift", self.name, _ALL))
        if type(self.severity) is not int or not 1 <= self.severity <= 5:
            raise ValueError(
                f"Expected severity to be one of 1, 2, 3, 4, 5, got {self.severity!r}. "
                "Give an integer: 1 is the weakest, 5 the strongest."
            )
        if self.pixel is not None and self.pixel <= 0:
            raise ValueError(f"Expected pixel > 0 or None, got {self.pixel}.")

    @property
    def level(self) -> float:
        """Strength at this severity, in the unit of the shift (degrees, deviation, share)."""
        return _ALL[self.name][1][self.severity - 1]

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Shift a batch of images.

        Args:
            images: ``(B, C, H, W)``, floating point, in [0, 1]. It is not changed.
            generator: Source of all randomness; the global random state is never touched. None
                stands for a new generator with seed 0, so that a call without one repeats.

        Returns:
            A new tensor ``(B, C, H, W)`` in [0, 1], of the images' dtype and on their device,
            computed in float32.

        Raises:
            ValueError: The images have another shape, dtype or range.
        """
        _check(images)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        if images.numel() == 0:
            return images.clone()
        shifted = _ALL[self.name][0](images.float(), self._level(images), generator)
        return shifted.clamp(0, 1).to(images.dtype)

    def _level(self, images: Tensor) -> float:
        """Return the level for these images, which the function scales by their size."""
        if self.pixel is None or self.name not in _LENGTHS:
            return self.level
        return self.level * self.pixel / functions.pixels(images, 1.0)


def _check(images: Tensor) -> None:
    """Refuse anything but a floating-point batch of images in [0, 1]."""
    if images.ndim != 4:
        raise ValueError(
            f"Expected images of shape (B, C, H, W), got {tuple(images.shape)}. "
            "Add the missing axes, e.g. images[:, None] for (B, H, W)."
        )
    if not images.is_floating_point():
        raise ValueError(
            f"Expected floating-point images in [0, 1], got {images.dtype}. "
            "Turn 8-bit images into floats: images.float() / 255."
        )
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"Expected values in [0, 1], got {images.min():.4g} to {images.max():.4g}. "
            "Apply a shift before normalisation, and to finite values only."
        )
