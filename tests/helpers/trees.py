"""Small data sets in the exact on-disk formats of the real ones."""

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from it3_lightning.data import CORRUPTIONS

CIFAR_TEST = 20
SYNSETS = ("n01440764", "n01443537", "n01484850", "n02123045", "n03000684", "n04548280")
CIFAR_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def pixels(count: int, size: int, seed: int) -> NDArray[np.uint8]:
    """Draw images (N, H, W, 3), smooth enough that JPEG keeps them nearly as they are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    images = [
        Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in coarse
    ]
    return np.stack([np.asarray(image) for image in images])


_Pickler: Any = vars(pickle)["_Pickler"]  # the one in Python, whose opcodes can be chosen


class _Python2(_Pickler):  # type: ignore[misc]  # an untyped base
    """Writes as cPickle of Python 2 did for the published files: text and bytes are BINSTRING."""

    dispatch: ClassVar[dict[type, Any]] = dict(_Pickler.dispatch)

    def _string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        short = len(data) < 256
        head = b"U" + bytes([len(data)]) if short else b"T" + len(data).to_bytes(4, "little")
        self.write(head + data)
        self.memoize(value)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = "numpy.core.multiarray" if obj.__name__ == "_reconstruct" else "numpy"
        self.write(f"c{module}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, np.dtype):
            return NotImplemented
        reduced: Any = obj.__reduce__()
        return (
            reduced[0],
            (reduced[1][0], 0, 1),
            reduced[2],
        )  # numbers, which NumPy now wants to be booleans

    dispatch[str] = dispatch[bytes] = _string
    dispatch[type] = dispatch[type(np.empty)] = save_global


def cifar_batch(images: NDArray[np.uint8], labels: list[int], name: str) -> bytes:
    """Pickle images (N, 32, 32, 3) as a published batch: red, green, blue planes in a row."""
    content = {
        "batch_label": name,
        "labels": labels,
        "data": np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), 3072)),
        "filenames": [f"image_s_{number:06}.png" for number in range(len(images))],
    }
    return _pickled(content)


def _pickled(content: dict[str, Any]) -> bytes:
    file = BytesIO()
    _Python2(file, protocol=2).dump(content)
    return file.getvalue()


def cifar_images() -> tuple[dict[str, NDArray[np.uint8]], dict[str, list[int]]]:
    """Return images and labels by file: five times 40 to train on and 20 to test."""
    counts = {name: CIFAR_TEST if name == "test_batch" else 40 for name in CIFAR_FILES}
    images = {name: pixels(count, 32, seed) for seed, (name, count) in enumerate(counts.items())}
    return images, {name: [i * 7 % 10 for i in range(count)] for name, count in counts.items()}


def write_cifar10(root: Path, folder: str = "cifar-10-batches-py") -> None:
    """Write the six batches and the names of the classes."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    images, labels = cifar_images()
    for name in CIFAR_FILES:
        (root / folder / name).write_bytes(cifar_batch(images[name], labels[name], name))
    meta = {"num_cases_per_batch": 40, "label_names": list("abcdefghij"), "num_vis": 3072}
    (root / folder / "batches.meta").write_bytes(_pickled(meta))


def corrupted_cifar(name: str, severity: int) -> NDArray[np.uint8]:
    """Return the 20 test images of one severity, told from those of every other by their values."""
    kind = sum(map(ord, name)) % 50
    return pixels(CIFAR_TEST, 32, 1000 * severity + kind)


def write_cifar10_c(folder: Path, names: tuple[str, ...] = CORRUPTIONS) -> None:
    """Write five severities in a row for each corruption, and the labels five times."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = cifar_images()[1]["test_batch"]
    np.save(folder / "labels.npy", np.tile(np.array(labels, dtype=np.uint8), 5))
    for name in names:
        stacked = np.concatenate([corrupted_cifar(name, severity) for severity in range(1, 6)])
        np.save(folder / f"{name}.npy", stacked)


def write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    """Write one image (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, "JPEG", quality=95)


def face_name(age: int, number: int, end: str = ".jpg.chip.jpg") -> str:
    """Return a name as the published ones are: age, gender, race, date and time."""
    return f"{age}_{number % 2}_{number % 5}_201701{16_174_525_125 + number}{end}"


def write_faces(folder: Path, ages: list[int], size: int = 40, end: str = ".jpg.chip.jpg") -> None:
    """Write a face for each age; all are different images."""
    for number, image in enumerate(pixels(len(ages), size, 5)):
        write_jpeg(folder / face_name(ages[number], number, end), image)


def image_name(number: int) -> str:
    """Return the name of a validation image of ImageNet."""
    return f"ILSVRC2012_val_{number:08}.JPEG"


def write_imagenet(
    root: Path, train: int = 6, val: int = 3, synsets: tuple[str, ...] = SYNSETS, size: int = 48
) -> None:
    """Write as many images for each synset into ``train`` and ``val``, no two alike."""
    for part, count in (("train", train), ("val", val)):
        images = iter(pixels(len(synsets) * count, size, count))
        for row, synset in enumerate(synsets):
            for number in range(count):
                trained = f"{synset}_{number}.JPEG"
                name = trained if part == "train" else image_name(10 * row + number)
                write_jpeg(root / part / synset / name, next(images))


def write_image_folders(
    root: Path, shifts: tuple[str, ...] = ("night", "rain"), each: int = 8, size: int = 40
) -> None:
    """Write as many images for each of three classes into each folder, no two alike."""
    parts = ["train", "val", *(f"tests/{name}" for name in ("clean", *shifts)), "tuning/blurred"]
    images = iter(pixels(3 * each * len(parts), size, 0))
    for part in parts:
        for label in ("car", "dog", "tree"):
            for number in range(each):
                write_jpeg(root / part / label / f"{number}.jpg", next(images))


def write_imagenet_c(root: Path, folder: Path, names: tuple[str, ...], size: int = 48) -> None:
    """Write grey images of the names in ``val``: darker, the stronger the corruption."""
    for name in names:
        for severity in range(1, 6):
            for image in sorted((root / "val").glob("*/*")):
                grey = np.full((size, size, 3), 250 - 40 * severity, dtype=np.uint8)
                write_jpeg(folder / name / str(severity) / image.parent.name / image.name, grey)
