"""The settings of an adaptation, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from it3_lightning.engine.optimizers import (
    OptimizerFactory,
    OptimizerName,
    Rule,
    optimizer_factory,
    rule_of,
)
from it3_lightning.engine.selection import Selection
from it3_lightning.engine.types import Anchor, Backend, NormStats, Reset, Scope
from it3_lightning.methods import Idempotence, TestTimeMethod, TestTimeObjective, as_method

_LEAST = 0.01  # share of the distance: what is smaller is a learning rate by mistake


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How weights adapt at test time.

    Args:
        scope: ``"batch"``: one set of adapted weights for a batch; ``"sample"``: each sample its
            own, as if it had come alone.
        objective: what is minimised: :class:`~it3_lightning.methods.Idempotence`, another
            method, or a callable ``(y0, second) -> Objective``.
        steps: optimizer steps per batch; 0 adapts nothing.
        lr: learning rate of a named optimizer; of ``"polyak"`` the share of the distance that a
            step is to take away. Default: 0.5 of ``"polyak"``, 1e-4 of the others.
        optimizer: ``"polyak"``: a step as long as the distance asks for, without a learning rate of
            a domain's own; ``"adam"``, ``"adamw"``, ``"sgd"``, ``"momentum"`` (SGD with momentum
            0.9), ``"rmsprop"``; or a callable that takes the parameters. Default: ``"polyak"``;
            where a learning rate is given, and with gradients clipped or a balance term, which do
            not go with it, ``"adam"``.
        parameters: which parameters adapt; see :func:`~it3_lightning.engine.selection.select`.
        reset: when the weights go back to the source: ``"batch"`` (episodic: before every batch),
            ``"weights"`` (before every batch, but the optimizer keeps its state, so that a step
            follows the direction of the stream: what the notebooks published with IT3 do),
            ``"never"`` (online: they are carried along the stream), or before every ``N`` batches,
            skipped ones not counted.
        anchor: weights of the second pass: ``"frozen"`` (the source), ``"ema"`` (an exponential
            moving average of the adapted weights), ``"live"`` (the adapted weights themselves,
            which train in both passes: widens what the anchor accepts, seldom wanted).
        ema_decay: share of the old average kept at each step.
        norm_stats: statistics of BatchNorm layers, in both passes and in the prediction:
            ``"source"``; ``"batch"`` (Nado et al., 2020); ``"mixed"``: the source's, as if of
            ``norm_prior`` samples, and those of the batch (Schneider et al., NeurIPS 2020);
            ``"evidence"``: the source's, moved as far as the batch, or in scope ``"sample"`` the
            sample, differs from source data of the same predicted classes by more than its sampling
            error, see :mod:`it3_lightning.engine.evidence`. These are found once for a batch, by
            the source's weights, and are constants for gradients; they need moments of source data,
            and one to three further forward passes a batch.
        norm_prior: samples ``N`` that the source's statistics count as.
        weight_ensembling: share of the way back to the source that weights go after each step, by
            whatever method: 0.01 in ROID (Marsden et al., WACV 2024), as ``1 - momentum_src``.
        grad_clip: largest total gradient norm, or ``None``.
        measure: also measure the distance of the source and of the adapted weights: two more
            forward passes a batch, four where weights are carried along.
        gate: distance that a sample must exceed to be adapted to; the others keep the source
            prediction (scope ``"sample"``) or do not move the weights (scope ``"batch"``).
        backend: of scope ``"sample"``: ``"vectorised"`` (``torch.func``), ``"loop"``, or the faster
            one on the first batch.
        chunk_size: samples that are vectorised at once; ``"auto"``: as many as the memory allows,
            see ``samples_within`` of the stacked weights.
        memory: bytes that vectorising may need beyond the network and its batch.
        compile: compile the vectorised step with ``torch.compile``.

    Raises:
        TypeError: the objective does not say whether it needs a batch.
        ValueError: a value is out of range, a name unknown, or a sample of its own is combined with
            what needs several: batch statistics, batch terms, weights that are carried along.

    >>> Settings().moves, Settings(lr=1e-3).moves
    (('polyak', 0.5), ('adam', 0.001))
    >>> Settings(steps=-1)
    Traceback (most recent call last):
    ValueError: Expected steps >= 0, got -1.
    """

    scope: Scope = "batch"
    objective: TestTimeMethod | TestTimeObjective = field(default_factory=Idempotence)
    steps: int = 1
    lr: float | None = None
    optimizer: OptimizerName | OptimizerFactory | None = None
    parameters: Selection = "all"
    reset: Reset = "batch"
    anchor: Anchor = "frozen"
    ema_decay: float = 0.99
    norm_stats: NormStats = "source"
    norm_prior: int = 16
    weight_ensembling: float = 0.0
    grad_clip: float | None = None
    measure: bool = True
    gate: float | None = None
    backend: Backend = "auto"
    chunk_size: int | Literal["auto"] = "auto"
    memory: int = 2**30
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"Expected steps >= 0, got {self.steps}.")
        self._choose_optimizer()
        optimizer, lr = self.moves
        if not 0 <= lr < math.inf:
            raise ValueError(f"Expected a finite lr >= 0, got {lr}.")
        optimizer_factory(optimizer, lr)
        if self.reset not in ("batch", "weights", "never") and not _positive(self.reset):
            raise ValueError(
                f"Expected reset 'batch', 'weights', 'never' or N >= 1, got {self.reset!r}."
            )
        if self.reset == "weights" and self.anchor == "ema":
            raise ValueError(
                "Expected anchor 'frozen' or 'live' with reset='weights', got 'ema': there is no "
                "average of weights that begin anew with every batch. Leave out the anchor."
            )
        for name, value, choices in (
            ("anchor", self.anchor, get_args(Anchor)),
            ("norm_stats", self.norm_stats, get_args(NormStats)),
            ("scope", self.scope, get_args(Scope)),
            ("backend", self.backend, get_args(Backend)),
        ):
            if value not in choices:
                raise ValueError(f"Expected {name} in {', '.join(choices)}, got {value!r}.")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"Expected ema_decay in [0, 1], got {self.ema_decay}.")
        if not _positive(self.norm_prior):
            raise ValueError(f"Expected norm_prior N >= 1 samples, got {self.norm_prior!r}.")
        if not 0 <= self.weight_ensembling < 1:
            raise ValueError(f"Expected weight_ensembling in [0, 1), got {self.weight_ensembling}.")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"Expected grad_clip > 0 or None, got {self.grad_clip}.")
        if self.optimizer == "polyak":
            self._check_polyak()
        if self.gate is not None and math.isnan(self.gate):
            raise ValueError("Expected gate to be a distance or None, got NaN.")
        if self.gate is not None and type(self.method).step is not TestTimeMethod.step:
            raise ValueError(
                f"{type(self.method).__name__} takes steps of its own, which a gate cannot keep "
                "samples out of. Leave out the gate, or use a method that has a loss alone."
            )
        if self.chunk_size != "auto" and not _positive(self.chunk_size):
            raise ValueError(f"Expected chunk_size 'auto' or N >= 1, got {self.chunk_size!r}.")
        if self.memory <= 0:
            raise ValueError(f"Expected memory > 0 bytes, got {self.memory}.")
        self._check_scope()
        for name in ("method", "needs_batch", "single_step", "predicts"):
            getattr(self, name)  # so that no batch waits for it

    # What follows from the settings, found once

    @cached_property
    def moves(self) -> tuple[OptimizerName | OptimizerFactory, float]:
        """The optimizer and its learning rate, given or chosen."""
        assert self.optimizer is not None
        assert self.lr is not None
        return self.optimizer, self.lr

    @cached_property
    def method(self) -> TestTimeMethod:
        """The objective as a method."""
        return as_method(self.objective)

    @cached_property
    def rule(self) -> Rule | None:
        """The rule of a named optimizer; ``None`` of a callable."""
        return rule_of(self.moves[0])

    @cached_property
    def predicts(self) -> bool:
        """Whether the method may predict by itself."""
        return type(self.method).predict is not TestTimeMethod.predict

    @cached_property
    def episodic(self) -> bool:
        """Whether every batch starts from the source, optimizer and all."""
        return self.reset in ("batch", 1)

    @cached_property
    def batch_term(self) -> bool:
        """Whether the objective looks at several samples at once."""
        needs = getattr(self.objective, "needs_batch", None)
        if not isinstance(needs, bool):
            raise TypeError(
                "Expected an objective with an attribute needs_batch, whether it looks at several "
                f"samples at once, got {type(self.objective).__name__} without. Set it to False or "
                "True, as on a function: objective.needs_batch = False."
            )
        return needs

    @cached_property
    def needs_batch(self) -> bool:
        """Whether one sample alone makes no sense: batch statistics or a batch term."""
        return self.norm_stats == "batch" or self.batch_term

    @cached_property
    def needs_source(self) -> bool:
        """Whether source data must have been seen: by the method, or as evidence."""
        return self.norm_stats == "evidence" or self.method.needs_source

    @cached_property
    def single_step(self) -> bool:
        """Whether a step in closed form, straight from the source, is all there is."""
        rule = self.rule
        return (
            self.episodic
            and self.steps == 1
            and self.anchor != "ema"
            and self.weight_ensembling == 0
            and self.grad_clip is None
            and rule is not None
            and (rule.first_step is not None or rule.length is not None)
            and type(self.method).step is TestTimeMethod.step
        )

    def _choose_optimizer(self) -> None:
        """Set the optimizer and the learning rate where they are not given."""
        if self.optimizer is None:
            free = self.lr is None and self.grad_clip is None and not self.batch_term
            object.__setattr__(self, "optimizer", "polyak" if free else "adam")
        if self.lr is None:
            object.__setattr__(self, "lr", 0.5 if self.optimizer == "polyak" else 1e-4)

    def _check_polyak(self) -> None:
        if not _LEAST <= self.moves[1] <= 2:
            raise ValueError(
                "Expected the lr of optimizer='polyak' to be a share of the distance in "
                f"[{_LEAST:g}, 2], such as 0.5, got {self.moves[1]:g}. For a learning rate, set "
                "optimizer='adam'."
            )
        if self.grad_clip is not None:
            raise ValueError(
                "optimizer='polyak' tells the length of a step by the gradients' norm; grad_clip "
                "would lengthen it. Leave out grad_clip."
            )
        if self.batch_term:
            raise ValueError(
                "optimizer='polyak' needs an objective that cannot fall below 0, and the balance "
                "term can. Use balance=0, or another optimizer."
            )

    def _check_scope(self) -> None:
        if self.scope == "batch":
            if self.compile:
                raise ValueError(
                    "compile=True compiles the vectorised step of scope='sample'; scope='batch' "
                    "runs your network as it is. Use scope='sample', or compile the network."
                )
            return
        if self.needs_batch:
            raise ValueError(
                "scope='sample' adapts to each sample alone, but norm_stats='batch' and balance "
                "terms need several. Use norm_stats='source' and balance=0, or scope='batch'."
            )
        if self.weight_ensembling or self.predicts:
            raise ValueError(
                "scope='sample' forgets each sample's weights, and predicts by them: it goes with "
                "neither weight_ensembling nor a method that predicts by itself, as "
                f"{type(self.method).__name__} may. Use scope='batch'."
            )
        if not self.episodic:
            raise ValueError(
                f"scope='sample' gives each sample its own weights and optimizer, but "
                f"reset={self.reset!r} carries them along. Use reset='batch', or scope='batch'."
            )
        if self.compile and self.backend == "loop":
            raise ValueError("compile=True compiles the vectorised step, not backend='loop'.")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
