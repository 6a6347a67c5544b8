"""MNIST and Fashion-MNIST, from files that are there already or downloaded."""

from pathlib import Path
from typing import Any, ClassVar

from torchvision.datasets import MNIST, FashionMNIST

from it3_lightning.data.images import idx
from it3_lightning.data.images.downloading import download
from it3_lightning.data.images.image_set import ImageSet
from it3_lightning.data.images.shifted import ShiftedImages

_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


class MNISTDataModule(ShiftedImages):
    """MNIST: 60,000 training and 10,000 test images ``(B, 1, 28, 28)`` of ten digits.

    IDX files in ``root``, or in ``root/MNIST/raw`` where torchvision puts them, are used as they
    are, plain or gzipped. Where there are none, torchvision downloads them into ``root``.

    Args:
        root: Folder of the data.
        download: Whether missing files may be downloaded.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`.

    Raises:
        FileNotFoundError: Files are missing and were not, or could not be, downloaded.
        ValueError: A file is damaged, or a setting is out of its range.
    """

    _torchvision: ClassVar[type[MNIST]] = MNIST

    def __init__(self, root: str | Path = "data", *, download: bool = True, **kwargs: Any) -> None:
        self.root = root
        self.download = download
        super().__init__(**kwargs)

    def source(self) -> tuple[object, ...]:
        """Return where the images come from."""
        return (self.root,)

    @property
    def num_classes(self) -> int:
        """Ten classes."""
        return 10

    def prepare_data(self) -> None:
        """Make sure that the four files are there: look first, then download if that is allowed."""
        self.check()
        if self._files() is None:
            download(self._torchvision, self.root, allowed=self.download, missing=self._missing)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return all training and all test images; nothing is downloaded here."""
        files = self._files()
        if files is None:
            raise self._missing("prepare_data() has not been called")
        train, test = (self._read(*pair) for pair in files)
        return train, test

    def _files(self) -> list[tuple[Path, Path]] | None:
        """Return the image and label files for training and testing, from the first folder."""
        for folder in self._folders():
            pairs = [idx.find(folder, part) for part in ("train", "t10k")]
            found = [pair for pair in pairs if pair is not None]
            if len(found) == 2:
                return found
        return None

    def _folders(self) -> tuple[Path, Path]:
        root = Path(self.root)
        return root, root / self._torchvision.__name__ / "raw"

    def _missing(self, why: str) -> FileNotFoundError:
        """Build the error that says which files to place where."""
        place, other = (folder.resolve() for folder in self._folders())
        return FileNotFoundError(
            f"Expected the four files {', '.join(_FILES)} (plain, or with .gz) in {place} or in "
            f"{other}, got not all of them in either ({why}). Place them there, or set root to "
            "the folder that holds them."
        )

    def _read(self, images: Path, labels: Path) -> ImageSet:
        """Read one part, and refuse labels that are no class of this data."""
        pixels, classes = idx.read(images, labels)
        if classes.max() >= self.num_classes:
            raise ValueError(
                f"Expected labels from 0 to {self.num_classes - 1} in {labels}, got "
                f"{classes.max()}. Put the label file of this data in its place."
            )
        return ImageSet(pixels[:, None], classes)


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images ``(B, 1, 28, 28)`` of ten garments.

    Files are looked for as in :class:`MNISTDataModule`, with ``root/FashionMNIST/raw`` for
    torchvision's folder. On Debian, the package ``dataset-fashion-mnist`` puts them in
    ``/usr/share/datasets/fashion-mnist``, which serves as ``root``.
    """

    _torchvision: ClassVar[type[MNIST]] = FashionMNIST
