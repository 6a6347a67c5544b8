"""Template method: a data module that tests on held-out samples, clean and under shifts of them.

:class:`ShiftedData` has the settings, follows a change of them, and makes the loaders; a subclass
says where samples come from and how they shift.
"""

from __future__ import annotations

import gzip
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import pytorch_lightning
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from it3_lightning.data.contents import digest, yielded
from it3_lightning.data.sampling import (
    Chained,
    DrawSampler,
    Mixed,
    S,
    Views,
    chosen,
    held_out,
    seeded,
    streamed,
    whole_batch,
)
from it3_lightning.data.shifts import SEVERITIES, Severity, check_severity
from it3_lightning.utils.messages import undefined, unknown

Stream = Literal["equal", "unequal", "correlated", "continual", "mixed"]
_JOINED = ("continual", "mixed")  # streams that have all shifts in one loader
Split = Literal["test", "validation"]
_AGAIN = "Delete it and fetch it again."

if TYPE_CHECKING:
    _AnyDataModule = LightningDataModule
else:

    class _AnyDataModule(LightningDataModule, pytorch_lightning.LightningDataModule):
        """A data module for the Trainer of either namespace of Lightning."""


@dataclass(eq=False)
class ShiftedData(_AnyDataModule):
    """A data module of either Lightning that tests on clean samples and on every shift of them.

    ``test_dataloader`` and ``predict_dataloader`` return one loader for each of ``test_names``, all
    of the same samples in the same order, except for shifts that are other samples. All settings
    may be changed between runs; the next ``setup`` (every loader calls it) does again only what
    they touch. The same seed gives bitwise the same samples, with any number of workers.

    The settings are the fields of a dataclass. A subclass with some of its own is one as well, or
    sets them before it calls ``super().__init__(**kwargs)``.

    Args:
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a validation, test or prediction batch.
        shifts: Names of shifts to test on; may be empty. None for those that results are reported
            on.
        stream: ``"equal"`` keeps the samples and their order; ``"unequal"`` makes some classes, or
            some tenths of the values, ten times as frequent, see
            :func:`~it3_lightning.data.unequal_stream`; ``"correlated"`` has neighbours of few
            classes, see :func:`~it3_lightning.data.correlated_stream`; ``"continual"`` has all
            shifts one after another in one loader, ``"continual"``, beside the clean one;
            ``"mixed"`` has samples of all of them side by side in every batch of one.
        concentration: Of the correlated stream: the smaller, the fewer classes are neighbours. Of
            2,000 samples of ten classes a batch of 100 has five or six with 0.1, three with 0.01.
        evaluate_on: ``"validation"`` has the test loaders hold the validation samples, for
            choosing settings without a look at the test samples.
        val_size: Samples to validate on; None for a tenth of those to train on, or for all that
            the data sets apart for it.
        train_size: Samples to train on, a seeded subset; None for all that are left.
        test_size: Samples to test on, a seeded subset; None for all.
        seed: Seed of the split, the subsets, the shifts, the stream and the training order.
        num_workers: Worker processes of each loader.
        severity: Of the shifts, where they have one: 1 (weak) to 5 (strong), or ``"all"``: each in
            turn, a loader for each, whose test names end in ``/1`` to ``/5``.
    """

    SHIFTS: ClassVar[tuple[str, ...]] = ()
    TUNING_SHIFTS: ClassVar[tuple[str, ...]] = ()
    needed_sizes: ClassVar[tuple[str, ...]] = ()
    """Which of ``val_size``, ``train_size`` and ``test_size`` must not be None."""
    sample_settings: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that the samples depend on, beside the sizes and the seed."""
    shift_settings: ClassVar[tuple[str, ...]] = ("severity",)
    """Names of those that the shifts depend on, and the samples do not."""

    _: KW_ONLY
    batch_size: int = 128
    eval_batch_size: int = 100
    shifts: Sequence[str] = None  # type: ignore[assignment]  # None: those reported on
    stream: Stream = "equal"
    concentration: float = 0.1
    evaluate_on: Split = "test"
    val_size: int | None = None
    train_size: int | None = None
    test_size: int | None = None
    seed: int = 0
    num_workers: int = 0
    severity: Severity | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__init__()
        if self.shifts is None:
            self.shifts = self.reporting_shifts
        self._splits: dict[str, Any] = {}
        self._shifted: dict[str, Any] = {}
        self._splits_key = self._shifted_key = ""
        self.check()

    # What a benchmark asks

    @property
    def baseline_errors(self) -> Mapping[str, float] | None:
        """Errors of a reference network by shift, in per cent, each the mean over five severities.

        The benchmark reports the mean corruption error by them.
        """
        return None

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return self.SHIFTS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings, with ``evaluate_on="validation"``."""
        return self.TUNING_SHIFTS

    @property
    def test_names(self) -> list[str]:
        """Names of the test and prediction loaders, in their order: clean first."""
        return ["clean", *([self.stream] if self.stream in _JOINED else self.shifted_names)]

    @property
    def shifted_names(self) -> list[str]:
        """Names of the sets of shifted samples, in their order."""
        return list(self.wanted())

    def wanted(self) -> dict[str, tuple[str, Any]]:
        """Return name and severity of every shift to test on, by the name of its loader."""
        if self.severity != "all":
            return {name: (name, self.severity) for name in self.shifts}
        return {f"{name}/{level}": (name, level) for name in self.shifts for level in SEVERITIES}

    def content(self) -> Mapping[str, Any]:
        """Return what tells the samples from others that the same settings may come to.

        A fingerprint by ``"train"``, ``"validation"``, ``"test"``, see
        :func:`~it3_lightning.data.contents.digest`, and ``"loaders"`` where these are a subclass's
        own: of what they yield. A benchmark refuses a folder of other samples to train or to
        validate on, and scores other samples again. A subclass may return names of its own.
        """
        self.setup("fit")
        found: dict[str, Any] = {name: digest(each) for name, each in self._splits.items()}
        kind = type(self)
        if kind.train_dataloader is not ShiftedData.train_dataloader:
            found["train"] = yielded(self.train_dataloader())
        if kind.test_dataloader is not ShiftedData.test_dataloader:
            found["loaders"] = [yielded(loader) for loader in self.test_dataloader()]
        return found

    # Hooks of a subclass

    def split(self) -> dict[str, Any]:
        """Return the samples by what they are for: ``"train"``, ``"validation"``, ``"test"``."""
        raise undefined(self, "split(self) -> dict[str, Samples]", "Return the samples by use.")

    def shifted(self, name: str) -> Any:
        """Return what one of the ``shifted_names`` stands for."""
        raise undefined(self, "shifted(self, name: str) -> Samples", "Return shifted samples.")

    def change(self, name: str, severity: int) -> Any:
        """Return the function behind a shift's name; raise ValueError where it is unknown."""
        raise undefined(self, "change(self, name: str, severity: int)", "Return the shift.")

    def groups(self, samples: Any) -> Tensor:
        """Return the classes of samples ``(N,)``, or what stands for these in streams of them."""
        raise undefined(self, "groups(self, samples) -> Tensor", "Return classes (N,).")

    def source(self) -> tuple[object, ...]:
        """Return the settings of its own that the samples depend on."""
        return tuple(getattr(self, name) for name in self.sample_settings)

    def training(self, samples: Any) -> Dataset[Any]:
        """Return the samples as they are trained on."""
        return self.dataset(samples)

    def dataset(self, samples: Any) -> Dataset[Any]:
        """Return the samples as a network sees them, a whole batch at a time."""
        return samples  # type: ignore[no-any-return]

    def check_shift(self, name: str) -> None:
        """Refuse a shift that is unknown, or cannot be tested on with these settings."""
        if self.severity is not None:
            self.change(name, SEVERITIES[0] if self.severity == "all" else self.severity)

    def check(self) -> None:
        """Refuse settings out of their range, before any work; a subclass adds its own."""
        for name in ("batch_size", "eval_batch_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("val_size", "train_size", "test_size"):
            check_integer(name, getattr(self, name), 1, optional=name not in self.needed_sizes)
        for name in ("num_workers", "seed"):
            check_integer(name, getattr(self, name), 0)
        check_choice("stream", self.stream, get_args(Stream))
        if not 0 < self.concentration < math.inf:
            raise ValueError(
                f"Expected concentration > 0, got {self.concentration!r}. Set 0.1 for batches of "
                "several classes, 0.01 for batches of two or three."
            )
        if self.stream in _JOINED and not self.shifts:
            raise ValueError(f"Expected shifts for stream={self.stream!r}, got none. Name some.")
        check_choice("evaluate_on", self.evaluate_on, get_args(Split))
        if self.severity not in (None, "all"):
            check_severity(self.severity)
        if not isinstance(self.shifts, list | tuple) or len(set(self.shifts)) != len(self.shifts):
            raise ValueError(
                f"Expected shifts to be a list of different names, got {self.shifts!r}. Write for "
                f'example shifts=["{next(iter(self.reporting_shifts), "fog")}"].'
            )
        for name in self.shifts:
            self.check_shift(name)

    # What Lightning calls

    def setup(self, stage: str) -> None:
        """Load and split the samples, and shift them for the stages ``test`` and ``predict``."""
        self.check()
        sizes = self.seed, self.val_size, self.train_size, self.test_size
        key = repr((*sizes, *self.source()))
        if self._splits_key != key:
            self._splits, self._splits_key = self.split(), key
        if stage not in ("test", "predict"):
            return
        strength = [getattr(self, name) for name in self.shift_settings]
        key = repr((key, self.evaluate_on, *strength))
        if self._shifted_key != key:  # shifts of other settings make room
            self._shifted, self._shifted_key = {}, key
        for name in self.shifted_names:
            if name not in self._shifted:
                self._shifted[name] = self.shifted(name)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, in an order that is new in every epoch."""
        self.setup("fit")
        return self._loader(self.training(self._splits["train"]), self.batch_size, shuffle=True)

    def plain_train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples as test samples come: unchanged, in their order."""
        self.setup("fit")
        return self._loader(self.dataset(self._splits["train"]), self.eval_batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the clean validation samples."""
        self.setup("validate")
        return self._loader(self.dataset(self._splits["validation"]), self.eval_batch_size)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each of ``test_names``."""
        sets = self._test_sets()
        if self.stream in ("unequal", "correlated"):
            orders = zip(sets, self.test_orders(), strict=True)
            sets = [samples.select(order) for samples, order in orders]
        datasets = [self.dataset(samples) for samples in sets]
        if self.stream == "mixed":
            datasets = [datasets[0], Mixed.of(datasets[1:], self.seed)]
        loaders = [self._loader(each, self.eval_batch_size) for each in datasets]
        if self.stream == "continual":
            return [loaders[0], Chained(loaders[1:])]  # type: ignore[list-item]  # as good as one
        return loaders

    def test_orders(self) -> list[Tensor]:
        """Return which samples the clean loader and that of each shift hold, in their order.

        Indices ``(N,)`` for each; where a stream has all shifts in one loader, of its parts.
        """
        sets = self._test_sets()
        if self.stream not in ("unequal", "correlated"):
            return [torch.arange(len(each)) for each in sets]
        how = self.stream, self.seed, self.concentration
        return [streamed(self.groups(each), *how) for each in sets]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return the loaders of ``test_dataloader``."""
        return self.test_dataloader()

    # How it works

    def parted(self, train: S, test: S) -> dict[str, S]:
        """Part validation samples from those to train on, as many of each as the sizes say."""
        size = max(1, len(train) // 10) if self.val_size is None else self.val_size
        validation, kept = held_out(train, size, self.seed, "val_size")
        if not len(kept):
            raise ValueError(
                f"Expected val_size to leave samples to train on, got {size} of {len(train)}. "
                "Lower val_size, or give more data."
            )
        return {
            "train": chosen(kept, self.train_size, self.seed, "train_size"),
            "validation": validation,
            "test": chosen(test, self.test_size, self.seed, "test_size"),
        }

    def _test_sets(self) -> list[Any]:
        """Return the samples to test on: clean, and under each shift."""
        self.setup("test")
        return [self._splits[self.evaluate_on], *(self._shifted[n] for n in self.shifted_names)]

    def _loader(
        self,
        source: Dataset[Any],
        size: int,
        *,
        shuffle: bool = False,
        sampler: Sampler[int] | None = None,
    ) -> DataLoader[Any]:
        """Return a loader whose order depends on the seed and the epoch it is built in.

        Its samplers are such that a Trainer can distribute them; random views come with draws.
        Without a generator of its own, each pass would draw from the global random state.
        """
        generator = seeded(self.seed, "loader", self._epoch)
        if isinstance(source, Views) and sampler is None:
            sampler = DrawSampler(len(source), generator)
        return DataLoader(
            source,
            batch_size=size,
            shuffle=shuffle and sampler is None,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=whole_batch,
            generator=generator,
        )

    @property
    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0


def check_integer(name: str, value: object, least: int, *, optional: bool = False) -> None:
    """Refuse what is not an integer of at least ``least`` (or None, where that is allowed)."""
    if not (optional and value is None) and (type(value) is not int or value < least):
        raise ValueError(
            f"Expected {name} to be an integer of at least {least}{' or None' * optional}, got "
            f"{value!r}. Set {name}={least} or more."
        )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse what is none of the known words."""
    if value not in known:
        raise ValueError(unknown(name, value, known))


def check_share(name: str, value: float) -> None:
    """Refuse what is no share of something: a number between 0 and 1, neither included."""
    if not 0 < value < 1:
        raise ValueError(
            f"Expected {name} to be between 0 and 1, got {value!r}. Set {name}=0.2 for a fifth."
        )


def check_deviation(name: str, value: float, unit: str) -> None:
    """Refuse a negative standard deviation."""
    if not value >= 0:
        raise ValueError(f"Expected {name} to be at least 0 {unit}, got {value!r}. Set {name}=0.")


def check_equal(stream: Stream, why: str) -> None:
    """Refuse a stream of unequal or correlated classes on data that have none."""
    if stream in ("unequal", "correlated"):
        message = f"Expected stream='equal', got {stream!r}: {why}. "
        raise ValueError(message + "For the benchmark set streams: [equal].")


def damaged(path: Path, what: str, error: Exception, remedy: str = _AGAIN) -> ValueError:
    """Build the error for a file that is empty, cut off, damaged or of another kind."""
    got = "a folder" if path.is_dir() else f"{path.stat().st_size} bytes that are none"
    return ValueError(
        f"Expected {path} to be {what}, got {got} ({type(error).__name__}: {str(error).strip()}). "
        f"{remedy}"
    )


@contextmanager
def reading(path: Path, what: str, remedy: str = _AGAIN) -> Iterator[None]:
    """Name the file in whatever its reader raises: damaged bytes make readers raise anything."""
    try:
        yield
    except FileNotFoundError:  # it names the file
        raise
    except Exception as error:
        raise damaged(path, what, error, remedy) from error


def read_bytes(path: Path) -> bytes:
    """Return what a file holds, unpacked where its name ends in ``.gz``."""
    with reading(path, "a whole gzip file"):
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def read_npz(path: Path, names: Sequence[str], remedy: str) -> tuple[list[Tensor], str]:
    """Return some arrays of an ``.npz`` file, and the text ``settings`` in it, if there is one.

    Nothing is unpickled: a file from elsewhere cannot run code. Arrays that are longer than their
    headers say are refused, as are those that are shorter.
    """
    what = f"a whole .npz file of {', '.join(names)}"
    with reading(path, what, remedy), zipfile.ZipFile(path) as archive:
        settings = "settings.npy" in archive.namelist() and _member(archive, "settings")
        return [torch.from_numpy(_member(archive, name)) for name in names], str(settings or "")


def _member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """Return one array; what follows it is noticed, and at its end its checksum is compared."""
    with archive.open(f"{name}.npy") as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{name} holds more than its header says")
    return array
