"""Scope ``batch``: one set of adapted weights for a whole batch, put in place and taken back.

The adapted weights are storage of their own behind the module's own parameters, so whatever runs
inside :meth:`BatchAdapter.adapted` uses them, and the source comes back by reference, exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from it3_lightning.engine.adaptation import Adaptation
from it3_lightning.engine.norm import norm_statistics
from it3_lightning.engine.randomness import undisturbed_rng
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.state import State, Weights
from it3_lightning.engine.weights import Sites
from it3_lightning.objectives import Objective
from it3_lightning.selection import select
from it3_lightning.snapshot import Snapshot

Forward = Callable[[Any, Tensor | None], Tensor]
ToLabel = Callable[[Tensor], Tensor]
_Evaluation = tuple[Tensor, Objective]


class _Skip(Exception):
    """The batch cannot be adapted to; the message says why."""


class BatchAdapter:
    """Adapts a module to one batch after another.

    Args:
        module: whose parameters adapt.
        forward: ``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one.
        to_label: brings outputs into label space, ``(B, C, ...)``: the prior of the second pass.
        settings: how to adapt.

    Raises:
        ValueError: the selection of parameters matches nothing.
    """

    def __init__(
        self, module: nn.Module, forward: Forward, to_label: ToLabel, settings: Settings
    ) -> None:
        self.selected = select(module, settings.parameters)
        self._module = module
        self._forward = forward
        self._to_label = to_label
        self._settings = settings
        self._sites = Sites(module, self.selected)
        self._forwards = self._backwards = 0
        self.restart()

    def restart(self) -> None:
        """Forget what was carried along: the next batch starts from the source."""
        self._state: State | None = None
        self._batches = 0

    @contextmanager
    def adapted(self, inputs: Any) -> Iterator[Adaptation]:
        """Run the body with weights adapted to these inputs, then put everything back.

        A batch that cannot be adapted to (non-finite outputs, loss, gradients or weights; one
        sample where several are needed) runs with the source weights and source statistics.

        Args:
            inputs: what ``forward`` takes: tensors ``(B, ...)``, possibly nested. Never labels.
        """
        self._forwards = self._backwards = 0
        snapshot = Snapshot.capture(self._module)
        with ExitStack() as norm:
            try:
                norm.enter_context(norm_statistics(self._module, self._settings.norm_stats))
                yield self._result(inputs, snapshot, norm)
            finally:
                snapshot.restore_parameters()
                torch.clear_autocast_cache()
        snapshot.restore_modes()

    def _result(self, inputs: Any, snapshot: Snapshot, norm: ExitStack) -> Adaptation:
        """Adapt, or go back to the source; either way leave only weights and statistics changed."""
        with torch.inference_mode(False), torch.enable_grad(), undisturbed_rng():
            try:
                return self._adapt(inputs)
            except _Skip as reason:
                norm.close()
                snapshot.restore_parameters()
                snapshot.restore_buffers()
                return self._skipped(inputs, str(reason))
            finally:
                snapshot.restore_buffers()
                snapshot.restore_flags()
                torch.clear_autocast_cache()

    def _adapt(self, inputs: Any) -> Adaptation:
        settings = self._settings
        if settings.needs_batch and batch_size(inputs) < 2:
            raise _Skip("batch statistics and batch terms need at least two samples")
        state, carried = self._current_state()
        self._require_no_grad()
        source = self._measure(inputs, None) if carried and settings.measure else None
        backup = state.backup() if not settings.episodic else None
        state.enter()
        try:
            started = time.perf_counter()
            first = self._steps(inputs, state)
            seconds = time.perf_counter() - started
            last = self._measure(inputs, state.anchor) if settings.measure else None
            if last is None and settings.steps and not state.finite():
                raise _Skip("non-finite weights")
        except BaseException:
            if backup is not None:
                state.rollback(backup)
            raise
        source = source if carried else first or last
        return self._adaptation(inputs, source, first or last, last, state, seconds)

    def _current_state(self) -> tuple[State, bool]:
        """Return the state this batch starts from, and whether it was carried from an earlier one."""
        reset, due = self._settings.reset, self._state is None or self._settings.episodic
        if isinstance(reset, int) and self._batches % reset == 0:
            due = True
        self._batches += 1
        if due or self._state is None:
            self._state = State(self.selected, self._settings)
        return self._state, not due

    def _require_no_grad(self) -> None:
        for parameter in self._module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _steps(self, inputs: Any, state: State) -> _Evaluation | None:
        """Take the steps; return the evaluation before the first."""
        first: _Evaluation | None = None
        for _ in range(self._settings.steps):
            outputs, objective = self._evaluate(inputs, state.anchor)
            first = first or (outputs, objective)
            if not objective.empty:
                self._step(objective.loss(), state)
        return first

    def _step(self, loss: Tensor, state: State) -> None:
        if not bool(loss.isfinite()):
            raise _Skip("non-finite loss")
        parameters = list(self.selected.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        self._backwards += 1
        if all(g is None for g in gradients):
            raise ValueError(
                "None of the selected parameters influences the neutral prediction: "
                f"{', '.join(list(self.selected)[:5])}. Select parameters of the network itself."
            )
        if not state.step(gradients):
            raise _Skip("non-finite gradient")
        torch.clear_autocast_cache()

    def _evaluate(self, inputs: Any, anchor: Weights | None) -> _Evaluation:
        outputs = self._pass(inputs, None)
        if not bool(outputs.isfinite().all()):
            raise _Skip("non-finite output")
        second = partial(self._second, inputs, anchor)
        return outputs, self._settings.objective(self._to_label(outputs), second)

    def _second(self, inputs: Any, anchor: Weights | None, y0: Tensor) -> Tensor:
        """Run the anchor (the weights in place where there is none): it moves only ``y0``."""
        if anchor is None:
            return self._to_label(self._pass(inputs, y0))
        with self._sites.swapped(anchor):
            return self._to_label(self._pass(inputs, y0))

    def _pass(self, inputs: Any, prior: Tensor | None) -> Tensor:
        self._forwards += 1
        return self._forward(inputs, prior)

    @torch.no_grad()
    def _measure(self, inputs: Any, anchor: Weights | None) -> _Evaluation:
        return self._evaluate(inputs, anchor)

    def _adaptation(
        self,
        inputs: Any,
        source: _Evaluation | None,
        moved: _Evaluation | None,
        last: _Evaluation | None,
        state: State,
        seconds: float,
    ) -> Adaptation:
        return Adaptation(
            outputs=None if last is None else last[0],
            source_outputs=None if source is None else source[0].detach(),
            distance_source=None if source is None else source[1].measure.detach(),
            distance_adapted=None if last is None else last[1].measure,
            reliable=None if moved is None else moved[1].reliable,
            skipped=torch.zeros(batch_size(inputs), dtype=torch.bool),
            reason=None,
            weights=state.weights,
            forwards=self._forwards,
            backwards=self._backwards,
            seconds=seconds,
        )

    def _skipped(self, inputs: Any, reason: str) -> Adaptation:
        outputs: Tensor | None = None
        if self._settings.measure:
            with torch.no_grad():
                outputs = self._pass(inputs, None)
        return Adaptation(
            outputs=outputs,
            source_outputs=outputs,
            distance_source=None,
            distance_adapted=None,
            reliable=None,
            skipped=torch.ones(batch_size(inputs), dtype=torch.bool),
            reason=reason,
            weights={},
            forwards=self._forwards,
            backwards=self._backwards,
            seconds=0.0,
        )


def batch_size(inputs: Any) -> int:
    """Return the size of dimension 0 of the first tensor in the inputs.

    Raises:
        ValueError: there is no tensor with a dimension in them.

    >>> batch_size({"image": torch.zeros(4, 3)})
    4
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise ValueError(
        f"Expected inputs with a tensor (B, ...) in them, got {type(inputs).__name__}."
    )
