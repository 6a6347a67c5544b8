"""`IT3TestTimeCallback`: adapts a module to every test batch, runs its own step, puts it back.

A guest on the Trainer: it translates between Lightning's hooks and the engine and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from it3_lightning.engine import Settings
from it3_lightning.engine.norm import NormStats
from it3_lightning.engine.settings import Anchor, Reset
from it3_lightning.engine.updates import OptimizerName
from it3_lightning.host import check_trainer, checked_module
from it3_lightning.objectives import Idempotence, TestTimeObjective
from it3_lightning.protocols import IT3Module
from it3_lightning.records import Recorder
from it3_lightning.selection import Selection
from it3_lightning.summary import Summary
from it3_lightning.takeover import adapter_of, adapting, replace_step, second_prior

Stage = Literal["validate", "test", "predict"]
_STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}


class IT3TestTimeCallback(Callback):
    """Takes over ``test_step`` and ``predict_step``: each runs with weights adapted to its batch.

    The weights adapt to the inputs of the batch alone, the step runs as it is, every weight is put
    back. Logged beside the step's own metrics: ``it3/distance_source``, ``it3/distance_adapted``,
    ``it3/reliable`` (share of samples that moved the weights), ``it3/skipped`` (their number) and
    ``it3/ms_per_sample``; all of them also in :attr:`summary`, in ``predict`` too.

    Args:
        objective: see :class:`~it3_lightning.engine.Settings`, as for all arguments not named here.
        steps: optimizer steps per batch.
        lr: learning rate of a named optimizer.
        optimizer: a name or an ``OptimizerCallable``, whose own learning rate counts.
        parameters: which parameters adapt.
        reset: ``"batch"`` (episodic), ``"never"`` (online), or every ``N`` batches. Every
            dataloader starts from the source.
        anchor: ``"frozen"``, ``"ema"`` or ``"live"``.
        ema_decay: of the EMA anchor.
        norm_stats: ``"source"`` or ``"batch"`` statistics in BatchNorm layers.
        grad_clip: largest total gradient norm.
        measure: whether to measure distances; without, adaptation is cheaper and less is logged.
        prediction: what the step predicts: ``"first"``: ``f(x, 0)``, or ``"second"``:
            ``f(x, f(x, 0))``, which with ``steps=0`` costs one more forward pass and no gradient.
        stages: where to adapt; ``"validate"`` includes the validation inside ``fit``.
        independent_ranks: allow carried weights (``reset`` other than ``"batch"``) on several
            processes, each of which then adapts to its own share of the stream.

    Raises:
        ValueError: a value is out of range or a name unknown.
        MisconfigurationException: when a run starts that cannot be adapted, before any batch.

    Example::

        Trainer(callbacks=[IT3TestTimeCallback(steps=1)]).test(model, datamodule=data)
    """

    def __init__(
        self,
        *,
        objective: TestTimeObjective | None = None,
        steps: int = 1,
        lr: float = 1e-4,
        optimizer: OptimizerName | OptimizerCallable = "adam",
        parameters: Selection = "all",
        reset: Reset = "batch",
        anchor: Anchor = "frozen",
        ema_decay: float = 0.99,
        norm_stats: NormStats = "source",
        grad_clip: float | None = None,
        measure: bool = True,
        prediction: Literal["first", "second"] = "first",
        stages: Sequence[Stage] = ("test", "predict"),
        independent_ranks: bool = False,
    ) -> None:
        self.settings = Settings(
            objective=objective or Idempotence(),
            steps=steps,
            lr=lr,
            optimizer=optimizer,
            parameters=parameters,
            reset=reset,
            anchor=anchor,
            ema_decay=ema_decay,
            norm_stats=norm_stats,
            grad_clip=grad_clip,
            measure=measure,
        )
        if unknown := [stage for stage in stages if stage not in _STEPS]:
            raise ValueError(f"Expected stages among {', '.join(_STEPS)}, got {unknown}.")
        if prediction not in ("first", "second"):
            raise ValueError(f"Expected prediction 'first' or 'second', got {prediction!r}.")
        self.prediction = prediction
        self.stages = tuple(stages)
        self.independent_ranks = independent_ranks
        self.summary = Summary()
        self._undo: Callable[[], None] | None = None

    # Hooks: take over late, give back early

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before fitting what its validation could not adapt."""
        if stage == "fit" and "validate" in self.stages:
            checked_module(pl_module, fitted=False)

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
        """Give ``predict_step`` back and say what adaptation did, as nothing is logged there."""
        if self._undo is not None:
            rank_zero_info(f"IT3: {self.summary}")
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the step back after an error or an interruption."""
        self._give_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the step back, whatever happened."""
        self._give_back()

    # How it works

    def _take_over(self, trainer: Trainer, module: LightningModule, stage: Stage) -> None:
        """Put a step in the place of the module's own that runs it with adapted weights."""
        if stage not in self.stages:
            return
        host = checked_module(module)
        check_trainer(trainer, module, self.settings, self.independent_ranks)
        self.summary = Summary()
        step = adapting(
            getattr(module, _STEPS[stage]),
            host,
            adapter_of(module, host, self.settings),
            around=self._around(module, host),
            record=Recorder(
                module, self.summary, logs=stage != "predict", measured=self.settings.measure
            ),
        )
        self._undo = replace_step(module, _STEPS[stage], step)

    def _finish(self) -> None:
        """Give the step back after a run, and warn where nothing was learnt to adapt by."""
        if self._undo is not None and self.summary.distance_source == 0:
            rank_zero_warn(
                "Every second prediction equals the first: the conditioning has not been trained. "
                "Fit the module first, or give it source_checkpoint=... and fit the conditioning."
            )
        self._give_back()

    def _give_back(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def _around(
        self, module: LightningModule, host: IT3Module
    ) -> Callable[[Any], AbstractContextManager[None]]:
        """Return what surrounds a step, given its inputs."""
        if self.prediction == "second":
            return partial(second_prior, module, host)
        return lambda _: nullcontext()
