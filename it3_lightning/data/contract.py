"""What a benchmark needs of a data module: the same held-out samples, clean and under shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningDataModule

from it3_lightning.data.settings import Split, Stream


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
        baseline_errors: of a reference network by shift, in per cent, each the mean over five
            severities, where all of these are tested on: then the benchmark reports the mean
            corruption error. None where not.
    """

    seed: int
    stream: Stream
    evaluate_on: Split
    shifts: Sequence[str]

    @property
    def baseline_errors(self) -> Mapping[str, float] | None:
        """Errors to compare with; none."""
        return None

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on; none."""
        return ()

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings; none.

        No result is reported on them. They go with ``evaluate_on="validation"``.
        """
        return ()

    @property
    def test_names(self) -> list[str]:
        """Names of the test and prediction loaders, in their order: clean first."""
        return ["clean", *self.shifts]
