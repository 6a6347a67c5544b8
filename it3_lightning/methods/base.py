"""Interface of test-time methods: what a method sees of a batch, returns, and may override.

Annotations here are evaluated at once: the command line looks those of a subclass up among the
names of the subclass's own file, which need not have these.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

SecondPass = Callable[[Tensor], Tensor]
"""``y1 = F(x, prior)``, in label space."""

Layers = Literal["norm"] | Sequence[str]
"""Layers of a network by name; ``"norm"``: all its norm layers."""


@dataclass(frozen=True)
class Objective:
    """What one evaluation of a loss gives.

    Args:
        measure: ``(B,)``, the quantity itself for every sample: what is logged as distance.
        reliable: ``(B,)`` booleans, the samples whose measure is minimised.
        batch_term: a scalar added to the mean over the reliable samples, or ``None``.
        sample_term: ``(B,)``, added to the measure where it is minimised, or ``None``.
    """

    measure: Tensor
    reliable: Tensor
    batch_term: Tensor | None = None
    sample_term: Tensor | None = None

    @property
    def moves(self) -> Tensor:
        """``(B,)`` booleans, the samples that have something to minimise: all by a batch term."""
        return self.reliable if self.batch_term is None else torch.ones_like(self.reliable)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to minimise: no reliable sample and no batch term."""
        return self.batch_term is None and not bool(self.reliable.any())

    def loss(self) -> Tensor:
        """Return the scalar loss: the mean of the reliable samples' terms, and the batch term."""
        terms = self.measure if self.sample_term is None else self.measure + self.sample_term
        kept = torch.where(self.reliable, terms, 0.0)
        mean = kept.sum() / self.reliable.sum().clamp_min(1)
        return mean if self.batch_term is None else mean + self.batch_term

    def detached(self) -> "Objective":
        """Return measure and filter alone, without the graph."""
        measure = self.measure.detach()
        return replace(self, measure=measure, batch_term=None, sample_term=None)


class Passes(ABC):
    """What a method may ask of the network on one batch.

    Attributes:
        inputs: of the network, tensors ``(B, ...)``, possibly nested.
        outputs: ``f(x, 0)``, ``(B, ...)``, with its graph.
        y0: the same in label space, ``(B, C, ...)``.
        valid: ``(B, ...)`` booleans, the positions of ``y0`` that count, as the inputs say: the
            others are padding. ``None``: all.
        weights: the adapting weights by name, as the passes use them: part of their graph.
        source: the same as training left them.
        layers: that the method asks for, :attr:`TestTimeMethod.layers`, by name.
    """

    inputs: Any
    outputs: Tensor
    y0: Tensor
    valid: Tensor | None = None
    weights: Mapping[str, Tensor]
    source: Mapping[str, Tensor]
    layers: Mapping[str, nn.Module]

    @abstractmethod
    def second(self, prior: Tensor) -> Tensor:
        """Return ``F(x, prior)`` of the anchor, in label space: gradients flow through it alone."""

    @abstractmethod
    def other(self, inputs: Any) -> Tensor:
        """Return ``f(inputs, 0)`` in label space, of augmented views, say."""

    @abstractmethod
    def anchor(self, inputs: Any) -> Tensor:
        """Return ``F(inputs, 0)`` of the anchor, in label space, without a graph.

        With ``anchor="frozen"`` it is the source, with ``"ema"`` the mean teacher.
        """

    @abstractmethod
    def unadapted(self, inputs: Any) -> Tensor:
        """Return the neutral pass of the source weights, in label space, without a graph."""

    @abstractmethod
    def features_of(self, layer: str, inputs: Any) -> Any:
        """Return what a layer puts out in the neutral pass over other inputs."""

    @abstractmethod
    def submodule(self, name: str) -> nn.Module:
        """Return a part of the module by name: a head that was trained for the method, say."""

    @abstractmethod
    def features(self, layer: str, *, entering: bool = False) -> Any:
        """Return what one of :attr:`layers` put out in this pass, or what entered it."""

    @abstractmethod
    def again(self) -> "Passes":
        """Return the passes over the same inputs with the weights as they are now."""


class Steps(Protocol):
    """The weights, as a method sees them: all of these leave no graph.

    Attributes:
        source: by name, as training left them.
        weights: as they are now.
    """

    @property
    def source(self) -> Mapping[str, Tensor]:
        """The weights as training left them, by name."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights as they are now, by name."""

    def step(self, loss: Tensor) -> None:
        """Move the weights down the gradient of a loss, by the optimizer of the settings."""

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradients of a loss by the names of the weights that it depends on."""

    def step_by(self, gradients: Mapping[str, Tensor], loss: Tensor) -> None:
        """Move the weights by these gradients, by the optimizer of the settings."""

    def moved_by(self, changes: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Let passes within run on the weights and these changes."""

    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from these weights; the optimizer keeps its state."""

    def reset(self) -> None:
        """Go back to the source, and to an optimizer without a state."""


class TestTimeMethod(ABC):
    """A test-time method: override what its paper changes, nothing else.

    A method is one file: its class says what it minimises (:meth:`loss`) and which settings its
    paper uses (:attr:`defaults`). Weights, restore, batches and logging are the engine's.
    """

    __test__: ClassVar[bool] = False  # its name is no test's
    needs_prior: ClassVar[bool] = False
    """Whether it asks for a second prediction; if not, it runs on any LightningModule."""
    vmappable: ClassVar[bool] = False
    """Whether :meth:`loss` asks for ``y0`` and ``second`` only: many samples can go at once."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings that the paper uses, by the names of :class:`~it3_lightning.engine.Settings`."""
    layers: Layers = ()
    """The layers whose features it asks for."""

    @property
    def needs_batch(self) -> bool:
        """Whether it looks at several samples at once, so that one alone makes no sense."""
        return False

    @property
    def needs_source(self) -> bool:
        """Whether it must have seen source data, in :meth:`fit_source`."""
        return False

    def check(self, module: nn.Module) -> None:  # noqa: B027  # most need nothing
        """Refuse, by a ``ValueError``, a module without what the method needs."""

    @abstractmethod
    def loss(self, passes: Passes) -> Objective:
        """Evaluate what is minimised on one batch."""

    def step(self, passes: Passes, state: Steps) -> Objective:
        """Take one step on one batch; return what it was taken by."""
        objective = self.loss(passes)
        if not objective.empty:
            state.step(objective.loss())
        return objective

    def predict(self, passes: Passes) -> Tensor | None:
        """Return the prediction in label space, ``(B, C, ...)``, after the last step.

        ``None``, the default: it is the network's own. Asked once for a batch, without a graph; a
        method may take note of the batch here.
        """
        return None

    def fit_source(self, passes: Passes) -> None:  # noqa: B027  # most leave it as it is
        """Take from a batch of source data what the method must know of them; most need nothing."""

    def source_dict(self) -> dict[str, Any]:
        """Return what :meth:`fit_source` took, as plain data; empty where it has seen nothing."""
        return {}

    def load_source_dict(self, source: Mapping[str, Any]) -> None:
        """Take what :meth:`source_dict` returned; from an empty one, begin anew."""
        if source:
            raise NotImplementedError(f"{type(self).__name__} learns nothing of source data.")

    def state_dict(self) -> dict[str, Any]:
        """Return what the method carries from batch to batch, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state_dict` returned."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} has a state, but cannot load it.")


class TestTimeObjective(Protocol):
    """A callable in the place of a method: what is minimised, and no more."""

    @property
    def needs_batch(self) -> bool:
        """Whether it looks at several samples at once, so that one alone makes no sense."""

    def __call__(self, y0: Tensor, second: SecondPass) -> Objective:
        """Evaluate at the first prediction ``(B, C, ...)``; ``second(y0)`` runs the anchor."""


TestTimeObjective.__test__ = False  # type: ignore[attr-defined]  # its name is no test's


@dataclass(frozen=True)
class CallableMethod(TestTimeMethod):
    """A plain callable ``(y0, second) -> Objective`` as a method.

    It is not told which positions are valid: to it all are.

    Args:
        objective: the callable, with an attribute ``needs_batch``.
    """

    objective: TestTimeObjective
    needs_prior: ClassVar[bool] = True
    vmappable: ClassVar[bool] = True

    @property
    def needs_batch(self) -> bool:
        """Whether the callable looks at several samples at once."""
        return self.objective.needs_batch

    def loss(self, passes: Passes) -> Objective:
        """Call it."""
        return self.objective(passes.y0, passes.second)


@dataclass(frozen=True)
class Masked(TestTimeMethod):
    """A method on some of the samples; the others only share the batch with them.

    Args:
        whole: the method.
        counts: ``(B,)`` booleans, the samples that count.
    """

    whole: TestTimeMethod
    counts: Tensor

    def loss(self, passes: Passes) -> Objective:
        """Evaluate it; nothing is minimised of the others."""
        objective = self.whole.loss(passes)
        return replace(objective, reliable=objective.reliable & self.counts)


def as_method(objective: TestTimeMethod | TestTimeObjective) -> TestTimeMethod:
    """Return a method as it is, and a plain callable as a method."""
    return objective if isinstance(objective, TestTimeMethod) else CallableMethod(objective)
