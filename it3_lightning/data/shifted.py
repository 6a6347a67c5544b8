"""A LightningDataModule that tests on clean images and on every shift of them."""

from collections.abc import Sequence

from torch.utils.data import DataLoader

from it3_lightning.data.contract import ShiftedData
from it3_lightning.data.image_set import Batch, ImageSet, loader, shifted
from it3_lightning.data.sampling import seeded, subset, unequal_stream
from it3_lightning.data.settings import (
    Split,
    Stream,
    check_choices,
    check_integer,
    check_shifts,
)
from it3_lightning.data.shifts import SHIFTS, Shift


class ShiftedImages(ShiftedData):
    """Images for training, and the same held-out images clean and under shifts for testing.

    A subclass says in :meth:`load` where its images come from. ``test_dataloader`` and
    ``predict_dataloader`` return a list of loaders, in the order of ``test_names``: clean first,
    then one for each shift. Each batch is ``(images, labels)``: float32 ``(B, C, H, W)`` in
    [0, 1] and int64 ``(B,)``. All settings are attributes that may be changed between runs; the
    next ``setup`` (every loader calls it) follows them, and does again only what they touch.

    Shifted images are computed once and kept as the source's own dtype: 8-bit images stay 8-bit,
    which rounds a shifted value by at most 1/510. The same seed gives bitwise the same images.

    Args:
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a validation, test or prediction batch.
        shifts: Names of shifts (see ``SHIFTS`` and ``TUNING_SHIFTS``); may be empty.
        severity: 1 (weak) to 5 (strong).
        stream: ``"equal"`` keeps the source's samples and order; ``"unequal"`` makes three
            classes ten times as frequent, see :func:`~it3_lightning.data.unequal_stream`.
        evaluate_on: ``"validation"`` has the test loaders hold the validation images, for
            choosing settings without a look at the test images.
        val_size: Samples taken from the training images for validation.
        train_size: Samples to train on, a seeded subset; None for all that validation leaves.
        test_size: Samples to test on, a seeded subset; None for all.
        seed: Seed of the split, the subsets, the shifts, the stream and the training order.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: A setting is out of its range, or the data has too few samples for it.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        shifts: Sequence[str] = SHIFTS,
        severity: int = 3,
        stream: Stream = "equal",
        evaluate_on: Split = "test",
        val_size: int = 5000,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.shifts = shifts
        self.severity = severity
        self.stream: Stream = stream
        self.evaluate_on: Split = evaluate_on
        self.val_size = val_size
        self.train_size = train_size
        self.test_size = test_size
        self.seed = seed
        self.num_workers = num_workers
        self._splits: dict[str, ImageSet] = {}
        self._splits_key: tuple[object, ...] = ()
        self._shifted: dict[str, ImageSet] = {}
        self._shifted_key: tuple[object, ...] = ()
        self._check()

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return all training images and all test images; a subclass implements this."""
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define load(self) -> tuple[ImageSet, ImageSet]. "
            "Return the training images and the test images."
        )

    @property
    def num_classes(self) -> int:
        """Number of classes: one more than the largest label to train on."""
        self.setup("fit")
        return 1 + int(self._splits["train"].labels.max())

    def setup(self, stage: str) -> None:
        """Load and split the images, and shift them for the stages ``test`` and ``predict``."""
        self._check()
        self._split()
        if stage in ("test", "predict"):
            self._shift()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training images, in an order that is new in every epoch."""
        self.setup("fit")
        return self._loader(self._splits["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the clean validation images."""
        self.setup("validate")
        return self._loader(self._splits["validation"], self.eval_batch_size)

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Return one loader for each of ``test_names``, all of the same samples."""
        self.setup("test")
        clean = self._splits[self.evaluate_on]
        sets = [clean, *(self._shifted[name] for name in self.shifts)]
        if self.stream == "unequal":
            order = unequal_stream(clean.labels, self.seed)
            sets = [images.select(order) for images in sets]
        return [self._loader(images, self.eval_batch_size) for images in sets]

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """Return the loaders of :meth:`test_dataloader`."""
        return self.test_dataloader()

    def _loader(self, source: ImageSet, size: int, shuffle: bool = False) -> DataLoader[Batch]:
        """Return a loader whose order depends on the seed and the epoch it is built in."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        generator = seeded(self.seed, "loader", epoch)
        return loader(
            source, size, generator=generator, shuffle=shuffle, num_workers=self.num_workers
        )

    def _split(self) -> None:
        """Load the images and split them, unless this has been done for these settings."""
        key = (self.seed, self.val_size, self.train_size, self.test_size)
        if self._splits_key == key:
            return
        train, test = self.load()
        validation, others = subset(len(train), self.val_size, self.seed, "val_size")
        size = len(others) if self.train_size is None else self.train_size
        kept, _ = subset(len(others), size, self.seed, "train_size")
        if self.test_size is not None:
            test = test.select(subset(len(test), self.test_size, self.seed, "test_size")[0])
        self._splits = {
            "train": train.select(others[kept]),
            "validation": train.select(validation),
            "test": test,
        }
        self._splits_key = key

    def _shift(self) -> None:
        """Compute the shifts that are missing; those of other settings make room."""
        key = (*self._splits_key, self.evaluate_on, self.severity)
        if self._shifted_key != key:
            self._shifted, self._shifted_key = {}, key
        clean = self._splits[self.evaluate_on]
        for name in self.shifts:
            if name not in self._shifted:
                self._shifted[name] = shifted(clean, Shift(name, self.severity), self.seed)

    def _check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        for name in ("batch_size", "eval_batch_size", "val_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("train_size", "test_size"):
            check_integer(name, getattr(self, name), 1, optional=True)
        for name in ("num_workers", "seed"):
            check_integer(name, getattr(self, name), 0)
        check_choices(self.stream, self.evaluate_on)
        check_shifts(self.shifts, self.severity)
