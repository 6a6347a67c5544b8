"""Small images of roads in the on-disk formats of the real datasets."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from it3_lightning.data import RoadScenes

SIDE = 64
ROADS = ("massachusetts_roads", "roadtracer", "roads_procedural")


def scenes(count: int, size: int = SIDE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw images `(count, 3, size, size)`, uint8, and their masks `(count, 1, size, size)`."""
    return RoadScenes(size)(count, torch.Generator().manual_seed(seed))


def write_pair(image_path: Path, mask_path: Path, image: Tensor, mask: Tensor) -> None:
    """Write an image `(3, H, W)` and a mask `(1, H, W)` of 0 and 255."""
    for path, pixels in ((image_path, image), (mask_path, mask.to(torch.uint8) * 255)):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture: Image.Image = to_pil_image(pixels)
        picture.save(path)


def massachusetts(root: Path, counts: Sequence[int] = (3, 2, 2), size: int = SIDE) -> Path:
    """Write TIFF files as the Massachusetts Roads Dataset has them."""
    for seed, (part, count) in enumerate(zip(("train", "valid", "test"), counts, strict=True)):
        for number, (image, mask) in enumerate(zip(*scenes(count, size, seed), strict=True)):
            stem = f"1{number:07d}_15"
            folder = root / part
            write_pair(folder / "sat" / f"{stem}.tiff", folder / "map" / f"{stem}.tif", image, mask)
    return root


def roadtracer(
    root: Path,
    names: Sequence[str] = (
        "austin_0_0",
        "austin_-1_0",
        "st louis_0_0",
        "boston_0_-1",
        "new york_0_0",
    ),
    size: int = SIDE,
) -> Path:
    """Write PNG files as RoadTracer's scripts do: images with an alpha channel, grey masks."""
    for name, image, mask in zip(names, *scenes(len(names), size, 7), strict=True):
        opaque = torch.cat([image, torch.full_like(image[:1], 255)])
        paths = root / "imagery" / f"{name}_sat.png", root / "masks" / f"{name}_osm.png"
        write_pair(*paths, opaque, mask)
    return root


def pairs(root: Path, count: int = 6, size: int = SIDE) -> Path:
    """Write `images/` and `masks/` with the same stems."""
    for number, (image, mask) in enumerate(zip(*scenes(count, size, 11), strict=True)):
        write_pair(root / f"images/{number}.png", root / f"masks/{number}.png", image, mask)
    return root


def road_arguments(config: str, folder: Path) -> list[str]:
    """Return the arguments that make a configuration of roads small, after writing its data."""
    sizes = ["--data.train_size=16", "--data.val_size=4", "--data.test_size=6"]
    sizes += ["--data.batch_size=8", "--data.eval_batch_size=4"]
    if config == "roads_procedural":
        return [*sizes, "--data.size=32"]
    root = folder / config
    if not root.is_dir():
        if config == "roadtracer":
            roadtracer(root, size=96)
        else:
            massachusetts(root, (4, 1, 2))
    network = "--model.network.init_args"
    return [
        *sizes,
        f"--data.root={root}",
        "--data.tile=32",
        "--data.num_workers=0",
        f"{network}.encoder_name=tu-test_resnet",
        f"{network}.encoder_depth=4",
        f"{network}.decoder_channels=[16,8,8,4]",
        "--model.conditioning.init_args.layer=network.decoder.blocks.3",
    ]
