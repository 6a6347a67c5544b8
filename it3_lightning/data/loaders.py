"""Adapter: Datasets and DataLoaders of one's own as a data module with shifts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    default_collate,
)
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder

from it3_lightning.data.base import ShiftedData, Split, check_equal
from it3_lightning.data.contents import digest, is_known, places, yielded
from it3_lightning.data.sampling import Samples, chosen, whole_batch
from it3_lightning.data.tables import tenths
from it3_lightning.utils import TARGET_NAMES
from it3_lightning.utils.messages import unknown

Source = DataLoader[Any] | Dataset[Any]
_NAME = re.compile(r"\w[\w.-]*(/[1-5])?")
_TAKEN = ("train", "validation", "continual", "mixed")  # by other sets and streams
_FIRST = 32  # samples of two sets that are compared
_BATCH = 100  # samples read at once
_CLEAN = "clean"


@dataclass(eq=False)
class ShiftedLoaders(ShiftedData):
    """Your own samples, clean and under your own shifts, for the benchmark and all that it does.

    Validation and test samples come in their order, in batches of the size that is asked for: of a
    DataLoader its Dataset, ``collate_fn`` and ``num_workers`` are taken. That to train on is used
    as it is. Batches are ``(inputs, target)``, or what the module's ``it3_inputs`` and
    ``it3_target`` take.

    Sets may not share samples where one is trained or chosen on and the other is not: ``train``
    with any other, ``val`` and ``tuning`` with ``tests``. Shared are samples of the same place in
    the same Dataset (through ``Subset`` and ``ConcatDataset``), of the same memory in
    TensorDatasets, of the same file in folders of torchvision; and all, where the first 32 inputs
    are equal, one by one.

    Args:
        train: to train on; a Dataset comes shuffled, in batches of ``batch_size``.
        val: labelled samples to validate on, like those to train on.
        tests: to report results on, by name: ``"clean"``, like those to train on, and others under
            shift; ``"fog/1"`` to ``"fog/5"`` are severities of one.
        tuning: validation samples under other shifts, by name, for ``it3 tune`` and ``it3
            calibrate``, which have ``evaluate_on="validation"``.
        batch_size: Samples in a training batch; None for those of the DataLoader, or 128.
        eval_batch_size: Samples in any other batch; None for those of the clean test loader, or
            100.
        num_workers: Worker processes of each loader; None for those of the clean test loader, or 0.
        val_size: Samples to take of ``val`` and of each of ``tuning``, a seeded subset; None for
            all.

    Raises:
        TypeError: a set is neither a DataLoader nor a Dataset whose samples can be read again.
        ValueError: names, loaders or batches do not fit, or sets share samples.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> sets = [TensorDataset(torch.randn(8, 2), torch.arange(8) % 2) for _ in range(4)]
        >>> data = ShiftedLoaders(*sets[:2], tests={"clean": sets[2], "night": sets[3]})
        >>> data.test_names, [len(loader.dataset) for loader in data.test_dataloader()]
        (['clean', 'night'], [8, 8])
    """

    train: Source
    val: Source
    tests: Mapping[str, Source]
    tuning: Mapping[str, Source] = field(default_factory=dict)
    _: KW_ONLY
    batch_size: int = None  # type: ignore[assignment]  # None: the loader's
    eval_batch_size: int = None  # type: ignore[assignment]
    num_workers: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.tests, self.tuning = dict(self.tests), dict(self.tuning or {})
        _check_names(self.tests, self.tuning)
        _check_loader("train", self.train, ordered=False)
        given = {"val": self.val, **_named("tests", self.tests), **_named("tuning", self.tuning)}
        for name, source in given.items():
            _check_loader(name, source)
        self._own = {
            name: Held.of(source) for name, source in {"train": self.train, **given}.items()
        }
        clean = self.tests[_CLEAN]
        for name, source, plain in (
            ("batch_size", self.train, 128),
            ("eval_batch_size", clean, 100),
        ):
            if getattr(self, name) is None:
                setattr(self, name, _batch_size(source, plain))
        if self.num_workers is None:
            self.num_workers = clean.num_workers if isinstance(clean, DataLoader) else 0
        if self.shifts is None and self.evaluate_on == "validation":
            self.shifts = self.tuning_shifts
        self._checked = False
        super().__post_init__()

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of ``tests`` but for the clean one."""
        return tuple(name for name in self.tests if name != _CLEAN)

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of ``tuning``."""
        return tuple(self.tuning)

    def check(self) -> None:
        """Refuse settings that these samples cannot follow."""
        super().check()
        loader = isinstance(self.train, DataLoader) and self.train
        if loader and (self.train_size is not None or self.batch_size != _batch_size(loader)):
            raise ValueError(
                f"Expected train_size=None and batch_size={_batch_size(loader)}, those of the "
                f"DataLoader to train on, got {self.train_size} and {self.batch_size}. Give its "
                "Dataset instead, or another DataLoader."
            )
        if self.stream in ("unequal", "correlated"):
            for name, own in self._own.items():
                if name.startswith(self._tested_on) and not own.has_groups:
                    check_equal(self.stream, f"{name} has no class or value (B,) for each sample")

    def check_shift(self, name: str) -> None:
        """Refuse a shift that there are no samples of in what is evaluated on."""
        known, others = self.reporting_shifts, self.tuning_shifts
        if self.evaluate_on == "validation":
            known, others = others, known
        if name in others:
            use: Split = "test" if self.evaluate_on == "validation" else "validation"
            raise ValueError(
                f"Expected shifts among {', '.join(known) or 'none'} with "
                f"evaluate_on={self.evaluate_on!r}, got {name!r}, of which there are samples with "
                f"evaluate_on={use!r}: tests are reported on, tuning is chosen on."
            )
        if name not in known:
            raise ValueError(unknown("shift", name, known))

    def setup(self, stage: str) -> None:
        """Look at the samples once, before all else."""
        if not self._checked:
            with isolate_rng():
                for name, own in self._own.items():
                    own.check(name, again=name != "train")
                _check_apart(self._own)
                _check_classes(self._own)
            self._checked = True
        super().setup(stage)

    def split(self) -> dict[str, Held]:
        """Return the clean samples, by what they are for."""
        sizes = {"train": self.train_size, "validation": self.val_size, "test": self.test_size}
        sets = {"train": "train", "validation": "val", "test": f"tests[{_CLEAN!r}]"}
        return {use: self._some(name, use, sizes[use]) for use, name in sets.items()}

    def shifted(self, name: str) -> Held:
        """Return samples of a shift."""
        if self.evaluate_on == "test":
            return self._some(f"tests[{name!r}]", "test", self.test_size)
        return self._some(f"tuning[{name!r}]", "validation", self.val_size)

    def _some(self, name: str, use: str, size: int | None) -> Held:
        purpose = {"train": "train_size", "validation": "val_size", "test": "test_size"}[use]
        return chosen(self._own[name], size, self.seed, purpose)

    @property
    def _tested_on(self) -> tuple[str, ...]:
        return ("tests",) if self.evaluate_on == "test" else ("val", "tuning")

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader to train on, or one of its Dataset, in a new order in every epoch."""
        self.setup("fit")
        return self.train if isinstance(self.train, DataLoader) else super().train_dataloader()

    def groups(self, samples: Held) -> Tensor:
        """Return the classes ``(N,)``, or the tenths of the values."""
        return tenths(samples.targets)

    def content(self) -> Mapping[str, Any]:
        """Return a fingerprint of each set, for which those that are not known are read once."""
        if not self._contents:
            self.setup("fit")
            found = {name: self._content(own) for name, own in self._own.items()}
            self._contents |= {"validation" if k == "val" else k: v for k, v in found.items()}
        return dict(self._contents)

    @cached_property
    def _contents(self) -> dict[str, str]:
        return {}

    def _content(self, own: Held) -> str:
        first = own.read([own.first])
        if is_known(own.source):
            return digest(own.source, own.collate, first)
        if first != own.read([own.first]):  # a generator of its own draws: never the same again
            return digest(type(own.source).__qualname__, len(own))
        return own.read(own.batches)


class ImageFolders(ShiftedLoaders):
    """Folders of images, with a folder for each class in each.

    ``train``, ``val``, ``tests/clean``, and in ``tests`` and ``tuning`` one for each shift. Images
    are float32 ``(B, 3, S, S)`` in [0, 1]: those to train on are cut out at random and half of them
    mirrored, of others the shorter side is resized to ``256 / 224 * S`` pixels and the middle cut
    out.

    Args:
        root: Folder of the folders.
        image_size: Height and width ``S``, in pixels.
        kwargs: Settings of :class:`ShiftedLoaders`.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are other classes in one than in another.
    """

    def __init__(self, root: str | Path, *, image_size: int = 224, **kwargs: Any) -> None:
        self.root, self.image_size = root, image_size
        for part in (Path(root, "train"), Path(root, "val"), Path(root, "tests", "clean")):
            if not part.is_dir():
                raise FileNotFoundError(
                    f"Expected train, val and tests/clean in {Path(root).resolve()}, each with a "
                    f"folder for each class, got no {part.relative_to(root)}. Put the images there."
                )
        ends = tv.RandomResizedCrop(image_size), tv.RandomHorizontalFlip(), tv.ToTensor()
        steps = tv.Resize(round(image_size * 256 / 224)), tv.CenterCrop(image_size), tv.ToTensor()
        augmented, whole = tv.Compose(ends), tv.Compose(steps)
        sets: dict[str, Any] = {
            group: {
                folder.name: ImageFolder(folder, whole, allow_empty=True)
                for folder in sorted(Path(root, group).glob("*/"))
            }
            for group in ("tests", "tuning")
        }
        train = ImageFolder(Path(root, "train"), augmented)
        val = ImageFolder(Path(root, "val"), whole, allow_empty=True)
        super().__init__(train=train, val=val, tests=sets["tests"], tuning=sets["tuning"], **kwargs)


class Held(Dataset[Any]):
    """Samples of a Dataset, some or all, that come as whole batches.

    Args:
        source: Dataset.
        collate: makes a batch of a list of samples.
        rows: which samples, in their order; None for all.
    """

    def __init__(
        self, source: Any, collate: Callable[[Any], Any], rows: Tensor | None = None
    ) -> None:
        self.source, self.collate, self.rows = source, collate, rows

    @classmethod
    def of(cls, given: Any) -> Held:
        """Return the samples of a Dataset, or of that of a DataLoader."""
        if isinstance(given, DataLoader):
            return cls(given.dataset, given.collate_fn)
        return cls(given, whole_batch if isinstance(given, Samples) else default_collate)

    def __len__(self) -> int:
        return len(self.source) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.source[index if self.rows is None else int(self.rows[index])]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return a whole batch; DataLoader calls this if it is there."""
        rows = list(indices) if self.rows is None else self.rows[torch.as_tensor(indices)].tolist()
        several = getattr(self.source, "__getitems__", None)
        return self.collate(
            [self.source[row] for row in rows] if several is None else several(rows)
        )

    def select(self, indices: Tensor) -> Held:
        """Return the samples at ``indices`` ``(M,)``, in their order."""
        rows = indices if self.rows is None else self.rows[indices]
        return Held(self.source, self.collate, rows)

    @property
    def classes(self) -> Any:
        """Names of the classes in the order of their numbers, where the Dataset knows them."""
        source = self.source
        while isinstance(source, Subset):
            source = source.dataset
        return getattr(source, "classes", None)

    @property
    def first(self) -> list[int]:
        """Places of the first samples."""
        return list(range(min(_FIRST, len(self))))

    @property
    def batches(self) -> list[list[int]]:
        """Places of all samples, in batches."""
        starts = range(0, len(self), _BATCH)
        return [list(range(start, min(start + _BATCH, len(self)))) for start in starts]

    def read(self, batches: Sequence[Sequence[int]]) -> str:
        """Return a fingerprint of batches of samples, at their places."""
        return yielded(map(self.__getitems__, batches))

    @cached_property
    def targets(self) -> Tensor:
        """The targets of all samples, ``(N,)`` or ``(N, 1)``, read once."""
        found = [target_in(self.__getitems__(each)) for each in self.batches]
        return torch.cat([torch.as_tensor(each) for each in found])

    @cached_property
    def has_groups(self) -> bool:
        """Whether each sample has a class or a value."""
        target = target_in(self.__getitems__([0]))
        return isinstance(target, Tensor) and target.numel() == 1 and target.ndim <= 2

    def check(self, name: str, *, again: bool) -> None:
        """Refuse what makes no batches of inputs and targets; ``again``: or others when read again.

        Raises:
            ValueError: it is one.
        """
        if not len(self):
            raise ValueError(f"Expected samples in {name}, got none.")
        try:
            batch = self.__getitems__(self.first)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"Expected samples of {name} that can be put into a batch, got others "
                f"({type(error).__name__}: {error}). Give a DataLoader whose collate_fn does so."
            ) from error
        few = isinstance(batch, tuple | list | Mapping) and len(batch) < 2
        if isinstance(batch, Tensor) or few:
            raise ValueError(
                f"Expected batches (inputs, target) of {name}, got {_shown(batch)}. Return an "
                "input and its target for each sample."
            )
        if again and yielded([batch]) != yielded([self.__getitems__(self.first)]):
            raise ValueError(
                f"Expected the same samples of {name} whenever they are read, got others the "
                "second time. Leave random transforms out, which are for training, or draw them "
                "once."
            )


def _batch_size(source: Source, plain: int = 1) -> int:
    """Return the samples in a batch; 1 where a loader puts batches together in a way of its own."""
    if not isinstance(source, DataLoader):
        return plain
    own = getattr(source.batch_sampler, "batch_size", None)
    return source.batch_size or (own if isinstance(own, int) else 1)


def target_in(batch: Any) -> Any:
    """Return the target of a batch: the second entry, or the one with a usual name; else None."""
    if isinstance(batch, tuple | list):
        return batch[1]
    if isinstance(batch, Mapping):
        return next((batch[name] for name in TARGET_NAMES if name in batch), None)
    return getattr(batch, "y", None)


def _inputs_in(batch: Any) -> list[Any]:
    """Return the inputs of a batch, all but its target, as single parts."""
    target = target_in(batch)
    if isinstance(batch, Mapping):
        batch = [part for part in batch.values() if part is not target]
    return tree_leaves(batch[0] if isinstance(batch, tuple | list) else batch)


def _shown(batch: Any) -> str:
    size = f" {tuple(batch.shape)}" if isinstance(batch, Tensor) else f" of {len(batch)}"
    return f"a {type(batch).__name__}{size}"


def _named(group: str, sets: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}[{name!r}]": source for name, source in sets.items()}


def _check_names(tests: Mapping[str, Any], tuning: Mapping[str, Any]) -> None:
    """Refuse names that are not fit for columns and files, or missing, or there twice."""
    if _CLEAN not in tests or len(tests) < 2:
        raise ValueError(
            f'Expected tests with "clean" and a shift at least, got {", ".join(tests) or "none"}. '
            'Give samples like those of training as tests["clean"]: every gain under shift stands '
            "beside it."
        )
    for name in (*tests, *tuning):
        if not _NAME.fullmatch(str(name)) or name in _TAKEN:
            raise ValueError(
                f"Expected names of letters, digits, _, - and ., with a severity as in 'fog/1' if "
                f"there are some, and none of {', '.join(_TAKEN)}, got {name!r}. Rename it."
            )
    lower = [str(name).lower() for name in (*tests, *tuning)]
    twice = next((name for name in lower if lower.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"Expected different names in tests and tuning, got {twice!r} twice. Shifts to tune on "
            "are others than those that results are reported on; clean ones to tune on are val."
        )


def _check_loader(name: str, given: Any, *, ordered: bool = True) -> None:
    """Refuse what cannot be read again, sample by sample, and test loaders of another order."""
    dataset = given.dataset if isinstance(given, DataLoader) else given
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"Expected samples of {name} that can be read again and counted, got the "
            f"{type(dataset).__name__}, an IterableDataset. Put its samples into a Dataset with "
            "__len__ and __getitem__; those that fit into memory into a TensorDataset."
        )
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not indexed or isinstance(dataset, Tensor | Mapping | str | list | tuple):
        raise TypeError(
            f"Expected a DataLoader or a Dataset with __len__ and __getitem__ as {name}, got "
            f"{type(dataset).__name__}. Tensors make one: TensorDataset(inputs, targets)."
        )
    if not ordered or not isinstance(given, DataLoader):
        return
    if given.batch_size is None or not isinstance(given.sampler, SequentialSampler):
        got = "batches of its own" if given.batch_size is None else type(given.sampler).__name__
        raise ValueError(
            f"Expected a DataLoader of {name} that has all samples in their order, got one with "
            f"{got}. Leave shuffle, sampler and batch_sampler out; for some samples, or another "
            "order, give Subset(dataset, indices)."
        )
    if given.drop_last:
        raise ValueError(
            f"Expected a DataLoader of {name} that has all samples, got one with drop_last=True. "
            "Leave drop_last out."
        )


def _check_apart(sets: Mapping[str, Held]) -> None:
    """Refuse sets that share samples, of which only one is trained or chosen on."""
    found = {name: set(places(own.source)) for name, own in sets.items()}
    firsts = {name: _first_inputs(own) for name, own in sets.items()}
    for one, other in combinations(sets, 2):
        roles = {one.partition("[")[0], other.partition("[")[0]}
        if "train" not in roles and (roles == {"tests"} or "tests" not in roles):
            continue
        shared = len(found[one] & found[other])
        if not shared and _alike(firsts[one], firsts[other]):
            shared = len(firsts[one])
        if shared:
            raise ValueError(
                f"Expected {one} and {other} to share no samples, got {shared} of them in both. "
                "What is trained or tuned on says nothing of itself as a test: set samples apart, "
                "for example with torch.utils.data.random_split."
            )


def _check_classes(sets: Mapping[str, Held]) -> None:
    """Refuse sets that number their classes otherwise, as folders do of which one is missing."""
    named = {name: list(own.classes) for name, own in sets.items() if own.classes is not None}
    for name, classes in named.items():
        first, known = next(iter(named.items()))
        if classes != known:
            other = sorted(set(classes) ^ set(known)) or classes
            raise ValueError(
                f"Expected the classes of {first} in {name}, in one order, as they are numbered by "
                f"it, got others: {', '.join(map(str, other[:5]))}. Make an empty folder for a "
                "class without samples."
            )


def _first_inputs(own: Held) -> list[str]:
    """Return a fingerprint of the inputs of each of the first samples."""
    return [digest(_inputs_in(own.__getitems__([row]))) for row in own.first]


def _alike(one: Sequence[str], other: Sequence[str]) -> bool:
    return all(a == b for a, b in zip(one, other, strict=False))
