"""Geometry of wing profiles: NACA contours, perturbations of their nodes, and graphs of them.

A perturbation takes contours ``(B, N, 2)``, a size and a generator, as a poor measurement of the
same profile makes them; none changes the profile itself, so the target stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

_THICKNESS = (0.2969, -0.1260, -0.3516, 0.2843, -0.1036)  # of the square root of x, x, x^2, ...
_WAVES = 4  # along the contour


def contours(parameters: Tensor, nodes: int = 64) -> Tensor:
    r"""Return contours of NACA 4-digit profiles with real-valued digits, ``(B, N, 2)`` in chords.

    With the chord from (0, 0) to (1, 0), camber :math:`m` at :math:`x = p` and thickness :math:`t`,

    .. math::
        y_t &= 5 t (0.2969 \sqrt{x} - 0.1260 x - 0.3516 x^2 + 0.2843 x^3 - 0.1036 x^4) \\
        y_c &= \tfrac{m}{p^2} (2 p x - x^2) \text{ before } p, \quad
               \tfrac{m}{(1-p)^2} (1 - 2 p + 2 p x - x^2) \text{ behind it}

    the surfaces are :math:`(x \mp y_t \sin\theta, y_c \pm y_t \cos\theta)` with
    :math:`\tan\theta = dy_c / dx`. The nodes have cosine spacing,
    :math:`x_i = (1 + \cos(2 \pi i / N)) / 2`: from the trailing edge over the upper surface to the
    leading edge, and back along the lower one. The last node joins the first.

    Args:
        parameters: ``(B, 3)``: camber :math:`m \ge 0`, its position :math:`0 < p < 1` and thickness
            :math:`t > 0`, all as parts of the chord: NACA 2412 is ``(0.02, 0.4, 0.12)``.
        nodes: An even number ``N`` of at least 8.

    Source: E. N. Jacobs, K. E. Ward and R. M. Pinkerton, NACA Report 460 (1933); I. H. Abbott and
    A. E. von Doenhoff, "Theory of Wing Sections" (1959), section 6.4. The last coefficient there
    is -0.1015, which leaves the trailing edge open by 0.0021 t on either side.

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
    """Return outward unit normals of contours ``(B, N, 2)``, from each node's two neighbours."""
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


def noise(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Add Gaussian noise of standard deviation ``size``, in chords, to every node."""
    return contours + size * _normal(contours.shape, contours, generator)


def rotation(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Turn each profile around its quarter chord by an angle from ``U(-size, size)`` degrees."""
    draws = torch.rand(len(contours), generator=generator, dtype=contours.dtype)
    angles = math.radians(size) * (2 * draws - 1)
    cosine, sine = angles.cos(), angles.sin()
    turn = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    centre = torch.tensor([0.25, 0.0], dtype=contours.dtype)
    return (contours - centre) @ turn.mT + centre


def roughness(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Bend the contour in a few smooth waves of root mean square ``size``, in chords."""
    count, nodes = contours.shape[:2]
    turns = 2 * math.pi * torch.arange(nodes, dtype=contours.dtype) / nodes
    phases = turns[:, None] * torch.arange(1, _WAVES + 1)
    waves = torch.cat([phases.cos(), phases.sin()], dim=1)  # (N, 2 * _WAVES)
    amplitudes = _normal((count, 2 * _WAVES), contours, generator) / math.sqrt(_WAVES)
    return contours + size * (amplitudes @ waves.T)[..., None] * normals(contours)


def resampling(contours: Tensor, size: float, generator: Generator) -> Tensor:
    """Move each node towards the next one, by a part of the way from ``U(0, size)``."""
    parts = torch.rand((*contours.shape[:2], 1), generator=generator, dtype=contours.dtype)
    return contours + size * parts * (contours.roll(-1, dims=1) - contours)


def _normal(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype)


PERTURBATIONS: Mapping[str, tuple[Callable[[Tensor, float, Generator], Tensor], float]] = {
    "rotation": (rotation, 2.0),
    "roughness": (roughness, 0.003),
    "resampling": (resampling, 0.8),
}
"""Those for choosing settings alone, each with its size: no result is reported on them."""


class ContourGraphs(Dataset[tuple[Any, Tensor]]):
    """Closed contours as graphs of torch_geometric, and a target for each.

    Each node has the features x, y and the two parts of its outward normal; each edge, one in each
    direction between neighbours, the way from its first node to its second in mean steps of the
    contour. A sample is ``(graph, target)``; graphs themselves hold no target.
    """

    def __init__(self, contours: Tensor, targets: Tensor) -> None:
        try:
            from torch_geometric.data import Batch, Data
        except ImportError as error:
            raise ImportError(
                "Expected torch_geometric, which holds the graphs, but it cannot be imported. "
                "Install it with: pip install 'it3_lightning[graphs]', or take "
                "representation='contour'."
            ) from error
        edges = ring(contours.shape[1])
        nodes = torch.cat([contours, normals(contours)], dim=2).float()
        ways = steps(contours, edges).float()
        self.graphs = [
            Data(x=x, edge_index=edges, edge_attr=way) for x, way in zip(nodes, ways, strict=True)
        ]
        self.targets = targets.float()
        self._batch = Batch

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.graphs[index].clone(), self.targets[index].clone()

    def __getitems__(self, indices: list[int]) -> tuple[Any, Tensor]:
        """Return a whole batch: a ``Batch`` of graphs and ``(B, 1)`` targets."""
        chosen = [self.graphs[index] for index in indices]
        return self._batch.from_data_list(chosen), self.targets[torch.as_tensor(indices)]


def ring(nodes: int) -> Tensor:
    """Return the edges of a closed contour, ``(2, 2 * nodes)``: forth, then back."""
    here = torch.arange(nodes)
    there = here.roll(-1)
    return torch.stack([torch.cat([here, there]), torch.cat([there, here])])


def steps(contours: Tensor, edges: Tensor) -> Tensor:
    """Return the way along each edge ``(N, edges, 2)``, in mean steps of the contour."""
    forth = contours.roll(-1, dims=1) - contours
    mean = forth.norm(dim=2).mean(dim=1)[:, None, None]
    ways: Tensor = (contours[:, edges[1]] - contours[:, edges[0]]) / mean
    return ways
