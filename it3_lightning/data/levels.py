"""Degrees of a shift: severities in the names of tests, and levels of lying outside a range."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from it3_lightning.data.settings import SEVERITIES, Severity

LEVELS = 5


def by_severity(shifts: Iterable[str], severity: Severity) -> dict[str, tuple[str, int]]:
    """Return shift and severity of every test on shifted samples, by the test's name.

    Args:
        shifts: names of the shifts.
        severity: 1 (weak) to 5 (strong), or ``"all"``: each in turn.

    >>> list(by_severity(["fog"], "all"))
    ['fog/1', 'fog/2', 'fog/3', 'fog/4', 'fog/5']
    """
    if severity != "all":
        return {name: (name, severity) for name in shifts}
    return {f"{name}/{level}": (name, level) for name in shifts for level in SEVERITIES}


def parted(name: str) -> tuple[str, int | None]:
    """Return shift and severity of a test's name; None for one that tells no severity.

    The levels of a range (:func:`level_names`) are other samples, and shifts of their own.

    >>> [parted(name) for name in ("fog/3", "shape_2", "clean")]
    [('fog', 3), ('shape_2', None), ('clean', None)]
    """
    shift, _, severity = name.rpartition("/")
    if not shift or severity not in map(str, SEVERITIES):
        return name, None
    return shift, int(severity)


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
