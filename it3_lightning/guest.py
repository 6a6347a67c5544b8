"""A guest on the Trainer: takes a step over when a run starts, gives it back however it ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

Stage = Literal["validate", "test", "predict"]
STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}


class Guest(Callback):
    """Takes steps over late and gives them back early.

    Args:
        stages: where to take over; ``"validate"`` includes the validation inside ``fit``.

    Raises:
        ValueError: a stage is unknown.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if unknown := [stage for stage in stages if stage not in STEPS]:
            raise ValueError(f"Expected stages among {', '.join(STEPS)}, got {unknown}.")
        self.stages = tuple(stages)
        self._undo: Callable[[], None] | None = None

    @abstractmethod
    def taken_over(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage
    ) -> Callable[[], None]:
        """Take over the step of a stage; return what undoes it."""

    def finished(self) -> None:
        """Say what is to be said when a run has ended well; called before the step goes back."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over ``validation_step``, where asked to."""
        if not trainer.sanity_checking:
            self._take_over(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over ``test_step``."""
        self._take_over(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over ``predict_step``."""
        self._take_over(trainer, pl_module, "predict")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``validation_step`` back."""
        self._finish()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``test_step`` back."""
        self._finish()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``predict_step`` back."""
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the step back after an error or an interruption."""
        self._give_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the step back, whatever happened."""
        self._give_back()

    def _take_over(self, trainer: Trainer, module: LightningModule, stage: Stage) -> None:
        if stage in self.stages:
            self._undo = self.taken_over(trainer, module, stage)

    def _finish(self) -> None:
        if self._undo is not None:
            self.finished()
        self._give_back()

    def _give_back(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
