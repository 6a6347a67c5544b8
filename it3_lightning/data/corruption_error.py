"""The mean corruption error of ImageNet-C: errors beside those of AlexNet."""

from collections.abc import Mapping
from types import MappingProxyType

ALEXNET_ERRORS: Mapping[str, float] = MappingProxyType(
    {
        "gaussian_noise": 88.6428,
        "shot_noise": 89.4468,
        "impulse_noise": 92.2640,
        "defocus_blur": 81.9880,
        "glass_blur": 82.6268,
        "motion_blur": 78.5948,
        "zoom_blur": 79.8360,
        "snow": 86.6816,
        "frost": 82.6572,
        "fog": 81.9324,
        "brightness": 56.4592,
        "contrast": 85.3204,
        "elastic_transform": 64.6056,
        "pixelate": 71.7840,
        "jpeg_compression": 60.6500,
    }
)
"""Top-1 errors of AlexNet on ImageNet-C in per cent, each the mean over five severities.

Source: D. Hendrycks and T. Dietterich (ICLR 2019), whose table rounds them; with four digits as in
the code of D. Hendrycks et al., "AugMix" (ICLR 2020).
"""


def mean_corruption_error(
    errors: Mapping[str, float], baseline_errors: Mapping[str, float] = ALEXNET_ERRORS
) -> float:
    r"""Return the mean over corruptions of the error in per cent of the baseline's.

    :math:`mCE = 100 / |C| \sum_c (\sum_s E_{s,c}) / (\sum_s E^\mathrm{AlexNet}_{s,c})` with
    corruptions :math:`c` and severities :math:`s`; smaller is better.

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
