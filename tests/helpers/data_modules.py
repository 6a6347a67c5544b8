"""Every data module that tests on shifted samples, small, on files as the real ones are."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.airfoil_files import write_polars, write_self_noise
from helpers.road_files import pairs
from helpers.tables import write_tables
from helpers.trees import write_cifar10, write_cifar10_c, write_faces, write_imagenet
from it3_lightning.data import (
    AdultDataModule,
    AirfoilDataModule,
    AirfoilSelfNoiseDataModule,
    BundledDataModule,
    CIFAR10DataModule,
    CovertypeDataModule,
    DigitsDataModule,
    ImageNetCDataModule,
    RoadScenesDataModule,
    RoadsDataModule,
    ShiftedData,
    UTKFaceDataModule,
)


@dataclass(frozen=True)
class Case:
    """A data module, and what can be asked of it.

    Args:
        kind: its class.
        shifts: two of its shifts, of the same samples as the clean ones.
        settings: that make it small.
        folder: of its files.
        graded: whether its shifts have severities.
        unequal: whether there are classes or values to make a stream of unequal frequencies.
        validates: whether shifts of validation samples can be made.
    """

    kind: type[ShiftedData]
    shifts: tuple[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    graded: bool = True
    unequal: bool = True
    validates: bool = True

    def module(self, root: Path, **changed: Any) -> Any:
        """Return the module with two shifts, on the files in a folder."""
        place = {} if self.folder is None else {"root": root / self.folder}
        return self.kind(**{**place, "shifts": list(self.shifts), **self.settings, **changed})


CASES = {
    "digits": Case(DigitsDataModule, ("fog", "gaussian_noise"), {"train_size": 60}),
    "cifar10": Case(CIFAR10DataModule, ("fog", "blur"), {"val_size": 40}, "cifar"),
    "cifar10_c": Case(
        CIFAR10DataModule, ("fog", "frost"), {"val_size": 40}, "cifar_c", validates=False
    ),
    "imagenet": Case(
        ImageNetCDataModule,
        ("contrast", "brightness"),
        {"val_size": 8, "image_size": 32},
        "imagenet",
    ),
    "faces": Case(
        UTKFaceDataModule,
        ("fog", "blur"),
        {"val_size": 12, "image_size": 16},
        "faces",
        unequal=False,
    ),
    "table": Case(BundledDataModule, ("zeroed", "gaussian_noise"), {"name": "wine"}),
    "values": Case(BundledDataModule, ("zeroed", "scaled"), {"name": "diabetes"}),
    "adult": Case(AdultDataModule, ("zeroed", "gaussian_noise"), {}, "tables/adult"),
    "covertype": Case(CovertypeDataModule, ("zeroed", "gaussian_noise"), {}, "tables/covertype"),
    "scenes": Case(
        RoadScenesDataModule,
        ("fog", "gaussian_noise"),
        {"size": 16, "train_size": 20, "val_size": 10, "test_size": 12},
        unequal=False,
    ),
    "roads": Case(
        RoadsDataModule,
        ("fog", "gaussian_noise"),
        {"layout": "pairs", "tile": 16},
        "roads",
        unequal=False,
    ),
    "self_noise": Case(
        AirfoilSelfNoiseDataModule, ("missing", "gain"), {"train_size": 60}, "noise", graded=False
    ),
    "airfoil_graphs": Case(
        AirfoilDataModule,
        ("rotation", "roughness"),
        {"profiles": 200, "nodes": 8, "test_size": 30, "val_size": 20},
        "airfoils",
        graded=False,
    ),
    "airfoil_rows": Case(
        AirfoilDataModule,
        ("rotation", "resampling"),
        {
            "profiles": 200,
            "nodes": 8,
            "test_size": 30,
            "val_size": 20,
            "representation": "contour",
        },
        "airfoils",
        graded=False,
    ),
}


def write_all(root: Path) -> Path:
    """Write the files of all cases."""
    write_cifar10(root / "cifar")
    write_cifar10(root / "cifar_c")
    write_cifar10_c(root / "cifar_c" / "CIFAR-10-C", ("fog", "frost", "snow"))
    write_imagenet(root / "imagenet")
    write_faces(root / "faces", [1 + 3 * number % 89 for number in range(60)])
    write_tables(root / "tables")
    pairs(root / "roads")
    (root / "noise").mkdir()
    write_self_noise(root / "noise")
    write_polars(root / "airfoils", 200)
    return root


def gather(loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return all inputs, a row for each sample, and all targets of a loader."""
    inputs, targets = zip(*loader, strict=True)
    rows = [
        part.reshape(len(target), -1)
        for part, target in zip(
            (part if isinstance(part, Tensor) else part.x for part in inputs), targets, strict=True
        )
    ]
    return torch.cat(rows), torch.cat(targets)


def same(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    """Say whether two loaders hold bitwise the same samples in the same order."""
    return all(torch.equal(a, b) for a, b in zip(gather(ours), gather(theirs), strict=True))
