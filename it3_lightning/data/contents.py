"""Fingerprint of samples: tensors by content, files by size and time, other Datasets as they yield.

Settings tell two sets of samples apart only where they name them: a file may have changed, and a
Dataset of one's own has no settings.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder

from it3_lightning.utils.specs import without_address

_BYTES = 16
_MOST = 10_000  # batches


def digest(*held: Any) -> str:
    """Return a fingerprint of objects, the same in every process.

    Tensors and arrays count by content, paths of files by name, size and time of change, containers
    and objects by what they hold; other things by their representation.

    >>> digest(torch.arange(3)) == digest(torch.arange(3))
    True
    >>> digest(torch.arange(3)) == digest(torch.tensor([0, 1, 3]))
    False
    """
    walk = _Walk()
    for each in held:
        walk.add(each)
    return walk.found


def yielded(loader: Iterable[Any]) -> str:
    """Return a fingerprint of the batches that a loader yields; random ones are those of a seed.

    Of a loader without an end the first 10,000 count.
    """
    walk = _Walk()
    with isolate_rng():
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        for batch in islice(loader, _MOST):
            walk.add(tree_leaves(batch))
    return walk.found


def is_known(dataset: Any) -> bool:
    """Whether what a Dataset yields is told by what it holds.

    >>> is_known(Subset(TensorDataset(torch.zeros(3)), [0])), is_known([1, 2])
    (True, False)
    """
    if isinstance(dataset, Subset):
        return is_known(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(is_known, dataset.datasets))
    return isinstance(dataset, DatasetFolder) or type(dataset) is TensorDataset


def places(dataset: Any) -> list[object]:
    """Return for each sample where it lies: file, memory, or place in its Dataset.

    Samples of two sets that lie in one place are the same.

    >>> rows = TensorDataset(torch.arange(6))
    >>> places(Subset(rows, [4, 1])) == [places(rows)[4], places(rows)[1]]
    True
    """
    if isinstance(dataset, Subset):
        below = places(dataset.dataset)
        return [below[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [place for each in dataset.datasets for place in places(each)]
    if isinstance(dataset, DatasetFolder):
        return [str(Path(file).resolve()) for file, _ in dataset.samples]
    if type(dataset) is TensorDataset:
        return [(row.data_ptr(), row.nbytes) for row in dataset.tensors[0]]
    return [(id(dataset), "sample", row) for row in range(len(dataset))]


class _Walk:
    """Goes through objects, and hashes what they hold."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=_BYTES)
        self._open: set[int] = set()

    @property
    def found(self) -> str:
        """The fingerprint."""
        return self._hash.hexdigest()

    def add(self, held: Any) -> None:
        """Add an object."""
        if isinstance(held, Tensor):
            self._add_array(_as_array(held))
        elif isinstance(held, np.ndarray) and held.dtype != np.object_:
            self._add_array(held)
        elif isinstance(held, Path):
            self._say(held.name, *_state(held))
        elif isinstance(held, bool | int | float | str | bytes | None):
            self._say(held)
        elif id(held) in self._open:
            self._say("again")
        else:
            self._open.add(id(held))
            self._say(type(held).__name__)
            for part in _parts(held):
                self.add(part)
            self._open.remove(id(held))

    def _add_array(self, values: Any) -> None:
        self._say(values.dtype.str, values.shape)
        self._hash.update(np.ascontiguousarray(values).data)

    def _say(self, *words: object) -> None:
        self._hash.update(f"{words!r};".encode(errors="surrogateescape"))


def _as_array(held: Tensor) -> Any:
    """Return a tensor as an array of the same bytes."""
    plain = held.detach().cpu()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    try:
        return plain.resolve_conj().resolve_neg().numpy()
    except TypeError:  # a type that NumPy has not, as bfloat16
        return plain.float().numpy()


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat() if path.is_file() else None
    return () if found is None else (found.st_size, found.st_mtime_ns)


def _parts(held: Any) -> Iterable[Any]:
    """Return what an object holds."""
    if isinstance(held, Mapping):
        return [part for key in held for part in (str(key), held[key])]
    if isinstance(held, Set):
        return sorted(map(repr, held))
    if isinstance(held, list | tuple | np.ndarray):
        return held
    if isinstance(held, DatasetFolder):
        return [part for file, label in held.samples for part in (Path(file), label)]
    own = getattr(held, "__dict__", None)
    if own is None or (callable(held) and not isinstance(held, Dataset)):
        return [without_address(held)]
    paths = getattr(held, "paths", None)  # of files that are read later
    files = [each for each in paths if isinstance(each, Path)] if isinstance(paths, list) else []
    return [*files, *(part for key in sorted(own) for part in (key, own[key]))]
