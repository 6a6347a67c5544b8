"""One batch from a given state: measure, step, measure again; all or nothing."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from it3_lightning.engine.adaptation import Adaptation
from it3_lightning.engine.evaluation import Evaluator
from it3_lightning.engine.gate import Gate
from it3_lightning.engine.outcome import Evaluation
from it3_lightning.engine.samples import Answer, Plain, batch_size
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.state import State


def adapt_state(
    state: State,
    inputs: Any,
    evaluate: Evaluator,
    settings: Settings,
    answer: Answer | None,
    *,
    carried: bool,
) -> Adaptation:
    """Adapt a state to one batch, its weights left in place; where that fails, as it was before.

    ``carried``: earlier batches have moved the state, so that the source is measured apart.

    Raises:
        Skip: the batch cannot be adapted to.
    """
    source = None
    if carried and settings.measure:
        source = evaluate.measured(inputs, None, at_source=True)  # the weights in place
    by_source = not carried or (source is not None and settings.gate is None)  # the pass on record
    backup = state.backup() if carried else None
    state.enter()
    try:
        started = time.perf_counter()
        gate = None
        if settings.gate is not None and settings.steps:
            same = state.anchored_at_source and by_source
            gate = Gate.of(settings.gate, state, inputs, evaluate, settings, at_source=same)
        first = _steps(state, inputs, evaluate, settings.steps, gate, by_source=by_source)
        seconds = time.perf_counter() - started
        outputs, answers, last = None, None, None
        if gate is not None and gate.closed and (answer is None or isinstance(answer, Plain)):
            last = gate.before  # no weight has moved
            outputs = last.outputs
        else:
            if answer is not None:
                outputs, answers = evaluate.answer(inputs, answer)
            if settings.measure:
                same = gate is None and state.anchored_at_source and by_source
                last = evaluate.measured(inputs, state.anchor, at_source=same, outputs=outputs)
    except BaseException:
        if backup is not None:
            state.rollback(backup)
        raise
    moved = first or last
    source = source if carried else moved
    return Adaptation(
        outputs=last.outputs if last is not None else outputs,
        source_outputs=None if source is None else source.outputs,
        distance_source=None if source is None else source.objective.measure,
        distance_adapted=last.objective.measure if last is not None and settings.measure else None,
        reliable=None if moved is None else moved.objective.reliable,
        skipped=torch.zeros(
            _samples(None if moved is None else moved.outputs, inputs), dtype=torch.bool
        ),
        reason=None,
        weights=dict(state.weights),
        forwards=evaluate.forwards,
        backwards=evaluate.backwards,
        answered=evaluate.answered,
        seconds=seconds,
        answers=answers,
        gated=None if gate is None else gate.within.cpu(),
    )


def keep_source(
    inputs: Any, evaluate: Evaluator, settings: Settings, answer: Answer | None, reason: str
) -> Adaptation:
    """Return what a skipped batch gets: the source prediction, and why."""
    outputs: Tensor | None = None
    answers: Any = None
    if answer is not None:
        outputs, answers = evaluate.answer(inputs, answer, finite=False)
    elif settings.measure:
        with torch.no_grad():
            outputs = evaluate.run(inputs, None)
    return Adaptation(
        outputs=outputs,
        source_outputs=outputs,
        distance_source=None,
        distance_adapted=None,
        reliable=None,
        skipped=torch.ones(_samples(outputs, inputs), dtype=torch.bool),
        reason=reason,
        weights={},
        forwards=evaluate.forwards,
        backwards=evaluate.backwards,
        answered=evaluate.answered,
        seconds=0.0,
        answers=answers,
    )


def _samples(outputs: Tensor | None, inputs: Any) -> int:
    return batch_size(inputs) if outputs is None else outputs.shape[0]


def _steps(
    state: State,
    inputs: Any,
    evaluate: Evaluator,
    steps: int,
    gate: Gate | None,
    *,
    by_source: bool,
) -> Evaluation | None:
    """Take the steps; return the evaluation before the first.

    ``by_source``: the first pass over the batch has the source weights.
    """
    first: Evaluation | None = None
    movers = inputs if gate is None else gate.movers
    for _ in range(0 if gate is not None and gate.closed else steps):
        same = state.anchored_at_source and by_source
        evaluation = evaluate(movers, state.anchor, at_source=same)
        if gate is not None:
            evaluation = gate.masked(evaluation)
        first = first or evaluation.detached()
        if not evaluation.objective.empty:
            state.step(evaluation.objective.loss(), evaluate)
        del evaluation  # and its graph, before the next is built
    if gate is None:
        return first
    evaluate.forget()
    return gate.whole(first)
