"""`IT3TestTimeCallback`: adapts a module to every test batch, runs its own step, puts it back.

A guest on the Trainer: it translates between Lightning's hooks and the engine and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from it3_lightning.calibrating import Calibrating
from it3_lightning.calibration import calibration_of, gate_of, measured_by
from it3_lightning.engine import Settings
from it3_lightning.engine.norm import NormStats
from it3_lightning.engine.settings import Anchor, Backend, Reset, Scope
from it3_lightning.engine.updates import OptimizerName
from it3_lightning.guest import STEPS, Guest, Stage
from it3_lightning.host import check_trainer, checked_module
from it3_lightning.objectives import Idempotence, TestTimeObjective
from it3_lightning.records import Recorder
from it3_lightning.selection import Selection
from it3_lightning.summary import Summary
from it3_lightning.takeover import Prediction, adapted_to, adapter_of, adapting, replace_step


class IT3TestTimeCallback(Guest):
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
        scope: ``"batch"``: one set of adapted weights for a batch; ``"sample"``: each sample its
            own, as if it had come alone. The step then runs once on the whole batch, with
            ``self(x)`` answered by the adapted outputs; see :class:`~it3_lightning.answering`.
        backend: of scope ``"sample"``.
        chunk_size: of scope ``"sample"``.
        memory: of scope ``"sample"``.
        compile: of scope ``"sample"``.
        gate: share of validation samples, such as 0.95, whose distance a sample must exceed to be
            adapted to. Distances of validation samples are measured by this callback in ``fit``
            and ``validate`` and kept in the module's checkpoint.
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
        scope: Scope = "batch",
        backend: Backend = "auto",
        chunk_size: int | Literal["auto"] = "auto",
        memory: int = 2**30,
        compile: bool = False,
        gate: float | None = None,
        prediction: Prediction = "first",
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
            scope=scope,
            backend=backend,
            chunk_size=chunk_size,
            memory=memory,
            compile=compile,
        )
        super().__init__(stages)
        if prediction not in ("first", "second"):
            raise ValueError(f"Expected prediction 'first' or 'second', got {prediction!r}.")
        if gate is not None and not 0 <= gate <= 1:
            raise ValueError(f"Expected gate to be a share in [0, 1] or None, got {gate}.")
        if gate is not None and "validate" in stages:
            raise ValueError(
                "The gate is calibrated on validation data, so it cannot gate stage 'validate'. "
                "Leave out the gate or the stage."
            )
        self.prediction: Prediction = prediction
        self.gate = gate
        self.independent_ranks = independent_ranks
        self.summary = Summary()
        self._calibrating: Calibrating | None = None

    # What Lightning calls, besides what a guest does

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before fitting what its validation could not adapt or calibrate."""
        if stage == "fit" and ("validate" in self.stages or self.gate is not None):
            checked_module(pl_module, fitted=False)
        if self.gate is not None:
            calibration_of(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over ``validation_step`` where asked to; with a gate, begin to calibrate."""
        super().on_validation_start(trainer, pl_module)
        if self.gate is not None and not trainer.sanity_checking:
            self._calibrating = self._calibrate(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the distances of a validation batch, for the gate."""
        if self._calibrating is not None:
            with trainer.precision_plugin.forward_context():
                self._calibrating.add(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the quantiles of these distances in the module."""
        if self._calibrating is not None:
            self._calibrating.finish(trainer)
        self._calibrating = None

    # How it works

    def taken_over(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage
    ) -> Callable[[], None]:
        """Put a step in the place of the module's own that runs it with adapted weights."""
        host = checked_module(pl_module)
        check_trainer(trainer, pl_module, self.settings, self.independent_ranks)
        settings = self.settings
        if self.gate is not None:
            settings = replace(settings, gate=gate_of(pl_module, settings, self.gate))
        self.summary = Summary()
        name = STEPS[stage]
        made = adapter_of(pl_module, host, settings)
        step = adapting(
            getattr(pl_module, name),
            host,
            adapted_to(made, pl_module, host, settings, self.prediction, name),
            restart=made.restart,
            record=Recorder(pl_module, self.summary, settings, made, logs=stage != "predict"),
        )
        return replace_step(pl_module, name, step)

    def finished(self) -> None:
        """Say what adaptation did; warn where nothing was learnt to adapt by."""
        rank_zero_info(f"IT3: {self.summary}")
        if self.summary.distance_source == 0:
            rank_zero_warn(
                "Every second prediction equals the first: the conditioning has not been trained. "
                "Fit the module first, or give it source_checkpoint=... and fit the conditioning."
            )

    def _calibrate(self, module: LightningModule) -> Calibrating:
        still = replace(self.settings, scope="batch", compile=False, steps=0, measure=True)
        by = measured_by(still.objective, still.norm_stats)
        host = checked_module(module)
        return Calibrating(module, host, adapter_of(module, host, still, silent=True), by)
