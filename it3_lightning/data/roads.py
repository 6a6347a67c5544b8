"""Aerial images with masks of the roads, from the files of the usual datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from it3_lightning.data.masked_set import MaskedSet
from it3_lightning.data.road_files import (
    ROADTRACER_TEST_REGIONS,
    Layout,
    Parts,
    folders_of_pairs,
    massachusetts,
    roadtracer,
)
from it3_lightning.data.settings import check_integer
from it3_lightning.data.shifted_masks import ShiftedMasks
from it3_lightning.data.tiles import Tiles
from it3_lightning.messages import unknown


class RoadsDataModule(ShiftedMasks):
    """Tiles of aerial images and of the masks of their roads, clean and shifted, read as needed.

    Sizes count tiles. Images are parted into training, validation and test images before they are
    cut, so no two parts share an image.

    Args:
        root: Folder of the data.
        layout: How the files lie in it.
            ``"massachusetts"``: ``train/sat/*.tiff`` and ``train/map/*.tif``, ``valid``, ``test``
            likewise (Massachusetts Roads Dataset, Mnih 2013);
            ``"roadtracer"``: ``imagery/{city}_{x}_{y}_sat.png`` and
            ``masks/{city}_{x}_{y}_osm.png`` (RoadTracer, Bastani et al. 2018);
            ``"pairs"``: ``images/*`` and ``masks/*`` with the same stems, parted by the seed.
        tile: Height and width of a tile, in pixels. Images are cut from the top left; what does not
            fill a tile at the right and below is not used.
        val_share: Share of the files to validate on, where the layout does not say which.
        test_share: Share of the files to test on, for ``"pairs"``.
        test_regions: Cities to test on, for ``"roadtracer"``; default: those of its authors.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedMasks`.

    Raises:
        FileNotFoundError: A folder is missing or empty.
        ValueError: A setting is out of its range; an image and a mask do not belong together; when
            it is read, a file is damaged or a mask holds other values than 0 and 255, or 0 and 1.
    """

    def __init__(
        self,
        root: str | Path = "data/roads",
        *,
        layout: Layout = "massachusetts",
        tile: int = 256,
        val_share: float = 0.1,
        test_share: float = 0.2,
        test_regions: Sequence[str] = ROADTRACER_TEST_REGIONS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.layout: Layout = layout
        self.tile = tile
        self.val_share = val_share
        self.test_share = test_share
        self.test_regions = test_regions
        self.check()

    def source(self) -> tuple[object, ...]:
        """Return where the files are and how they are parted and cut."""
        shares = self.val_share, self.test_share, tuple(self.test_regions)
        return (str(self.root), self.layout, self.tile, *shares)

    def load(self) -> dict[str, MaskedSet]:
        """Find the files and cut them into tiles, without reading more than their headers."""
        return {part: Tiles(pairs, self.tile) for part, pairs in self._parts().items()}

    def check(self) -> None:
        """Refuse settings out of their range."""
        super().check()
        check_integer("tile", self.tile, 1)
        if self.layout not in get_args(Layout):
            raise ValueError(unknown("layout", self.layout, get_args(Layout)))
        for name in ("val_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"Expected {name} between 0 and 1, got {getattr(self, name)}. "
                    "It is a share of the files."
                )
        if isinstance(self.test_regions, str):
            raise ValueError(
                f"Expected test_regions to be a list of names, got {self.test_regions!r}. "
                f"Write [{self.test_regions}]."
            )

    def _parts(self) -> Parts:
        root = Path(self.root)
        if self.layout == "massachusetts":
            return massachusetts(root)
        if self.layout == "roadtracer":
            return roadtracer(
                root, seed=self.seed, val_share=self.val_share, test_regions=self.test_regions
            )
        return folders_of_pairs(
            root, seed=self.seed, val_share=self.val_share, test_share=self.test_share
        )
