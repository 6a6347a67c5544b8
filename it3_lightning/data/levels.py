"""How far samples lie outside a range, and levels of that: equally many samples in each."""

from __future__ import annotations

from torch import Tensor

LEVELS = 5


def level_names(what: str) -> tuple[str, ...]:
    """Return the names of all levels.

    >>> level_names("shape")
    ('shape_1', 'shape_2', 'shape_3', 'shape_4', 'shape_5')
    """
    return tuple(f"{what}_{level}" for level in range(1, LEVELS + 1))


def outside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return how far samples lie outside a box: 0 inside, else in widths of the box.

    Args:
        values: ``(N, K)``.
        low: ``(K,)``, the box's lower end.
        high: ``(K,)``, its upper end.

    Returns:
        ``(N,)``, the Euclidean distance to the box, each of its ``K`` sides being 1 long.

    Example:
        >>> import torch
        >>> box = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0])
        >>> outside(torch.tensor([[0.5, 1.0], [4.0, 10.0]]), *box)
        tensor([0., 5.])
    """
    excess = (low - values).clamp_min(0) + (values - high).clamp_min(0)
    distance: Tensor = (excess / (high - low)).norm(dim=1)
    return distance


def levels(distance: Tensor, what: str, need: str) -> dict[str, Tensor]:
    """Return the samples outside a range by level, from near to far.

    Args:
        distance: ``(N,)``, 0 inside the range.
        what: goes before the level's number in its name.
        need: says what to do where there are too few samples.

    Returns:
        Indices by name, each ascending; the numbers of samples differ by one at most.

    Raises:
        ValueError: fewer samples than levels lie outside.

    Example:
        >>> import torch
        >>> levels(torch.tensor([0, 9.0, 0, 1, 3, 8, 5]), "far", "")["far_1"]
        tensor([3])
    """
    indices = distance.argsort(stable=True)
    indices = indices[distance[indices] > 0]
    if len(indices) < LEVELS:
        raise ValueError(
            f"Expected at least {LEVELS} samples outside the range of {what}, one for each level, "
            f"got {len(indices)}. {need}"
        )
    parts = indices.tensor_split(LEVELS)
    return {name: part.sort().values for name, part in zip(level_names(what), parts, strict=True)}
