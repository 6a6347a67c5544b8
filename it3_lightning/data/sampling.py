"""Seeded choice: generators from words, subsets, streams, sets of samples, random views, loaders.

Nothing here draws from the global random state.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")
_DRAWS = 2**31


class Selectable(Protocol):
    """Samples of which some can be taken."""

    def __len__(self) -> int: ...

    def select(self, indices: Tensor, /) -> Self:
        """Return the samples at ``indices`` ``(M,)``, in their order."""


S = TypeVar("S", bound=Selectable)


def seeded(*parts: object) -> Generator:
    """Return a CPU generator whose state depends on the text of ``parts`` alone.

    The seed is a hash that is the same in every process and on every machine.

    >>> seeded(0, "fog", 3).initial_seed()
    276838438
    """
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def subset(count: int, size: int, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Choose ``size`` of ``count`` samples at random, and the others."""
    if size > count:
        raise ValueError(
            f"Expected {purpose} to be at most {count}, the samples that are left for it, got "
            f"{size}. Lower {purpose}, or give more data."
        )
    order = torch.randperm(count, generator=seeded(seed, purpose))
    return order[:size].sort().values, order[size:].sort().values


def chosen(samples: S, size: int | None, seed: int, purpose: str) -> S:
    """Return ``size`` of the samples, chosen by seed and purpose; None for all."""
    return samples if size is None else held_out(samples, size, seed, purpose)[0]


def held_out(samples: S, size: int, seed: int, purpose: str) -> tuple[S, S]:
    """Return ``size`` of the samples, chosen by seed and purpose, and the others."""
    indices, others = subset(len(samples), size, seed, purpose)
    return samples.select(indices), samples.select(others)


def unequal_stream(labels: Tensor, seed: int, *, frequent: int = 3, ratio: int = 10) -> Tensor:
    """Choose samples so that a few classes are ``ratio`` times as frequent as the others.

    All samples of the frequent classes stay, and of each other class every ``ratio``-th, beginning
    with its first; the order is shuffled.

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
    steps = [1 if place in picked else ratio for place in range(len(classes))]
    rows = ((labels == label).nonzero()[:, 0] for label in classes)
    chosen = torch.cat([found[::step] for found, step in zip(rows, steps, strict=True)])
    return chosen[torch.randperm(len(chosen), generator=generator)]


def correlated_stream(
    labels: Tensor, seed: int, *, concentration: float = 0.1, slot: int = 100
) -> Tensor:
    """Order samples so that neighbours are of few classes, as the frames of a video are.

    The stream has a slot for about every ``slot`` samples. Each class divides its samples among the
    slots by shares from a symmetric Dirichlet distribution, as in NOTE (Gong et al., NeurIPS 2022)
    and LAME (Boudiaf et al., CVPR 2022); within a slot the order is random.

    Args:
        labels: ``(N,)`` integer classes.
        seed: Picks shares and order.
        concentration: Of the distribution; the smaller, the fewer classes in a slot.
        slot: Samples for each slot.

    Returns:
        A permutation ``(N,)`` of the indices into ``labels``, int64.

    Example:
        >>> labels = torch.arange(10).repeat(100)
        >>> batches = labels[correlated_stream(labels, seed=0)].view(-1, 100)
        >>> sum(len(set(batch.tolist())) for batch in batches) / len(batches)
        5.8
    """
    generator = seeded(seed, "correlated stream")
    draws = np.random.default_rng(generator.initial_seed())
    slots = max(1, len(labels) // slot)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        ends = np.cumsum(draws.dirichlet([concentration] * slots)) * len(rows)
        place[rows] = torch.from_numpy(
            np.searchsorted(ends, np.arange(len(rows)), "right")
        ).double()
    return (place + 0.9 * torch.rand(len(labels), generator=generator)).argsort()


def streamed(labels: Tensor, stream: str, seed: int, concentration: float = 0.1) -> Tensor:
    """Choose and order samples for a stream of unequal or correlated classes.

    Frequent in an unequal one are three of six or more classes, else half of them.

    Args:
        labels: ``(N,)`` integer classes.
        stream: ``"unequal"`` or ``"correlated"``.
        seed: See :func:`unequal_stream`, :func:`correlated_stream`.
        concentration: See :func:`correlated_stream`.
    """
    if stream == "correlated":
        return correlated_stream(labels, seed, concentration=concentration)
    frequent = min(3, len(set(labels.tolist())) // 2)
    return unequal_stream(labels, seed, frequent=max(1, frequent))


@dataclass(eq=False)
class Chained:
    """Loaders one after another, as one: a stream whose shift changes."""

    loaders: Sequence[DataLoader[Any]]

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self.loaders)


class Samples(Dataset[Batch], ABC):
    """Inputs and what to predict of each, handed out a whole batch at a time."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole batch; DataLoader calls this if it is there."""

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]


@dataclass(eq=False)
class Rows(Samples):
    """Inputs ``(N, ...)`` and targets as two tensors.

    >>> rows = Rows(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0]))
    >>> rows.__getitems__([2, 0])
    (tensor([[4., 5.],
            [0., 1.]]), tensor([0, 0]))
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(indices)
        return self.inputs[rows], self.targets[rows]

    def select(self, indices: Tensor) -> Rows:
        """Return the samples at ``indices`` ``(M,)``, in their order."""
        return Rows(self.inputs[indices], self.targets[indices])


@dataclass(eq=False)
class Mixed(Samples):
    """Samples of several sets side by side.

    Args:
        sources: sets that hand out batches of tensors.
        places: which set, and which of its samples, ``(N, 2)`` integers.
    """

    sources: Sequence[Any]
    places: Tensor

    @classmethod
    def of(cls, sources: Sequence[Any], seed: int) -> Mixed:
        """Take of each of ``k`` sets every ``k``-th sample, in an order that the seed picks.

        Of sets of the same samples each sample comes once, in one of them.
        """
        longest = max(map(len, sources))
        turn = torch.randperm(longest, generator=seeded(seed, "mixed shifts")) % len(sources)
        rows = [(turn[: len(s)] == place).nonzero()[:, 0] for place, s in enumerate(sources)]
        places = [torch.stack([torch.full_like(r, n), r], 1) for n, r in enumerate(rows)]
        joined = torch.cat(places)
        order = torch.randperm(len(joined), generator=seeded(seed, "mixed stream"))
        return cls(sources, joined[order])

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        places = self.places[torch.as_tensor(indices)]
        came, parts = [], []
        for number, source in enumerate(self.sources):
            here = (places[:, 0] == number).nonzero()[:, 0]
            if len(here):
                came.append(here)
                parts.append(source.__getitems__(places[here, 1].tolist()))
        back = torch.cat(came).argsort()
        try:
            inputs, targets = (torch.cat(each)[back] for each in zip(*parts, strict=True))
        except TypeError as error:
            raise ValueError(
                "Expected batches of an input and a target tensor for stream='mixed', got others. "
                "Use stream='continual', which has the shifts one after another."
            ) from error
        return inputs, targets


@dataclass(eq=False)
class DrawSampler(Sampler[int]):
    """Shuffles the samples anew in each pass, each as ``index + count * draw``."""

    count: int
    generator: Generator

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=self.generator)
        draws = torch.randint(_DRAWS, (self.count,), generator=self.generator)
        yield from (order + self.count * draws).tolist()


@dataclass(eq=False)
class Views(Samples):
    """Random views of samples that depend on the seed alone, whatever worker makes them.

    A sampler, :class:`DrawSampler` if no other is given, draws a number for each sample of each
    epoch in the main process and hands it over inside the sample's index; 0 in a plain one.
    """

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, codes: list[int]) -> Batch:
        pairs = [divmod(code, len(self)) for code in codes]
        return self.views([row for _, row in pairs], [draw for draw, _ in pairs])

    @abstractmethod
    def views(self, rows: list[int], draws: list[int]) -> Batch:
        """Return a view of each of these samples, and their labels."""


def whole_batch(batch: Any) -> Any:
    """Pass a batch on as it is: ``__getitems__`` of a set has collated it already."""
    return batch


def sampled(source: DataLoader[T], size: int, *, batch_size: int, seed: int) -> DataLoader[T]:
    """Return a loader of some samples of another, in the order of its dataset.

    >>> from torch.utils.data import TensorDataset
    >>> source = DataLoader(TensorDataset(torch.arange(6)), batch_size=6)
    >>> [batch[0].tolist() for batch in sampled(source, 3, batch_size=2, seed=0)]
    [[1, 2], [5]]
    """
    count = len(source.dataset)  # type: ignore[arg-type]
    chosen, _ = subset(count, min(size, count), seed, "sampled")
    return DataLoader(
        Subset(source.dataset, chosen.tolist()),
        batch_size=batch_size,
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        generator=seeded(seed, "loader"),
    )
