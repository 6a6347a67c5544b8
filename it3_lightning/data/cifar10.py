"""CIFAR-10, from files that are there already or downloaded, and CIFAR-10-C beside it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

from it3_lightning.data.augmentation import Augmented, crop_and_flip
from it3_lightning.data.cifar_files import (
    CLASSES,
    TEST_FILES,
    TRAIN_FILES,
    joined,
    read_batch,
    read_corrupted,
)
from it3_lightning.data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, Corruption
from it3_lightning.data.image_set import ImageSet
from it3_lightning.data.images import Batch, Change, Images
from it3_lightning.data.settings import check_corrupted
from it3_lightning.data.shifted import ShiftedImages
from it3_lightning.data.shifts import SHIFTS, TUNING_SHIFTS

Source = Literal["auto", "files", "own"]

_PADDING = 4


class CIFAR10DataModule(ShiftedImages):
    """CIFAR-10: 50,000 training and 10,000 test images ``(B, 3, 32, 32)`` of ten classes.

    The six pickled batches of the "python version" are used as they are in ``root``, or in
    ``root/cifar-10-batches-py`` where torchvision puts them. Where one is missing, torchvision
    downloads them into ``root`` and compares their checksums.

    The test images are shifted either by the published files of CIFAR-10-C, fifteen corruptions
    (``CORRUPTIONS``) and four for choosing settings (``EXTRA_CORRUPTIONS``), or by the library's
    own shifts. The published files hold test images alone; to choose settings without a look at
    these, have ``evaluate_on="validation"`` and ``corruptions="own"``.

    Args:
        root: Folder of the data.
        corruptions: ``"files"``: those of CIFAR-10-C; ``"own"``: the library's shifts; ``"auto"``:
            the files where there is a folder of them, else the own. It is decided when the module
            is made.
        corrupted: Folder of CIFAR-10-C, with ``gaussian_noise.npy`` and the like, and
            ``labels.npy``. None stands for ``root/CIFAR-10-C``.
        shifts: Names of what to test on; None for the fifteen of the files, or the nine own.
        augment: Whether training images are cut out at random places of a frame 4 pixels wider,
            and half of them mirrored.
        download: Whether missing files may be downloaded. CIFAR-10-C never is.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`.

    Raises:
        FileNotFoundError: Files are missing and were not, or could not be, downloaded.
        ValueError: A file is damaged, or a setting is out of its range.
    """

    def __init__(
        self,
        root: str | Path = "data",
        *,
        corruptions: Source = "auto",
        corrupted: str | Path | None = None,
        shifts: Sequence[str] | None = None,
        augment: bool = True,
        download: bool = True,
        **kwargs: Any,
    ) -> None:
        self.root = root
        self.corrupted = Path(root) / "CIFAR-10-C" if corrupted is None else corrupted
        there = corrupted is not None or Path(self.corrupted).is_dir()
        self.corruptions: Source = corruptions
        if corruptions == "auto":
            self.corruptions = "files" if there else "own"
        self.augment = augment
        self.download = download
        standard = CORRUPTIONS if self.corruptions == "files" else SHIFTS
        super().__init__(shifts=standard if shifts is None else shifts, **kwargs)

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return SHIFTS if self.corruptions == "own" else CORRUPTIONS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return TUNING_SHIFTS if self.corruptions == "own" else EXTRA_CORRUPTIONS

    @property
    def num_classes(self) -> int:
        """Ten classes."""
        return CLASSES

    def prepare_data(self) -> None:
        """Make sure that the files are there: look first, then download if that is allowed."""
        self._check()
        if self.corruptions == "files":
            self._look_for_corrupted()
        if self._folder() is not None:
            return
        if not self.download:
            raise self._missing("download=False")
        try:
            CIFAR10(self.root, train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise self._missing(f"the download failed: {error}") from error

    def source(self) -> tuple[object, ...]:
        """Return where the images come from."""
        return (self.root, self.corruptions, self.corrupted)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return all training and all test images; nothing is downloaded here."""
        folder = self._folder()
        if folder is None:
            raise self._missing("prepare_data() has not been called")
        if self.corruptions == "files":
            self._look_for_corrupted()
        train, test = (
            joined([read_batch(folder / name) for name in names])
            for names in (TRAIN_FILES, TEST_FILES)
        )
        self._test_labels = test.labels
        return train, test

    def training(self, images: Images) -> Dataset[Batch]:
        """Return images that are cropped and mirrored at random, where that is asked for."""
        return (
            Augmented(images, partial(crop_and_flip, padding=_PADDING)) if self.augment else images
        )

    def change(self, name: str, severity: int) -> Change:
        """Return the function behind a name; that of a published corruption is never called."""
        if self.corruptions == "files":
            return Corruption(name, severity)
        return super().change(name, severity)

    def published(self, name: str, severity: int) -> ImageSet | None:
        """Return all test images under a corruption of CIFAR-10-C, where these are asked for."""
        if self.corruptions != "files":
            return None
        return read_corrupted(Path(self.corrupted), name, severity, self._test_labels)

    def _check(self) -> None:
        check_corrupted(self.corruptions, ("files", "own"), self.evaluate_on)
        super()._check()

    def _folder(self) -> Path | None:
        """Return the first folder that holds all six batches."""
        for folder in self._folders():
            if all((folder / name).is_file() for name in TRAIN_FILES + TEST_FILES):
                return folder
        return None

    def _folders(self) -> tuple[Path, Path]:
        root = Path(self.root)
        return root, root / CIFAR10.base_folder

    def _missing(self, why: str) -> FileNotFoundError:
        """Build the error that says which files to place where."""
        place, other = (folder.resolve() for folder in self._folders())
        return FileNotFoundError(
            f"Expected the six files {', '.join(TRAIN_FILES + TEST_FILES)} in {place} or in "
            f"{other}, got not all of them in either ({why}). Unpack cifar-10-python.tar.gz there, "
            "or set root to the folder that holds them."
        )

    def _look_for_corrupted(self) -> None:
        """Refuse before any training that files of CIFAR-10-C are missing."""
        folder = Path(self.corrupted)
        names = [f"{name}.npy" for name in (*self.shifts, "labels")]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"Expected {', '.join(names)} of CIFAR-10-C in {folder.resolve()}, got no "
                f"{', '.join(missing)}. Unpack CIFAR-10-C.tar there, set corrupted to the folder "
                'that holds them, or take the library\'s own shifts with corruptions="own".'
            )
