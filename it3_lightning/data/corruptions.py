"""Adapter: the common corruptions of Hendrycks and Dietterich, made by ``imagecorruptions``.

The mean corruption error, by which they are reported, stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from it3_lightning.data.shifts import check_severity
from it3_lightning.utils.messages import not_installed, unknown

CORRUPTIONS: tuple[str, ...] = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
    *("motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
)
"""The fifteen corruptions of CIFAR-10-C and ImageNet-C that results are reported on."""
EXTRA_CORRUPTIONS: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four that their authors set aside for choosing settings: no result is reported on them."""
_ERRORS = (
    *(88.6428, 89.4468, 92.2640, 81.9880, 82.6268, 78.5948, 79.8360, 86.6816, 82.6572, 81.9324),
    *(56.4592, 85.3204, 64.6056, 71.7840, 60.6500),
)
ALEXNET_ERRORS: Mapping[str, float] = MappingProxyType(dict(zip(CORRUPTIONS, _ERRORS, strict=True)))
"""Top-1 errors of AlexNet on ImageNet-C in per cent, each the mean over five severities.

Source: D. Hendrycks and T. Dietterich (ICLR 2019), whose table rounds them; with four digits as in
the code of D. Hendrycks et al., "AugMix" (ICLR 2020).
"""
_OWN_SEED = ("impulse_noise", "glass_blur")  # the rest draw from NumPy's global state
_Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Corruption:
    """A common corruption at one severity, made by the package ``imagecorruptions-imaug``.

    The levels are those of ImageNet-C, too strong for images as small as CIFAR's. Motion blur, snow
    and elastic transforms differ a little from the published files, and nothing is stored as JPEG
    in between: for numbers to compare with published ones, use these files.

    Args:
        name: One of ``CORRUPTIONS`` or ``EXTRA_CORRUPTIONS``.
        severity: 1 (weak) to 5 (strong).

    Raises:
        ValueError: The name or the severity is unknown.

    Example:
        >>> images = torch.full((1, 3, 32, 32), 0.2)
        >>> Corruption("brightness", 3)(images)[0, 0, 0, 0].item()  # 0.3 brighter, cut to 8 bits
        0.49803921580314636
    """

    name: str
    severity: int

    def __post_init__(self) -> None:
        known = CORRUPTIONS + EXTRA_CORRUPTIONS
        if self.name not in known:
            raise ValueError(unknown("corruption", self.name, known))
        check_severity(self.severity)

    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Corrupt images ``(B, 3, H, W)`` in [0, 1], of at least 32 pixels a side.

        The generator seeds all randomness; None stands for a new one with seed 0.

        Returns:
            A new float32 tensor ``(B, 3, H, W)``, in multiples of 1/255.

        Raises:
            ImportError: The package is not installed.
            ValueError: The images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
            raise ValueError(
                "Expected colour images (B, 3, H, W) of at least 32 pixels a side, got "
                f"{tuple(images.shape)}. Use larger images, or the library's own shifts."
            )
        corrupt, generator = corrupting(), generator or Generator().manual_seed(0)
        seeds = torch.randint(2**31, (len(images),), generator=generator).tolist()
        pixels = (images * 255).round().to(torch.uint8).movedim(1, -1).numpy()
        before, changed = np.random.get_state(), []
        try:
            for image, seed in zip(pixels, seeds, strict=True):
                np.random.seed(seed)
                own = {"seed": seed} if self.name in _OWN_SEED else {}
                changed.append(corrupt(image, self.severity, self.name, **own))
        finally:
            np.random.set_state(before)
        return torch.from_numpy(np.stack(changed)).movedim(-1, 1).contiguous().float() / 255


def corrupting() -> Callable[..., _Pixels]:
    """Return the package's function."""
    try:
        from imagecorruptions import corrupt
    except ImportError as error:
        message = not_installed("imagecorruptions-imaug", "for corruptions", "vision", error)
        if "libGL" in str(error):  # OpenCV of a desktop on a server
            message += ", and then: pip install opencv-python-headless"
        raise ImportError(message) from error
    function: Callable[..., _Pixels] = corrupt
    return function


def mean_corruption_error(
    errors: Mapping[str, float], baseline_errors: Mapping[str, float] = ALEXNET_ERRORS
) -> float:
    r"""Return the mean over corruptions of the error in per cent of the baseline's.

    :math:`mCE = 100 / |C| \sum_c (\sum_s E_{s,c}) / (\sum_s E^\mathrm{AlexNet}_{s,c})` with
    corruptions :math:`c` and severities :math:`s`.

    Args:
        errors: Of a network by corruption, each the mean over severities 1 to 5, in per cent.
        baseline_errors: The same of the network that counts as 100.

    Raises:
        ValueError: There are errors of other corruptions than the baseline's.

    Source: D. Hendrycks and T. Dietterich (ICLR 2019), section 4.3.

    >>> mean_corruption_error({"fog": 30.0, "snow": 80.0}, {"fog": 60.0, "snow": 80.0})
    75.0
    """
    if set(errors) != set(baseline_errors):
        raise ValueError(
            f"Expected errors of {', '.join(baseline_errors)}, got those of {', '.join(errors)}. "
            "Give the error of each corruption of the baseline, and no other."
        )
    ratios = [errors[name] / baseline_errors[name] for name in baseline_errors]
    return 100 * sum(ratios) / len(ratios)
