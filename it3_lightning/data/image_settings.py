"""What every data module of images can be told, and the refusal of what it cannot."""

from collections.abc import Sequence

from it3_lightning.data.contract import ShiftedData
from it3_lightning.data.images import Change
from it3_lightning.data.settings import (
    SEVERITIES,
    Severity,
    Split,
    Stream,
    check_choices,
    check_integer,
    check_shifts,
)
from it3_lightning.data.shifts import SHIFTS, TUNING_SHIFTS, Shift


class ImageSettings(ShiftedData):
    """Settings of :class:`~it3_lightning.data.ShiftedImages`, attributes that may be changed.

    Args:
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a validation, test or prediction batch.
        shifts: Names of shifts (see ``SHIFTS`` and ``TUNING_SHIFTS``); may be empty.
        severity: 1 (weak) to 5 (strong), or ``"all"``: each in turn, a loader for each, whose test
            names end in ``/1`` to ``/5``.
        stream: ``"equal"`` keeps the source's samples and order; ``"unequal"`` makes three
            classes ten times as frequent, see :func:`~it3_lightning.data.unequal_stream`.
        evaluate_on: ``"validation"`` has the test loaders hold the validation images, for
            choosing settings without a look at the test images.
        val_size: Samples taken from the training images for validation.
        train_size: Samples to train on, a seeded subset; None for all that validation leaves.
        test_size: Samples to test on, a seeded subset; None for all.
        seed: Seed of the split, the subsets, the shifts, the stream and the training order.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: A setting is out of its range, or the data has too few samples for it.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        shifts: Sequence[str] = SHIFTS,
        severity: Severity = 3,
        stream: Stream = "equal",
        evaluate_on: Split = "test",
        val_size: int = 5000,
        train_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.shifts = shifts
        self.severity: Severity = severity
        self.stream: Stream = stream
        self.evaluate_on: Split = evaluate_on
        self.val_size = val_size
        self.train_size = train_size
        self.test_size = test_size
        self.seed = seed
        self.num_workers = num_workers
        self._check()

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return SHIFTS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return TUNING_SHIFTS

    @property
    def test_names(self) -> list[str]:
        """Names of the test and prediction loaders, in their order: clean first."""
        return ["clean", *self._wanted()]

    def change(self, name: str, severity: int) -> Change:
        """Return the function behind a shift's name.

        Raises:
            ValueError: The name or the severity is unknown.
        """
        return Shift(name, severity)

    def _wanted(self) -> dict[str, tuple[str, int]]:
        """Return name and severity of every shift to test on, by the name of its loader."""
        if self.severity == "all":
            return {
                f"{name}/{level}": (name, level) for name in self.shifts for level in SEVERITIES
            }
        return {name: (name, self.severity) for name in self.shifts}

    def _check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        for name in ("batch_size", "eval_batch_size", "val_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("train_size", "test_size"):
            check_integer(name, getattr(self, name), 1, optional=True)
        for name in ("num_workers", "seed"):
            check_integer(name, getattr(self, name), 0)
        check_choices(self.stream, self.evaluate_on)
        check_shifts(self.shifts, self.severity, self.change)
