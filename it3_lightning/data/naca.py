"""NACA 4-digit wing profiles: a closed contour from camber, its position and thickness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PARAMETERS = ("camber", "position", "thickness")

_THICKNESS = (0.2969, -0.1260, -0.3516, 0.2843, -0.1036)  # of the square root of x, x, x^2, ...


def contours(parameters: Tensor, nodes: int = 64) -> Tensor:
    r"""Return the contours of NACA 4-digit profiles with real-valued digits.

    With the chord from (0, 0) to (1, 0), camber :math:`m` at :math:`x = p` and thickness :math:`t`,

    .. math::
        y_t &= 5 t (0.2969 \sqrt{x} - 0.1260 x - 0.3516 x^2 + 0.2843 x^3 - 0.1036 x^4) \\
        y_c &= \tfrac{m}{p^2} (2 p x - x^2) \text{ before } p, \quad
               \tfrac{m}{(1-p)^2} (1 - 2 p + 2 p x - x^2) \text{ behind it}

    the upper surface is :math:`(x - y_t \sin\theta, y_c + y_t \cos\theta)` and the lower one
    :math:`(x + y_t \sin\theta, y_c - y_t \cos\theta)`, with :math:`\tan\theta = dy_c / dx`. The
    nodes have cosine spacing, :math:`x_i = (1 + \cos(2 \pi i / N)) / 2`: from the trailing edge
    over the upper surface to the leading edge, and back along the lower one. The last node joins
    the first.

    Args:
        parameters: ``(B, 3)``: camber :math:`m \ge 0`, its position :math:`0 < p < 1` and thickness
            :math:`t > 0`, all as parts of the chord: NACA 2412 is ``(0.02, 0.4, 0.12)``.
        nodes: an even number ``N`` of at least 8.

    Returns:
        ``(B, N, 2)``: the nodes' x and y, in chords, of the parameters' dtype.

    Raises:
        ValueError: a shape, a parameter or the number of nodes is another.

    Source: E. N. Jacobs, K. E. Ward and R. M. Pinkerton, NACA Report 460 (1933); I. H. Abbott and
    A. E. von Doenhoff, "Theory of Wing Sections" (1959), section 6.4. The last coefficient there
    is -0.1015, which leaves the trailing edge open by 0.0021 t on either side.

    Example:
        >>> profile = contours(torch.tensor([[0.02, 0.4, 0.12]]), nodes=8)[0]
        >>> round((profile[2, 1] - profile[6, 1]).item(), 4)  # upper less lower, at half the chord
        0.1057
    """
    _check(parameters, nodes)
    m, p, t = (column[:, None] for column in parameters.unbind(1))
    index = torch.arange(nodes, device=parameters.device)
    turns = torch.minimum(index, nodes - index).to(parameters) / nodes  # the same on both sides
    x = ((1 + torch.cos(2 * math.pi * turns)) / 2).expand(len(parameters), nodes)
    powers = (x.sqrt(), x, x**2, x**3, x**4)
    half = 5 * t * sum(c * power for c, power in zip(_THICKNESS, powers, strict=True))
    side = torch.where(index <= nodes // 2, half, -half)
    line = torch.where(x < p, m / p**2, m / (1 - p) ** 2)
    camber = line * torch.where(x < p, 2 * p * x - x**2, 1 - 2 * p + 2 * p * x - x**2)
    angle = torch.atan(2 * line * (p - x))
    return torch.stack([x - side * angle.sin(), camber + side * angle.cos()], dim=2)


def normals(profiles: Tensor) -> Tensor:
    """Return the outward unit normals of contours ``(B, N, 2)``, from each node's two neighbours.

    Example:
        >>> profile = contours(torch.tensor([[0.0, 0.4, 0.12]]), nodes=8)
        >>> normals(profile)[0, 4, 0].item()  # at the leading edge, against the flow
        -1.0
    """
    along = profiles.roll(-1, dims=1) - profiles.roll(1, dims=1)
    outward = torch.stack([along[..., 1], -along[..., 0]], dim=2)
    units: Tensor = outward / outward.norm(dim=2, keepdim=True).clamp_min(1e-12)
    return units


def _check(parameters: Tensor, nodes: int) -> None:
    """Refuse what describes no profile."""
    if parameters.ndim != 2 or parameters.shape[1] != 3 or not parameters.is_floating_point():
        raise ValueError(
            "Expected floating-point parameters (B, 3): camber, position, thickness; got "
            f"{tuple(parameters.shape)} of {parameters.dtype}."
        )
    if type(nodes) is not int or nodes < 8 or nodes % 2:
        raise ValueError(f"Expected an even number of nodes, 8 or more, got {nodes!r}.")
    m, p, t = parameters.unbind(1)
    right = (m >= 0) & (p > 0) & (p < 1) & (t > 0)
    if not bool(right.all()):
        raise ValueError(
            "Expected camber >= 0, 0 < position < 1 and thickness > 0, as parts of the chord, got "
            f"{parameters[~right][0].tolist()}. NACA 2412 is [0.02, 0.4, 0.12]."
        )
