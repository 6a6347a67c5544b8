"""A LightningDataModule that tests on clean images and on every shift of them."""

from torch.utils.data import DataLoader, Dataset

from it3_lightning.data.image_settings import ImageSettings
from it3_lightning.data.images import Batch, Images
from it3_lightning.data.loading import loader
from it3_lightning.data.sampling import seeded, unequal_stream
from it3_lightning.data.splits import Splits


class ShiftedImages(ImageSettings):
    """Images for training, and the same held-out images clean and under shifts for testing.

    A subclass says in :meth:`load` where its images come from; what else it may say are the other
    hooks: ``source``, ``training``, ``change`` and ``published``. ``test_dataloader`` and
    ``predict_dataloader`` return a list of loaders, in the order of ``test_names``: clean first,
    then one for each shift. Each batch is ``(images, labels)``: float32 ``(B, C, H, W)`` in [0, 1]
    and int64 ``(B,)``. All settings are attributes that may be changed between runs; the next
    ``setup`` (every loader calls it) follows them, and does again only what they touch.

    Shifted images in memory are computed once and kept as the source's own dtype: 8-bit images
    stay 8-bit, which rounds a shifted value by at most 1/510. Images on disk are shifted as they
    are read. The same seed gives bitwise the same images, with any number of workers.

    Args and errors: see :class:`~it3_lightning.data.image_settings.ImageSettings`.
    """

    _splits: Splits
    _splits_key: tuple[object, ...] = ()
    _shifted: dict[str, Images]
    _shifted_key: tuple[object, ...] = ()

    # Hooks of a subclass

    def load(self) -> tuple[Images, Images]:
        """Return all training images and all test images; a subclass implements this."""
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define load(self) -> tuple[Images, Images]. "
            "Return the training images and the test images, e.g. as ImageSet."
        )

    def source(self) -> tuple[object, ...]:
        """Return the settings of its own that :meth:`load` and :meth:`published` depend on."""
        return ()

    def training(self, images: Images) -> Dataset[Batch]:
        """Return the images as they are trained on: :class:`Augmented`, where they are changed."""
        return images

    def published(self, name: str, severity: int) -> Images | None:
        """Return all test images under a shift where they are not made but lie in files."""
        return None

    # What Lightning and the benchmark call

    @property
    def num_classes(self) -> int:
        """Number of classes: one more than the largest label to train on.

        Raises:
            ValueError: The labels are values, not classes.
        """
        self.setup("fit")
        labels = self._splits.train.labels
        if labels.is_floating_point():
            raise ValueError(
                f"Expected classes, got values {tuple(labels.shape)}: {type(self).__name__} is "
                "for regression. Give the network one output for each value."
            )
        return 1 + int(labels.max())

    def setup(self, stage: str) -> None:
        """Load and split the images, and shift them for the stages ``test`` and ``predict``."""
        self._check()
        self._split()
        if stage in ("test", "predict"):
            self._shift()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training images, in an order that is new in every epoch."""
        self.setup("fit")
        return self._loader(self.training(self._splits.train), self.batch_size, shuffle=True)

    def plain_train_dataloader(self) -> DataLoader[Batch]:
        """Return the training images as test images come: not augmented, in their order."""
        self.setup("fit")
        return self._loader(self._splits.train, self.eval_batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the clean validation images."""
        self.setup("validate")
        return self._loader(self._splits.validation, self.eval_batch_size)

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Return one loader for each of ``test_names``, all of the same samples."""
        self.setup("test")
        return [self._loader(images, self.eval_batch_size) for images in self._test_sets()]

    # How it works

    def _test_sets(self) -> list[Images]:
        """Return the images of the test loaders, in their order."""
        clean = self._splits.held_out(self.evaluate_on)
        sets = [clean, *(self._shifted[name] for name in self._wanted())]
        if self.stream == "unequal":
            order = unequal_stream(clean.labels, self.seed)
            sets = [images.select(order) for images in sets]
        return sets

    def _loader(
        self, source: Dataset[Batch], size: int, shuffle: bool = False
    ) -> DataLoader[Batch]:
        """Return a loader whose order depends on the seed and the epoch it is built in."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        generator = seeded(self.seed, "loader", epoch)
        return loader(
            source, size, generator=generator, shuffle=shuffle, num_workers=self.num_workers
        )

    def _split(self) -> None:
        """Load the images and split them, unless this has been done for these settings."""
        key = (self.seed, self.val_size, self.train_size, self.test_size, *self.source())
        if self._splits_key == key:
            return
        train, test = self.load()
        self._splits = Splits.of(
            train,
            test,
            val_size=self.val_size,
            train_size=self.train_size,
            test_size=self.test_size,
            seed=self.seed,
        )
        self._splits_key = key

    def _shift(self) -> None:
        """Compute the shifts that are missing; those of other settings make room."""
        key = (*self._splits_key, self.evaluate_on, self.severity)
        if self._shifted_key != key:
            self._shifted, self._shifted_key = {}, key
        for loader_name, (name, severity) in self._wanted().items():
            if loader_name not in self._shifted:
                self._shifted[loader_name] = self._shifted_images(name, severity)

    def _shifted_images(self, name: str, severity: int) -> Images:
        """Return the held-out images under a shift, from files where they lie in some."""
        there = self.published(name, severity)
        if there is not None:
            return self._splits.chosen(there)
        clean = self._splits.held_out(self.evaluate_on)
        return clean.shifted(self.change(name, severity), self.seed)
