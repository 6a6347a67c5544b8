"""Images whose test set is published under corruptions too, or that are corrupted here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from it3_lightning.data.contract import Split
from it3_lightning.data.images import shifts
from it3_lightning.data.images.base import Change
from it3_lightning.data.images.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, Corruption
from it3_lightning.data.images.shifted import ShiftedImages
from it3_lightning.utils.messages import unknown


class CorruptedImages(ShiftedImages):
    """Images tested on under the corruptions of published files, made ones, or own shifts.

    Args:
        root: Folder of the data.
        corruptions: One of ``SOURCES``: ``"files"`` for the published files, ``"made"`` for the
            same kinds made here, ``"own"`` for the library's shifts; or ``"auto"``: the files where
            there is a folder of them, else what comes next. It is decided when the module is made.
        corrupted: Folder of the published files; None for the one in ``root`` with their name.
        augment: Whether training images are cut out and mirrored at random.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`.

    Raises:
        ValueError: A setting is out of its range.
    """

    SOURCES: ClassVar[tuple[str, ...]]
    CORRUPTED: ClassVar[str]

    def __init__(
        self,
        *,
        root: str | Path,
        corruptions: str = "auto",
        corrupted: str | Path | None = None,
        augment: bool = True,
        **kwargs: Any,
    ) -> None:
        self.root = root
        self.corrupted = Path(root) / self.CORRUPTED if corrupted is None else corrupted
        there = corrupted is not None or Path(self.corrupted).is_dir()
        found = "files" if there else self.SOURCES[1]
        self.corruptions = found if corruptions == "auto" else corruptions
        self.augment = augment
        super().__init__(**kwargs)

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return shifts.SHIFTS if self.corruptions == "own" else CORRUPTIONS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return shifts.TUNING_SHIFTS if self.corruptions == "own" else EXTRA_CORRUPTIONS

    def source(self) -> tuple[object, ...]:
        """Return where the images come from."""
        return (self.root, self.corruptions, self.corrupted)

    def change(self, name: str, severity: int) -> Change:
        """Return the function behind a name; that of a published corruption is never called."""
        if self.corruptions == "own":
            return super().change(name, severity)
        return Corruption(name, severity)

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        _check_source(self.corruptions, self.SOURCES, self.evaluate_on)
        super().check()


def _check_source(corruptions: str, known: Sequence[str], evaluate_on: Split) -> None:
    """Refuse an unknown source of corruptions, and files of test images for validation."""
    if corruptions not in known:
        raise ValueError(unknown("source of corruptions", corruptions, known))
    if corruptions == "files" and evaluate_on == "validation":
        raise ValueError(
            'Expected evaluate_on="test" with corruptions="files", got "validation": the published '
            "files hold test images alone. To choose settings without these, set "
            f"corruptions={' or '.join(repr(k) for k in known if k != 'files')}."
        )
