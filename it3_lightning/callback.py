"""`IT3TestTimeCallback`: adapts a module to every test batch, runs its own step, puts it back.

A guest on the Trainer: it translates between Lightning's hooks and the engine, and computes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from it3_lightning.engine import Adaptation, BatchAdapter, Settings
from it3_lightning.engine.norm import NormStats
from it3_lightning.engine.settings import Anchor, Reset
from it3_lightning.engine.updates import OptimizerName
from it3_lightning.host import check_trainer, checked_module, normal
from it3_lightning.muting import silent
from it3_lightning.objectives import Idempotence, TestTimeObjective
from it3_lightning.protocols import IT3Module
from it3_lightning.selection import Selection
from it3_lightning.summary import Summary

Stage = Literal["validate", "test", "predict"]
_Step = Callable[..., Any]
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
        unknown = [stage for stage in stages if stage not in _STEPS]
        if unknown:
            raise ValueError(f"Expected stages among {', '.join(_STEPS)}, got {unknown}.")
        if prediction not in ("first", "second"):
            raise ValueError(f"Expected prediction 'first' or 'second', got {prediction!r}.")
        self.prediction = prediction
        self.stages = tuple(stages)
        self.independent_ranks = independent_ranks
        self.summary = Summary()
        self._undo: Callable[[], None] | None = None

    # Hooks: take over late, give back early

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
        self._give_back()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``test_step`` back."""
        self._give_back()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``predict_step`` back and say what adaptation did, as nothing is logged there."""
        if self._undo is not None:
            rank_zero_info(f"IT3: {self.summary}")
        self._give_back()

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
        if stage not in self.stages:
            return
        self._give_back()
        adapter = self._adapter(trainer, module)
        self.summary = Summary()
        name = _STEPS[stage]
        step = self._adapting(adapter, module, getattr(module, name), logs=stage != "predict")
        self._undo = _replaced(module, name, step)

    def _adapting(
        self, adapter: BatchAdapter, module: LightningModule, step: _Step, *, logs: bool
    ) -> _Step:
        """Return the step, run with weights adapted to its batch."""
        host = checked_module(module)
        current = [0]

        @functools.wraps(step)
        def adapting(batch: Any, *args: Any, **kwargs: Any) -> Any:
            loader = _loader_index(args, kwargs)
            if loader != current[0]:
                adapter.restart()
                current[0] = loader
            inputs = normal(host.it3_inputs(batch))
            with adapter.adapted(inputs) as adaptation, self._second_prior(host, inputs):
                output = step(batch, *args, **kwargs)
            self._record(module, adaptation, logs=logs)
            return output

        return adapting

    def _second_prior(self, host: IT3Module, inputs: Any) -> AbstractContextManager[None]:
        """Let the step see the first prediction as prior, where the second one is wanted."""
        if self.prediction == "first":
            return nullcontext()
        with torch.no_grad():
            outputs = host.predict_with(inputs, None)
        return host.it3_given(host.it3_prior.from_output(outputs))

    def _give_back(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def _adapter(self, trainer: Trainer, module: LightningModule) -> BatchAdapter:
        """Refuse what cannot be adapted; else return the engine for this module."""
        host = checked_module(module)
        check_trainer(trainer, module, self.settings, self.independent_ranks)

        def forward(inputs: Any, prior: Tensor | None) -> Tensor:
            with silent(module):
                return host.predict_with(inputs, prior)

        try:
            adapter = BatchAdapter(module, forward, host.it3_prior.from_output, self.settings)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        weights = sum(p.numel() for p in adapter.selected.values())
        rank_zero_info(
            f"IT3 adapts {weights:,} weights in {len(adapter.selected)} parameters: "
            f"{', '.join(adapter.selected)}"
        )
        return adapter

    def _record(self, module: LightningModule, adaptation: Adaptation, *, logs: bool) -> None:
        if adaptation.reason is not None and adaptation.reason not in self.summary.reasons:
            rank_zero_warn(f"IT3 keeps the source prediction of a batch: {adaptation.reason}.")
        self.summary.add(adaptation)
        if not logs:
            return
        size = adaptation.skipped.numel()
        log = functools.partial(
            module.log, on_step=False, on_epoch=True, sync_dist=module.trainer.world_size > 1
        )
        if self.settings.measure:
            for name in ("distance_source", "distance_adapted"):
                values: Tensor | None = getattr(adaptation, name)
                mean = 0.0 if values is None else values.mean()
                log(f"it3/{name}", mean, batch_size=0 if values is None else size)
        moved = 0.0 if adaptation.reliable is None else adaptation.reliable.float().mean()
        log("it3/reliable", moved, batch_size=size)
        log("it3/skipped", float(adaptation.skipped.sum()), reduce_fx="sum", batch_size=size)
        log("it3/ms_per_sample", 1000 * adaptation.seconds / size, batch_size=size)


def _replaced(module: LightningModule, name: str, step: _Step) -> Callable[[], None]:
    """Put a step on the instance; return what puts the former state of the instance back."""
    attributes = vars(module)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = step

    def undo() -> None:
        attributes.pop(name, None)
        attributes.update(before)

    return undo


def _loader_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return which dataloader a batch comes from: ``dataloader_idx``, after ``batch_idx``."""
    index = kwargs.get("dataloader_idx", args[1] if len(args) > 1 else 0)
    return index if isinstance(index, int) else 0
