"""A LightningDataModule for segmentation that tests on clean images and on every shift of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch.utils.data import DataLoader

from it3_lightning.data.contract import ShiftedData
from it3_lightning.data.images import Batch
from it3_lightning.data.loading import whole_batch
from it3_lightning.data.masked_set import TURNS, MaskedSet, Shifted, Turned
from it3_lightning.data.sampling import seeded, subset
from it3_lightning.data.settings import Split, Stream, check_choices, check_integer, check_shifts
from it3_lightning.data.shifts import Shift
from it3_lightning.data.tile_order import TileOrder
from it3_lightning.data.tiles import FILES_AT_ONCE

ROAD_SHIFTS = ("contrast", "blur", "gaussian_noise")
"""The shifts that results on roads are reported on."""

ROAD_TUNING_SHIFTS = ("gamma", "motion_blur", "speckle_noise")
"""Other shifts, only for choosing settings: no result is reported on them."""

_GEOMETRIC = ("rotation", "shear")  # they move the pixels, and the masks would stay
_PIXEL = 2.0  # of a tile, for one of a 28-pixel image: severity 3 blurs by 2.5 pixels


class ShiftedMasks(ShiftedData):
    """Images with masks for training, and held-out ones clean and under shifts for testing.

    A subclass says in :meth:`load` where they come from. ``test_dataloader`` and
    ``predict_dataloader`` return a list of loaders, in the order of ``test_names``: clean first,
    then one for each shift. Each batch is ``(images, masks)``: float32 ``(B, 3, T, T)`` in [0, 1]
    and float32 ``(B, 1, T, T)`` of 0 and 1. All settings are attributes that may be changed between
    runs; the next ``setup`` (every loader calls it) follows them, and does again only what they
    touch. Shifts change the images alone and are computed as images are asked for; the seed, the
    shift and the position of a sample fix them.

    Args:
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a validation, test or prediction batch.
        shifts: Names of shifts, of those that move no pixels; may be empty.
        severity: 1 (weak) to 5 (strong); the lengths of blurs are pixels, whatever ``T`` is.
        stream: ``"equal"``: the samples as they are. There is no other: these have no classes.
        evaluate_on: ``"validation"`` has the test loaders hold the validation images, for
            choosing settings without a look at the test images.
        train_size: Samples to train on, a seeded subset; None for all.
        val_size: Samples to validate on, likewise.
        test_size: Samples to test on, likewise.
        augment: Whether training shows each image in one of its eight orientations, at random.
        seed: Seed of the subsets, the shifts and the training order.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: A setting is out of its range, or the data has too few samples for it.
    """

    def __init__(
        self,
        *,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        shifts: Sequence[str] = ROAD_SHIFTS,
        severity: int = 3,
        stream: Stream = "equal",
        evaluate_on: Split = "test",
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        augment: bool = True,
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
        self.train_size = train_size
        self.val_size = val_size
        self.test_size = test_size
        self.augment = augment
        self.seed = seed
        self.num_workers = num_workers
        self._splits: dict[str, MaskedSet] = {}
        self._splits_key: tuple[object, ...] = ()

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return ROAD_SHIFTS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return ROAD_TUNING_SHIFTS

    @abstractmethod
    def load(self) -> dict[str, MaskedSet]:
        """Return all samples: ``"train"``, ``"validation"`` and ``"test"``."""

    @abstractmethod
    def source(self) -> tuple[object, ...]:
        """Return the settings besides ``seed`` and the sizes that :meth:`load` depends on."""

    def setup(self, stage: str) -> None:
        """Find the samples and choose among them, unless that is done for these settings."""
        self.check()
        sizes = {"train": self.train_size, "validation": self.val_size, "test": self.test_size}
        key = (self.seed, *sizes.values(), *self.source())
        if self._splits_key == key:
            return
        splits = self.load()
        for part, size in sizes.items():
            if size is not None:
                purpose = "val_size" if part == "validation" else f"{part}_size"
                chosen, _ = subset(len(splits[part]), size, self.seed, purpose)
                splits[part] = splits[part].select(chosen)
        self._splits, self._splits_key = splits, key

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training images, in an order that is new in every epoch."""
        self.setup("fit")
        train = self._splits["train"]
        epoch = self.trainer.current_epoch if self.trainer else 0
        order = TileOrder(
            train.files,
            generator=seeded(self.seed, "order", epoch),
            at_once=FILES_AT_ONCE,
            turns=TURNS if self.augment else 1,
        )
        return self._loader(Turned(train) if self.augment else train, self.batch_size, order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the clean validation images."""
        self.setup("validate")
        return self._loader(self._splits["validation"], self.eval_batch_size)

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Return one loader for each of ``test_names``, all of the same samples."""
        self.setup("test")
        clean = self._splits[self.evaluate_on]
        kinds = [Shift(name, self.severity, _PIXEL) for name in self.shifts]
        sets = [clean, *(Shifted(clean, kind, self.seed) for kind in kinds)]
        return [self._loader(images, self.eval_batch_size) for images in sets]

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """Return the loaders of :meth:`test_dataloader`."""
        return self.test_dataloader()

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        for name in ("batch_size", "eval_batch_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("train_size", "val_size", "test_size"):
            check_integer(name, getattr(self, name), 1, optional=True)
        for name in ("num_workers", "seed"):
            check_integer(name, getattr(self, name), 0)
        check_choices(self.stream, self.evaluate_on)
        if self.stream != "equal":
            raise ValueError(
                f"Expected stream='equal', got {self.stream!r}: masks have no classes that could "
                "be more frequent. For the benchmark set streams: [equal]."
            )
        check_shifts(self.shifts, self.severity)
        moving = [name for name in self.shifts if name in _GEOMETRIC]
        if moving:
            raise ValueError(
                f"Expected shifts that leave every pixel in its place, got {', '.join(moving)}: "
                f"the masks would no longer fit. Leave {' and '.join(moving)} out."
            )

    def _loader(
        self, source: MaskedSet, size: int, order: TileOrder | None = None
    ) -> DataLoader[Batch]:
        """Return a loader; without a generator it would draw from the global random state."""
        return DataLoader(
            source,
            batch_size=size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=whole_batch,
            generator=seeded(self.seed, "loader"),
        )
