"""`IT3TestTimeCallback`: adapts a module to every test batch, runs its own step, puts it back.

A guest on the Trainer: it translates between Lightning's hooks and the engine and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from it3_lightning.adapters import adapter_of
from it3_lightning.answering import Answering
from it3_lightning.engine import Settings
from it3_lightning.engine.norm import NormStats
from it3_lightning.engine.settings import Anchor, Backend, Reset, Scope
from it3_lightning.engine.updates import OptimizerName
from it3_lightning.gated import GatedGuest
from it3_lightning.guest import STEPS, Stage
from it3_lightning.host import check_trainer, checked_module
from it3_lightning.objectives import Idempotence, TestTimeObjective
from it3_lightning.records import Recorder
from it3_lightning.selection import Selection
from it3_lightning.summary import Summary
from it3_lightning.takeover import Prediction, Runner, WholeBatch, adapting, replace_step


class IT3TestTimeCallback(GatedGuest):
    """Takes over ``test_step`` and ``predict_step``: each runs with weights adapted to its batch.

    The weights adapt to the inputs of the batch alone, the step runs as it is, every weight is put
    back; every dataloader starts from the source. Logged beside the step's own metrics:
    ``it3/distance_source``, ``it3/distance_adapted``, ``it3/reliable`` (share of samples that moved
    the weights), ``it3/skipped`` (their number), ``it3/gated`` (share within the gate, where there
    is one) and ``it3/ms_per_sample``; all of them also in :attr:`summary`, in ``predict`` too.

    Arguments not named here are those of :class:`~it3_lightning.engine.Settings`.

    Args:
        scope: ``"batch"``: one set of adapted weights for a batch; ``"sample"``: each sample its
            own, as if it had come alone: the step runs once, on the whole batch, with ``self(x)``
            answered sample by sample; see :class:`~it3_lightning.answering.Answering`.
        backend: of scope ``"sample"``; ``"auto"`` takes the faster, so that two runs agree to
            rounding only. Name one where they are to agree to the last bit.
        gate: share of validation samples, such as 0.95, whose distance a sample must exceed to be
            adapted to. This callback measures validation samples in ``fit`` and ``validate``, in
            two forward passes a batch, and keeps the quantiles in the module's checkpoint; they
            are those of the weights at that time.
        prediction: what the step predicts: ``"first"``: ``f(x, 0)``; ``"second"``:
            ``f(x, f(x, 0))``, which with ``steps=0`` costs one more forward pass and no gradient;
            ``"mean"``: the mean of both, of probabilities or of values, for steps that predict by
            ``self(...)``: it returns outputs of the same kind, logits for logits.
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
        lr: float | None = None,
        optimizer: OptimizerName | OptimizerCallable | None = None,
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
        settings = Settings(
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
        super().__init__(settings, gate, stages)
        if prediction not in get_args(Prediction):
            raise ValueError(
                f"Expected prediction 'first', 'second' or 'mean', got {prediction!r}."
            )
        self.prediction: Prediction = prediction
        self.independent_ranks = independent_ranks
        self.summary = Summary()

    def taken_over(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage
    ) -> Callable[[], None]:
        """Put a step in the place of the module's own that runs it with adapted weights."""
        host = checked_module(pl_module)
        check_trainer(trainer, pl_module, self.settings, self.independent_ranks)
        settings, name = self.gated(pl_module), STEPS[stage]
        runner: Runner
        if settings.scope == "batch" or settings.steps == 0:
            adapter = adapter_of(pl_module, host, settings)
            runner = WholeBatch(pl_module, host, adapter, self.prediction)
        else:
            runner = Answering(pl_module, host, settings, prediction=self.prediction, step=name)
        self.summary = Summary()
        logs = stage != "predict"
        record = Recorder(pl_module, self.summary, settings, runner.adapter, logs=logs)
        step = adapting(getattr(pl_module, name), host, runner, record)
        return replace_step(pl_module, name, step)

    def finished(self) -> None:
        """Say what adaptation did; warn where nothing was learnt to adapt by."""
        rank_zero_info(f"IT3: {self.summary}")
        if self.summary.distance_source == 0:
            rank_zero_warn(
                "Every second prediction equals the first: the conditioning has not been trained. "
                "Fit the module first, or give it source_checkpoint=... and fit the conditioning."
            )
