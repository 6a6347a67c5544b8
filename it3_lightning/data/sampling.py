"""Seeded choices of samples: a generator from words, a subset, a stream of unequal classes."""

import hashlib

import torch
from torch import Generator, Tensor


def seeded(*parts: object) -> Generator:
    """Return a CPU generator whose state depends on the text of ``parts`` alone.

    The seed is a hash that is the same in every process and on every machine (Python's own
    ``hash`` of a string is not).

    >>> seeded(0, "fog", 3).initial_seed()
    276838438
    """
    text = "|".join(str(part) for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def subset(count: int, size: int, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Choose ``size`` of ``count`` samples at random, and the others.

    Args:
        count: Number of samples.
        size: How many to choose.
        seed: The same seed and purpose choose the same; a smaller size chooses among the same.
        purpose: What the choice is for; named in the error.

    Returns:
        Indices of the chosen ``(size,)`` and of the others ``(count - size,)``, each ascending.

    Raises:
        ValueError: There are fewer than ``size`` samples.

    Example:
        >>> [indices.tolist() for indices in subset(6, 2, seed=0, purpose="test_size")]
        [[2, 3], [0, 1, 4, 5]]
    """
    if size > count:
        raise ValueError(
            f"Expected {purpose} to be at most {count}, the samples that are left for it, got "
            f"{size}. Lower {purpose}, or give more data."
        )
    order = torch.randperm(count, generator=seeded(seed, purpose))
    return order[:size].sort().values, order[size:].sort().values


def unequal_stream(labels: Tensor, seed: int, *, frequent: int = 3, ratio: int = 10) -> Tensor:
    """Choose samples so that a few classes are ``ratio`` times as frequent as the others.

    The seed picks the frequent classes; all of their samples stay, and of each other class every
    ``ratio``-th, beginning with its first. The order is shuffled with the seed. On a set of equal
    classes the frequencies are thus ``ratio : 1``.

    Args:
        labels: ``(N,)`` integer classes.
        seed: Picks the frequent classes and the order.
        frequent: How many classes are frequent.
        ratio: How many times as frequent they become.

    Returns:
        Indices ``(M,)`` into ``labels``, int64, without repetition.

    Raises:
        ValueError: ``labels`` has no more than ``frequent`` classes.

    Example:
        >>> labels = torch.arange(5).repeat(100)
        >>> labels[unequal_stream(labels, seed=0)].bincount().sort(descending=True).values
        tensor([100, 100, 100,  10,  10])
    """
    classes = sorted(set(labels.tolist()))
    if len(classes) <= frequent:
        raise ValueError(
            f"Expected more than {frequent} classes for an unequal stream, got {len(classes)}. "
            'Use stream="equal" on this data.'
        )
    generator = seeded(seed, "unequal stream")
    picked = torch.randperm(len(classes), generator=generator)[:frequent].tolist()
    whole = {classes[index] for index in picked}
    chosen = torch.cat(
        [(labels == label).nonzero()[:, 0][:: 1 if label in whole else ratio] for label in classes]
    )
    return chosen[torch.randperm(len(chosen), generator=generator)]
