"""What the configurations of photographs need to run in a test: small data, small networks."""

from pathlib import Path

from helpers.trees import (
    SYNSETS,
    write_cifar10,
    write_cifar10_c,
    write_faces,
    write_image_folders,
    write_imagenet,
)
from it3_lightning.data import CORRUPTIONS

NETWORK = "--model.network.init_args"
LAYER = "--model.conditioning.init_args.layer"
SMALL_IMAGES = ["--data.image_size=32", "--data.num_workers=0"]
SMALL_SIZES = ["--data.train_size=24", "--data.val_size=8", "--data.test_size=12"]
SMALL_NETWORKS = {
    "cifar10": [f"{NETWORK}.name=test_resnet", f"{LAYER}=network.model.layer2"],
    "utkface": [
        f"{NETWORK}.name=mobilenet_v3_small",
        f"{NETWORK}.weights=none",
        f"{LAYER}=network.model.features.0.0",
        *SMALL_IMAGES,
    ],
    "image_folders": [
        f"{NETWORK}.name=mobilenet_v3_small",
        f"{NETWORK}.weights=none",
        f"{LAYER}=network.model.features.5",
        *SMALL_IMAGES,
    ],
    "imagenet_c_resnet50": [
        f"{NETWORK}.name=mobilenet_v3_small",
        f"{NETWORK}.weights=none",
        f"{LAYER}=network.model.features.5",
        *SMALL_IMAGES,
    ],
    "imagenet_c_vit": [
        f"{NETWORK}.name=test_vit",
        f"{NETWORK}.pretrained=false",
        f"{NETWORK}.image_size=32",
        f"{LAYER}=network.model.blocks.1",
        *SMALL_IMAGES,
    ],
}


def vision_arguments(config: str, folder: Path) -> list[str]:
    """Return the arguments of a configuration, after writing its data once into a folder."""
    root = folder / config.removesuffix("_resnet50").removesuffix("_vit")
    if not root.is_dir():
        write_data(config, root)
    return [f"--data.root={root}", *SMALL_SIZES, *SMALL_NETWORKS[config]]


def write_data(config: str, root: Path) -> None:
    """Write the data of a configuration."""
    if config == "cifar10":
        write_cifar10(root)
        write_cifar10_c(root / "CIFAR-10-C", CORRUPTIONS)
    elif config == "utkface":
        write_faces(root / "UTKFace", [1 + number * 7 % 89 for number in range(200)], 32)
    elif config == "image_folders":
        write_image_folders(root)
    else:
        write_imagenet(root, train=6, val=3, synsets=SYNSETS, size=40)
