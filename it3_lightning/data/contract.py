"""What a benchmark needs of a data module: the same held-out samples, clean and under shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule

from it3_lightning.data.levels import by_severity
from it3_lightning.data.settings import Severity, Split, Stream


class ShiftedData(LightningDataModule):
    """A LightningDataModule that tests on clean samples and on every shift of them.

    ``test_dataloader`` and ``predict_dataloader`` return one loader for each of ``test_names``, all
    of the same samples in the same order, except for shifts that are other samples. All settings
    may be changed between runs; every loader follows them.

    Attributes:
        seed: of the split, the subsets, the shifts, the stream and the order of training.
        stream: ``"equal"``: the samples as they are; ``"unequal"``: some classes more frequent.
        evaluate_on: ``"test"``, or ``"validation"`` for choosing settings.
        shifts: names of the shifts.
        severity: of the shifts, 1 (weak) to 5 (strong), or ``"all"``: each in turn, a loader for
            each, whose test names end in ``/1`` to ``/5``. None where shifts have no severity.
        baseline_errors: of a reference network by shift, in per cent, each the mean over five
            severities, where all of these are tested on: then the benchmark reports the mean
            corruption error. None where not.
    """

    seed: int
    stream: Stream
    evaluate_on: Split
    shifts: Sequence[str]
    severity: Severity | None = None

    @property
    def baseline_errors(self) -> Mapping[str, float] | None:
        """Errors to compare with; none."""
        return None

    @property
    def test_names(self) -> list[str]:
        """Names of the test and prediction loaders, in their order: clean first."""
        if self.severity is None:
            return ["clean", *self.shifts]
        return ["clean", *by_severity(self.shifts, self.severity)]

    def plain_train_dataloader(self) -> Any:
        """Return the training samples as those of tests come: unchanged, in evaluation batches.

        Here that of training itself: a module that augments or shuffles overrides it.
        """
        return self.train_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the loaders of ``test_dataloader``."""
        return self.test_dataloader()
