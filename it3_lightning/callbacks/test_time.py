"""Callback: adapts a module to every test batch, runs its own step, puts everything back.

It translates between Lightning's hooks and the engine, and computes nothing itself.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from it3_lightning.calibration import Calibration
from it3_lightning.callbacks.checks import check_trainer, wait_for_all
from it3_lightning.callbacks.gate import gate_of
from it3_lightning.callbacks.source import SourceData
from it3_lightning.callbacks.summary import Recorder, Summary
from it3_lightning.engine import Settings
from it3_lightning.engine.optimizers import OptimizerName
from it3_lightning.engine.selection import Selection
from it3_lightning.engine.types import Anchor, Backend, NormStats, Reset, Scope
from it3_lightning.integration.module import UNTRAINED, host_of, untrained
from it3_lightning.integration.module_adapter import BatchStep, WhichPrediction, adapter_of
from it3_lightning.integration.namespaces import AnyCallback
from it3_lightning.integration.per_sample_step import PerSampleStep
from it3_lightning.integration.policies import (
    Policy,
    calibration_in,
    check_policy,
    check_prediction,
)
from it3_lightning.integration.stream_gate import Runner, check_delta
from it3_lightning.methods import Idempotence, TestTimeMethod, TestTimeObjective
from it3_lightning.priors.classes import OutputKind

Stage = Literal["validate", "test", "predict"]
Step = Callable[..., Any]

STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}


class TestTimeCallback(AnyCallback):
    """Takes over ``test_step`` and ``predict_step``: each runs with weights adapted to its batch.

    The weights adapt to the inputs of the batch alone, the step runs as it is, every weight is put
    back; every dataloader starts from the source. Logged beside the step's own metrics:
    ``it3/distance_source``, ``it3/distance_adapted``, ``it3/moved`` (share of samples that moved
    the weights), ``it3/skipped`` (their number), ``it3/gated`` (share within the gate, where there
    is one) and ``it3/ms_per_sample`` (milliseconds a sample of the whole step: adaptation,
    measuring, choice of the backend, the module's own step, these logs); all of them also in
    :attr:`summary`, in ``predict`` too.
    Methods that need no prior run on any LightningModule as it is.

    Where no argument says how to adapt, it does as ``it3 calibrate`` chose for this module, as with
    ``policy="calibrated"``; where nothing was chosen for these weights, nothing is adapted, the
    distances are measured, and a warning says so.

    Arguments not named here are those of :class:`~it3_lightning.engine.Settings`.

    Args:
        method: how to adapt: one of :mod:`it3_lightning.methods`, or a callable
            ``(y0, second) -> Objective``. Default: idempotence, where another argument says how.
        scope: whether a batch or each sample has its own weights. Default: the method's own, else
            ``"batch"``.
        backend: of scope ``"sample"``. Default: the method's own, else the faster one.
        steps: optimizer steps per batch; 0 adapts nothing. Default: the method's own, else 1.
        lr: learning rate; of ``"polyak"`` the share of the distance that a step is to take away.
            Default: the method's own, else that of the optimizer.
        optimizer: a name or a callable that takes the parameters. Default: the method's own, else
            as :class:`~it3_lightning.engine.Settings` choose it.
        parameters: which parameters adapt. Default: the method's own, else all.
        reset: when the weights go back to the source. Default: the method's own, else before every
            batch.
        anchor: weights of the second pass. Default: the method's own, else the source.
        norm_stats: statistics of BatchNorm layers. Default: the method's own, else the source's.
            With ``"evidence"`` this callback measures validation samples in ``fit`` and
            ``validate``, in one forward pass a batch, without their labels.
        norm_prior: samples that the source's statistics count as, with ``norm_stats="mixed"``.
            Default: the method's own, else 16.
        ema_decay: share of the old average kept at each step, with ``anchor="ema"``. Default: the
            method's own, else 0.99.
        weight_ensembling: share of the way back to the source that weights go after each step.
            Default: the method's own, else 0.
        gate: share of validation samples, such as 0.95, whose distance a sample must exceed to be
            adapted to. This callback measures validation samples in ``fit`` and ``validate``, in
            two forward passes a batch, and keeps the quantiles in the module's checkpoint; with
            other weights than at that time they are refused. ``"bet"``: every dataloader keeps the
            source's first predictions until a bet against the distances of validation samples, kept
            likewise, has proved that it is no stream of such samples; from then on, that batch
            included, it is adapted to. See :mod:`it3_lightning.engine.betting`.
        delta: of ``gate="bet"``: probability that a dataloader of samples like the validation
            samples, in random order, is ever adapted to, at most.
        prediction: what the step predicts: ``"first"``: ``f(x, 0)``; ``"second"``:
            ``f(x, f(x, 0))``, which with ``steps=0`` costs one more forward pass and no gradient;
            ``"mean"``: the mean of both, of probabilities or of values, for steps that predict by
            ``self(...)``: it returns outputs of the same kind, logits for logits.
        stages: where to adapt; ``"validate"`` includes the validation inside ``fit``.
        independent_ranks: allow carried weights (``reset`` other than ``"batch"``), contexts
            (``context="stream"`` of the prior) and bets (``gate="bet"``) on several processes, each
            of which then has those of its own share of the stream.
        outputs: what the outputs of a module without a prior are: ``"logits"`` or
            ``"probabilities"``; a module with a prior knows.
        policy: ``"calibrated"``: adapt as ``it3 calibrate`` chose for this module on validation
            data, which may be not at all, and put into its checkpoint. It says how to predict, so
            only ``stages``, ``independent_ranks`` and ``outputs`` go beside it. Where none was
            chosen, or for other weights, the run is refused, which it is not without this argument.

    Raises:
        ValueError: a value is out of range or a name unknown.
        MisconfigurationException: when a run starts that cannot be adapted, before any batch.

    Example::

        Trainer(callbacks=[TestTimeCallback(Tent())]).test(model, datamodule=data)
    """

    __test__ = False  # its name is no test's

    def __init__(
        self,
        method: TestTimeMethod | TestTimeObjective | None = None,
        *,
        scope: Scope | None = None,
        backend: Backend | None = None,
        steps: int | None = None,
        lr: float | None = None,
        optimizer: OptimizerName | OptimizerCallable | None = None,
        parameters: Selection | None = None,
        reset: Reset | None = None,
        anchor: Anchor | None = None,
        norm_stats: NormStats | None = None,
        norm_prior: int | None = None,
        ema_decay: float | None = None,
        weight_ensembling: float | None = None,
        gate: float | Literal["bet"] | None = None,
        delta: float = 0.01,
        prediction: WhichPrediction = "first",
        stages: Sequence[Stage] = ("test", "predict"),
        independent_ranks: bool = False,
        outputs: OutputKind = "logits",
        policy: Literal["calibrated"] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        objective = Idempotence() if method is None else method
        given = {
            "scope": scope,
            "backend": backend,
            "steps": steps,
            "lr": lr,
            "optimizer": optimizer,
            "parameters": parameters,
            "reset": reset,
            "anchor": anchor,
            "norm_stats": norm_stats,
            "norm_prior": norm_prior,
            "ema_decay": ema_decay,
            "weight_ensembling": weight_ensembling,
        }  # a method has its own, and a command line gives every argument
        told = {name: value for name, value in given.items() if value is not None}
        beside = {"method": method, "gate": gate, **told}
        names = [name for name, value in beside.items() if value is not None]
        names += [k for k, v in settings.items() if v not in (None, getattr(Settings, k, None))]
        names += ["prediction"] * (prediction != "first")
        check_policy(policy, names)
        if not names:
            told["steps"] = 0  # until a run finds a policy
        settings = {**getattr(objective, "defaults", {}), **settings, **told}
        self.settings = Settings(objective=objective, **settings)
        check_delta(delta)
        self._gate = None if gate is None else gate_of(gate, delta, self.settings, outputs)
        needed = self.settings.needs_source
        self._source = SourceData(self.settings, outputs) if needed else None
        check_prediction(prediction, self.settings)
        if unknown := [stage for stage in stages if stage not in STEPS]:
            raise ValueError(f"Expected stages among {', '.join(STEPS)}, got {unknown}.")
        if self._source is not None and "validate" in stages:
            raise ValueError(
                f"{self._source.what} sees source data in stage 'validate', so it cannot adapt "
                "there. Leave out the stage."
            )
        if gate not in (None, "bet") and self.settings.norm_stats == "evidence":
            raise ValueError(
                "The gate is calibrated on the validation data that norm_stats='evidence' has yet "
                "to see. Leave out the gate, or use other norm_stats."
            )
        if gate is not None and "validate" in stages:
            raise ValueError(
                "The gate is calibrated on validation data, so it cannot gate stage 'validate'. "
                "Leave out the gate or the stage."
            )
        self.prediction: WhichPrediction = prediction
        self.stages = tuple(stages)
        self.independent_ranks = independent_ranks
        self.outputs: OutputKind = outputs
        self.policy = policy
        self._follows = not names  # a policy, as nothing else says how to adapt
        self._calibration: Calibration | None = None  # of a checkpoint; else the module's own
        self.summary = Summary()
        self._untrained = False  # whether nothing was learnt to adapt by
        self._doubt = ""  # why nothing is adapted, though nobody chose that
        self._steps: list[AdaptedStep] = []  # taken over and not given back yet, the latest last

    @classmethod
    def from_checkpoint(cls, path: str | Path, **arguments: Any) -> Self:
        """Return a callback that adapts as ``it3 calibrate`` chose for a checkpoint.

        It is ``policy="calibrated"`` for a module that keeps no calibration, and its settings can
        be looked at before a run.

        Args:
            path: of the checkpoint, a file; what it holds runs no code.
            arguments: ``stages``, ``independent_ranks``, ``outputs``.

        Raises:
            ValueError: it is no checkpoint of a Trainer, or holds no policy.
        """
        callback = cls(policy="calibrated", **arguments)
        callback._calibration = calibration_in(path)
        callback._follow(Policy.read(callback._calibration.policy))
        return callback

    @property
    def gate(self) -> float | Literal["bet"] | None:
        """Share of the validation samples within the gate, or ``"bet"``, if there is one."""
        return None if self._gate is None else self._gate.level

    # What Lightning calls, in the order of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback; before fitting, what its validation could not adapt to."""
        name = str(getattr(stage, "value", stage))
        self._check_alone(trainer, "validate" if name == "fit" else name)
        if stage == "fit" and ("validate" in self.stages or self.gate is not None):
            host_of(pl_module, self.settings.method, outputs=self.outputs, fitted=False)
        if self._gate is not None:
            self._gate.check(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over ``validation_step`` where asked to; with a gate, begin to calibrate."""
        if not trainer.sanity_checking:
            self._take_over(trainer, pl_module, "validate")
        if self._gate is not None:
            self._gate.start(trainer, pl_module)
        if self._source is not None:
            self._source.start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over ``test_step``."""
        self._take_over(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over ``predict_step``."""
        self._take_over(trainer, pl_module, "predict")

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the distances of a validation batch, for the gate."""
        if self._gate is not None:
            self._gate.measure(trainer, batch)
        if self._source is not None:
            self._source.add(trainer, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the quantiles of these distances in the module, before a checkpoint is written."""
        if self._gate is not None:
            self._gate.finish(trainer)
        if self._source is not None:
            self._source.finish()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``validation_step`` back."""
        self._finish(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``test_step`` back."""
        self._finish(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``predict_step`` back; fail where another process has not come to its end."""
        self._finish(trainer)
        wait_for_all(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the step back after an error or an interruption; forget what was measured."""
        self._return_steps(trainer)
        if self._gate is not None:
            self._gate.cancel()
        if self._source is not None:
            self._source.cancel()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what the method took from source data beside the weights."""
        if self._source is not None:
            self._source.save(checkpoint)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take it back; Lightning asks for it where fitting goes on."""
        if self._source is not None:
            self._source.restore(checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the step back, whatever happened."""
        self._return_steps(trainer)

    # How it works

    def _take_over(self, trainer: Trainer, module: LightningModule, stage: Stage) -> None:
        """Put a step in the place of the module's own that runs it with adapted weights."""
        self._return_steps(trainer)  # of a run that never ended
        name = STEPS[stage]
        left = vars(module).get(name)
        if isinstance(left, AdaptedStep) and not left.going_on:
            left.give_back()
        if stage not in self.stages:
            return
        source, summary = self._source, Summary()
        if self._follows:
            known = self.policy is not None
            policy = Policy.of(module, self._calibration) if known else Policy.default(module)
            source, summary.policy = self._follow(policy), policy.name
            self._doubt = policy.doubt
        host = host_of(module, self.settings.method, outputs=self.outputs)
        settings, moments = self.settings, None
        measured = bool(settings.steps or settings.measure or settings.predicts)
        second = self.prediction != "first" or (settings.method.needs_prior and measured)
        self._untrained = second and untrained(module)
        bets = self._gate is not None and self._gate.level == "bet"
        alone = self.independent_ranks
        check_trainer(trainer, module, settings, alone, second=second, bets=bets)
        if source is not None:
            source.load(module)
            moments = source.moments
        if self._gate is not None:
            settings = self._gate.settings_for(module)
        runner: Runner
        still = settings.steps == 0 and settings.norm_stats == "source"
        if settings.scope == "batch" or still:
            adapter = adapter_of(
                module, host, settings, moments=moments, prediction=self.prediction
            )
            runner = BatchStep(module, host, adapter, self.prediction)
        else:
            runner = PerSampleStep(
                module, host, settings, prediction=self.prediction, step=name, moments=moments
            )
        if self._gate is not None:
            runner = self._gate.runner(module, host, runner)
        self.summary = summary
        logs = stage != "predict"
        record = Recorder(module, self.summary, settings, runner.adapter, logs=logs)
        step = AdaptedStep(trainer, module, name, host.it3_inputs, runner, record)
        self._steps.append(step)
        step.take_over()

    def _follow(self, policy: Policy) -> SourceData | None:
        """Adapt by a policy from now on; return what holds its source data, if it needs some."""
        self.settings, self.prediction = policy.settings, policy.prediction
        if not self.settings.needs_source:
            return None
        source = SourceData(self.settings, self.outputs)
        if self._calibration is not None:
            kept = (self._calibration.source, self._calibration.moments)
            source.kept = {each["by"]: each for each in kept if each}
        return source

    def _finish(self, trainer: Trainer) -> None:
        """Say what adaptation did, warn where nothing was learnt to adapt by; end the run."""
        if not any(step.trainer is trainer for step in self._steps):
            return
        rank_zero_info(f"IT3: {self.summary}")
        equal = self.summary.distance_source == 0  # which "cross_entropy" of equals is not
        if self._untrained or (equal and self.settings.method.needs_prior):
            rank_zero_warn(UNTRAINED)
        if self._doubt:
            rank_zero_warn(self._doubt)
        self._return_steps(trainer)

    def _return_steps(self, trainer: Trainer) -> None:
        """Give back what this Trainer's runs have taken over; a Trainer inside may have its own."""
        for step in [step for step in reversed(self._steps) if step.trainer is trainer]:
            step.give_back()
            self._steps.remove(step)

    def _check_alone(self, trainer: Trainer, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        adapting = [c for c in callbacks if isinstance(c, TestTimeCallback) and stage in c.stages]
        if len(adapting) > 1 and stage in self.stages:
            names = " and ".join(type(c).__name__ for c in adapting)
            raise MisconfigurationException(
                f"Expected one callback that adapts in stage {stage!r}, got {len(adapting)}: "
                f"{names}. Keep one of them, give them different stages=[...], or run one Trainer "
                "after the other."
            )


class AdaptedStep:
    """Stands in the place of a module's step: runs it with weights adapted to its batch.

    Each dataloader starts from the source. Where the Trainer's run is not going on, as after a
    callback that failed, and in a copy of the module, it is the module's own step.

    Args:
        trainer: whose run it is for.
        module: whose step it is.
        name: of the step.
        inputs_of: returns the inputs of a batch.
        runner: adapts and runs.
        record: takes note of each adaptation, and of its dataloader.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        name: str,
        inputs_of: Callable[[Any], Any],
        runner: Runner,
        record: Recorder,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self._name = name
        self._before = {name: vars(module)[name]} if name in vars(module) else {}
        self._own: Step = getattr(module, name)
        self._inputs_of = inputs_of
        self._runner = runner
        self._record = record
        self._loader = 0
        functools.update_wrapper(self, self._own, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step of one batch."""
        if not self.going_on:
            return self._own(*args, **kwargs)
        batch = args[0] if args else next(iter(kwargs.values()))
        index = kwargs.get("dataloader_idx", args[2] if len(args) > 2 else 0)
        loader = index if isinstance(index, int) else 0
        if loader != self._loader:
            self._runner.restart()
            self._loader = loader
        step = functools.partial(self._own, *args, **kwargs)
        device = self.module.device
        on_cuda = device.type == "cuda"  # where calls return before the work is done
        if on_cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        output, adaptation = self._runner.run(self._inputs_of(batch), step)
        if on_cuda:
            torch.cuda.synchronize(device)
        self._record(adaptation, loader, start)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies of the module have its own step."""
        if self._before:
            return _itself, (self._before[self._name],)
        return getattr, (self.module, self._name)

    @property
    def going_on(self) -> bool:
        """Whether the Trainer is in the run that this is for, with this module."""
        stage = self.trainer.state.stage
        own = self.module._trainer is self.trainer
        return own and stage is not None and STEPS.get(stage.value) == self._name

    def take_over(self) -> None:
        """Take the place of the step on the instance."""
        vars(self.module)[self._name] = self

    def give_back(self) -> None:
        """Put back what batches have left, also one cut short, and the module's own step."""
        self._runner.undo.run()
        self._runner.restart()
        attributes = vars(self.module)
        if attributes.get(self._name) is self:
            attributes.pop(self._name)
            attributes.update(self._before)


def _itself(value: Any) -> Any:
    return value


class IT3TestTimeCallback(TestTimeCallback):
    """Idempotent test-time training (Durasov et al., IT3, ICML 2025), under a Trainer.

    All other arguments, and what it logs, are those of :class:`TestTimeCallback`.

    Args:
        objective: what is minimised; default
            :class:`Idempotence() <it3_lightning.methods.Idempotence>`.

    Raises:
        ValueError: a value is out of range or a name unknown.
        MisconfigurationException: when a run starts that cannot be adapted, before any batch.

    Example::

        Trainer(callbacks=[IT3TestTimeCallback(steps=1)]).test(model, datamodule=data)
    """

    def __init__(
        self, *, objective: TestTimeMethod | TestTimeObjective | None = None, **settings: Any
    ) -> None:
        super().__init__(method=objective, **settings)


def _visible_signature(*classes: type, hidden: Sequence[str] = ()) -> inspect.Signature:
    """Return the signature of the first class with the arguments that it hands on to the others."""
    merged: dict[str, inspect.Parameter] = {}
    for each in classes:
        own: Any = each.__init__  # type: ignore[misc]
        for name, parameter in inspect.signature(own).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name not in hidden:
                merged.setdefault(name, parameter)
    return inspect.Signature(list(merged.values()))


TestTimeCallback.__signature__ = _visible_signature(  # type: ignore[attr-defined]
    TestTimeCallback, Settings, hidden=("self", "objective")
)
IT3TestTimeCallback.__signature__ = _visible_signature(  # type: ignore[attr-defined]
    IT3TestTimeCallback, TestTimeCallback, Settings, hidden=("self", "method")
)
