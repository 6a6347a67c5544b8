"""Any damage to any file of images, masks or arrays: it is read all the same, or named."""

import gzip
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.road_files import pairs
from helpers.trees import write_cifar10, write_cifar10_c, write_faces, write_imagenet
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from it3_lightning.data import (
    CIFAR10DataModule,
    ImageNetCDataModule,
    MNISTDataModule,
    RoadScenesDataModule,
    RoadsDataModule,
    ShiftedData,
    UTKFaceDataModule,
)
from it3_lightning.data.base import read_npz
from it3_lightning.data.images import read_rgb
from it3_lightning.data.road_files import Pair, Tiles
from it3_lightning.data.roads import RoadScenes, drawn, scene_file

drawing = settings(max_examples=25, deadline=None, derandomize=True)
Bytes = Callable[[bytes], bytes]


@st.composite
def damages(draw: st.DrawFn) -> Bytes:
    """Cut off, turn bits over, most of them near the beginning or the end, or append."""
    share = draw(st.floats(0, 1, exclude_max=True))
    flips = draw(st.lists(st.tuples(st.integers(-64, 192), st.integers(0, 7)), max_size=4))
    kind = draw(st.sampled_from(["cut", "flip", "flip anywhere", "append"]))
    more = draw(st.binary(min_size=1, max_size=40))

    def damage(data: bytes) -> bytes:
        if kind == "cut":
            return data[: int(share * len(data))]
        if kind == "append":
            return data + more
        start = int(share * len(data)) if kind == "flip anywhere" else 0
        changed = bytearray(data)
        for place, bit in flips:
            changed[(start + place) % len(data)] ^= 1 << bit
        return bytes(changed)

    return damage


def write_mnist(folder: Path, end: str) -> None:
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = np.random.default_rng(0).integers(0, 256, (12, 6, 5), dtype=np.uint8)
        for kind, values in (("images", images), ("labels", np.arange(12, dtype=np.uint8) % 10)):
            head = struct.pack(f">{1 + values.ndim}I", 2048 + values.ndim, *values.shape)
            name = f"{part}-{kind}-idx{values.ndim}-ubyte{end}"
            data = head + values.tobytes()
            (folder / name).write_bytes(gzip.compress(data) if end else data)


def write_scenes(root: Path) -> None:
    root.mkdir()
    parts = {part: drawn(RoadScenes(16), 3, 0, part) for part in ("train", "validation", "test")}
    arrays: dict[str, Any] = {}
    for part, scenes in parts.items():
        arrays |= {f"{part}_images": scenes.images.numpy(), f"{part}_masks": scenes.masks.numpy()}
    np.savez_compressed(scene_file(root, 16, 0), **arrays)


def write_lists(root: Path) -> None:
    write_faces(root, [10 + n for n in range(12)], 16)
    names = sorted(path.name for path in root.iterdir())
    (root / "train.txt").write_text("\n".join(names[:8]))
    (root / "test.txt").write_text("\n".join(names[8:]))


def write_roads(root: Path, end: str) -> None:
    pairs(root, 4, 16)
    for file in sorted(root.rglob("*.png")):
        with Image.open(file) as image:
            image.save(file.with_suffix(end))
        if end != ".png":
            file.unlink()


@dataclass
class Case:
    """A data set, the file in it that is damaged, and what reads it."""

    write: Callable[[Path], object]
    file: str
    read: Callable[[Path], ShiftedData]


def mnist(root: Path) -> ShiftedData:
    return MNISTDataModule(root, val_size=2, shifts=[], download=False)


def cifar(root: Path) -> ShiftedData:
    return CIFAR10DataModule(root, val_size=2, shifts=["fog"], download=False)


def faces(root: Path) -> ShiftedData:
    lists: dict[str, Any] = {"train_list": root / "train.txt", "test_list": root / "test.txt"}
    return UTKFaceDataModule(root, val_size=2, image_size=8, shifts=[], in_memory=True, **lists)


def roads(root: Path) -> ShiftedData:
    return RoadsDataModule(root, layout="pairs", tile=16, shifts=[])


def scenes(root: Path) -> ShiftedData:
    sizes: dict[str, Any] = {"train_size": 3, "val_size": 3, "test_size": 3}
    return RoadScenesDataModule(root, size=16, shifts=[], **sizes)


def imagenet(root: Path) -> ShiftedData:
    return ImageNetCDataModule(root, image_size=8, corruptions="own", shifts=[], val_size=1)


def write_cifar(root: Path) -> None:
    write_cifar10(root)
    write_cifar10_c(root / "CIFAR-10-C", ("fog",))


CASES = {
    "IDX images": Case(lambda root: write_mnist(root, ""), "train-images-idx3-ubyte", mnist),
    "IDX labels": Case(lambda root: write_mnist(root, ""), "t10k-labels-idx1-ubyte", mnist),
    "gzip": Case(lambda root: write_mnist(root, ".gz"), "t10k-images-idx3-ubyte.gz", mnist),
    "pickle": Case(write_cifar, "cifar-10-batches-py/test_batch", cifar),
    "npy": Case(write_cifar, "CIFAR-10-C/fog.npy", cifar),
    "npy labels": Case(write_cifar, "CIFAR-10-C/labels.npy", cifar),
    "list": Case(write_lists, "test.txt", faces),
    "JPEG": Case(write_lists, "10_0_0_20170116174525125.jpg.chip.jpg", faces),
    "PNG": Case(lambda root: write_roads(root, ".png"), "images/2.png", roads),
    "mask": Case(lambda root: write_roads(root, ".png"), "masks/2.png", roads),
    "TIFF": Case(lambda root: write_roads(root, ".tif"), "images/1.tif", roads),
    "TIFF mask": Case(lambda root: write_roads(root, ".tif"), "masks/1.tif", roads),
    "npz": Case(write_scenes, "scenes_16_seed0.npz", scenes),
    "ImageNet": Case(
        lambda root: write_imagenet(root, 2, 1, ("n01440764",), 16),
        "val/n01440764/ILSVRC2012_val_00000000.JPEG",
        imagenet,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    case = CASES[request.param]
    root = tmp_path_factory.mktemp("data") / "it"
    case.write(root)
    return case, root


def refusal(data: ShiftedData) -> str | None:
    """Read everything, as a Trainer does; return what is said of damage, None where nothing is."""
    try:
        data.prepare_data()
        for loader in (data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()):
            for images, _ in loader:
                assert images.dtype == torch.float32
                assert 0 <= images.min() <= images.max() <= 1
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


@drawing
@given(damage=damages())
def test_a_damaged_file_is_read_or_named(case: tuple[Case, Path], damage: Bytes) -> None:
    (kind, root) = case
    file = root / kind.file
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    try:
        said = refusal(kind.read(root))
    finally:
        file.write_bytes(whole)
    assert said is None or file.name in said


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x1f\x8b", None])
def test_an_empty_or_foreign_file_and_a_folder_in_its_place_are_named(
    case: tuple[Case, Path], content: bytes | None
) -> None:
    kind, root = case
    file = root / kind.file
    whole = file.read_bytes()
    file.unlink()
    try:
        file.mkdir() if content is None else file.write_bytes(content)
        said = refusal(kind.read(root))
    finally:
        file.rmdir() if content is None else file.unlink()
        file.write_bytes(whole)
    place = file.name if content is not None else str(file.parent)  # where no file is
    assert said is not None
    assert place in said


# Deep images and masks


RAMP = np.linspace(0, 65535, 4096).reshape(64, 64)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("16 bits.png", RAMP.astype(np.uint16)),
        ("16 bits.tif", RAMP.astype(np.uint16)),
        ("16 bits.pgm", RAMP.astype(np.uint16)),
        ("float.tif", (RAMP / 65535).astype(np.float32)),
    ],
)
def test_deep_images_are_scaled_by_their_full_range(tmp_path: Path, name: str, values: Any) -> None:
    Image.fromarray(values).save(tmp_path / name)
    image = np.asarray(read_rgb(tmp_path / name)).astype(np.float64)
    assert image.shape == (64, 64, 3)
    assert np.abs(image - (RAMP / 257)[..., None]).max() < 0.502  # rounded, and 16 bits before


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.int32),
        (RAMP / 257).astype(np.float32),
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), -0.1, np.float32),
    ],
)
def test_images_of_an_unknown_range_are_refused_by_name(tmp_path: Path, values: Any) -> None:
    file = tmp_path / "deep.tif"
    Image.fromarray(values).save(file)
    with pytest.raises(ValueError, match=r"deep\.tif to hold .* Save it with 8 or 16 bits"):
        read_rgb(file)


def mask_of(root: Path, mask: Image.Image) -> torch.Tensor:
    """Read a mask as the data module does."""
    image, file = root / "image.png", root / "mask.tif"
    Image.new("RGB", mask.size).save(image)
    mask.save(file)
    return Tiles([Pair(image, file)], mask.size[0]).__getitems__([0])[1][0, 0]


TRUTH = np.random.default_rng(0).integers(0, 2, (8, 8), dtype=np.uint8)


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(TRUTH),
        Image.fromarray(TRUTH > 0),
        Image.fromarray(TRUTH.astype(np.uint16)),
        Image.fromarray(TRUTH.astype(np.int32) * 255),
        Image.fromarray(TRUTH.astype(np.float32)),
        Image.fromarray(TRUTH * 255).convert("RGB"),
        Image.fromarray(TRUTH * 255).convert("P"),
    ],
)
def test_masks_of_two_values_are_read_in_any_depth(tmp_path: Path, mask: Image.Image) -> None:
    assert torch.equal(mask_of(tmp_path, mask), torch.from_numpy(TRUTH).float())


def coloured() -> Image.Image:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[..., 2] = TRUTH  # so dark a blue that its grey is 0
    return Image.fromarray(image)


def transparent() -> Image.Image:
    image = Image.new("RGBA", (8, 8))
    image.putalpha(Image.fromarray(TRUTH * 255))
    return image


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.fromarray(RAMP.astype(np.uint16)[:8, :8]), "the values 0, 16, 32, .*, [.]{3}[.] S"),
        (Image.fromarray(TRUTH.astype(np.uint16) * 65535), "the values 0, 65535[.]"),
        (Image.fromarray(TRUTH.astype(np.float32) / 2), r"the values 0\.0, 0\.5[.]"),
        (coloured(), "colours or transparency"),
        (transparent(), "colours or transparency"),
    ],
)
def test_masks_of_anything_else_are_refused_by_name_and_values(
    tmp_path: Path, mask: Image.Image, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"or of 0 and 1, in .*mask\.tif, got {message}"):
        mask_of(tmp_path, mask)


# Arrays and their headers


def test_no_more_is_unpacked_than_the_header_announces(tmp_path: Path) -> None:
    write_mnist(tmp_path / "it", ".gz")
    file = tmp_path / "it" / "train-images-idx3-ubyte.gz"
    head = struct.pack(">4I", 2051, 12, 6, 5)
    file.write_bytes(gzip.compress(head + bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"idx3-ubyte\.gz to hold 376 bytes .* got at least 377"):
        mnist(tmp_path / "it").setup("fit")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    file.write_bytes(gzip.compress(struct.pack(">4I", 2051, 2**31, 2**15, 5)))
    with pytest.raises(ValueError, match=r"idx3-ubyte\.gz to hold \d+ bytes .* got at most \d+"):
        mnist(tmp_path / "it").setup("fit")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_test_images_of_another_size_are_refused_by_name(tmp_path: Path, end: str) -> None:
    write_mnist(tmp_path / "it", end)
    file = tmp_path / "it" / f"t10k-images-idx3-ubyte{end}"
    data = struct.pack(">4I", 2051, 12, 3, 10) + bytes(360)
    file.write_bytes(gzip.compress(data) if end else data)
    with pytest.raises(ValueError, match=rf"got \(6, 5\) in .* and \(3, 10\) in .*{file.name}"):
        mnist(tmp_path / "it").setup("fit")


def shorter_header(data: bytes) -> bytes:
    """Say that the header of an ``.npy`` file is a byte shorter: all values move by one."""
    return data[:8] + struct.pack("<H", struct.unpack("<H", data[8:10])[0] - 1) + data[10:]


def test_an_array_that_is_longer_than_its_header_says_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    file = tmp_path / "CIFAR-10-C" / "fog.npy"
    whole = file.read_bytes()
    for damaged in (shorter_header(whole), whole + b"\0"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"fog\.npy to be a whole .npy file.* its header says"):
            cifar(tmp_path).setup("test")
    with zipfile.ZipFile(tmp_path / "fog.npz", "w") as archive:
        archive.writestr("fog.npy", shorter_header(whole))
    with pytest.raises(ValueError, match=r"fog\.npz .* fog holds more than its header says"):
        read_npz(tmp_path / "fog.npz", ["fog"], "")
