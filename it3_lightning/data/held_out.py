"""The base of all data modules here: what follows a change of settings, and the loaders."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, TypeVar, cast

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from it3_lightning.data.loading import loader
from it3_lightning.data.sampling import seeded
from it3_lightning.data.settings import DataSettings
from it3_lightning.data.splits import S, Selectable, split

T = TypeVar("T", bound=Selectable)


class HeldOutData(DataSettings, Generic[S]):
    """Samples for training, and held-out ones clean and under shifts for testing.

    ``test_dataloader`` and ``predict_dataloader`` return a list of loaders, in the order of
    ``test_names``: clean first, then one for each shift. All settings are attributes that may be
    changed between runs; the next ``setup`` (every loader calls it) follows them, and does again
    only what they touch. The same seed gives bitwise the same samples, with any number of workers.

    Args:
        kwargs: Settings of :class:`~it3_lightning.data.settings.DataSettings`.

    Raises:
        ValueError: A setting is out of its range, or the data has too few samples for it.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._splits: dict[str, S] = {}
        self._shifted: dict[str, S] = {}
        self._splits_key = self._shifted_key = ""
        super().__init__(**kwargs)

    # Hooks of a subclass

    def source(self) -> tuple[object, ...]:
        """Return the settings of its own that the samples depend on."""
        return ()

    def strength(self) -> tuple[object, ...]:
        """Return the settings of its own that the shifts depend on, and the samples do not."""
        return ()

    def training(self, samples: S) -> Dataset[Any]:
        """Return the samples as they are trained on."""
        return self.dataset(samples)

    def dataset(self, samples: S) -> Dataset[Any]:
        """Return the samples as a network sees them, a whole batch at a time."""
        return cast(Dataset[Any], samples)

    @abstractmethod
    def split(self) -> dict[str, S]:
        """Return the samples by what they are for: ``"train"``, ``"validation"``, ``"test"``."""

    @abstractmethod
    def shifted(self, name: str) -> S:
        """Return what one of the ``test_names`` after the first stands for."""

    @abstractmethod
    def frequent(self, samples: S) -> Tensor:
        """Return which samples, in which order, make a stream of unequal frequencies."""

    # What Lightning calls

    def setup(self, stage: str) -> None:
        """Load and split the samples, and shift them for the stages ``test`` and ``predict``."""
        self.check()
        sizes = self.seed, self.val_size, self.train_size, self.test_size
        key = repr((*sizes, *self.source()))
        if self._splits_key != key:
            self._splits, self._splits_key = self.split(), key
        if stage in ("test", "predict"):
            self._shift()

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
        self.setup("test")
        sets = [self._splits[self.evaluate_on], *map(self._shifted.__getitem__, self._changed)]
        if self.stream == "unequal":
            sets = [samples.select(self.frequent(samples)) for samples in sets]
        return [self._loader(self.dataset(samples), self.eval_batch_size) for samples in sets]

    # How it works

    def parted(self, train: T, test: T) -> dict[str, T]:
        """Part validation samples from those to train on, as many of each as the sizes say."""
        return split(
            train,
            test,
            val_size=self.val_size,
            train_size=self.train_size,
            test_size=self.test_size,
            seed=self.seed,
        )

    @property
    def _changed(self) -> list[str]:
        return self.test_names[1:]

    def _shift(self) -> None:
        """Compute the shifts that are missing; those of other settings make room."""
        key = repr((self._splits_key, self.evaluate_on, *self.strength()))
        if self._shifted_key != key:
            self._shifted, self._shifted_key = {}, key
        for name in self._changed:
            if name not in self._shifted:
                self._shifted[name] = self.shifted(name)

    def _loader(
        self,
        source: Dataset[Any],
        size: int,
        *,
        shuffle: bool = False,
        sampler: Sampler[int] | None = None,
    ) -> DataLoader[Any]:
        """Return a loader whose order depends on the seed and the epoch it is built in."""
        return loader(
            source,
            size,
            generator=seeded(self.seed, "loader", self._epoch),
            shuffle=shuffle,
            sampler=sampler,
            num_workers=self.num_workers,
        )

    @property
    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0
