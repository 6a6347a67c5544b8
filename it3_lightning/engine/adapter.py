r"""The algorithm: measure, step, measure, put back; one set of adapted weights for a whole batch.

The four steps of the paper (Durasov et al., IT3, ICML 2025), and where they stand below:

1. :math:`y_0 = f_\theta(x, 0)`: ``passes = self._passes(...)``, which is ``passes.y0``
2. :math:`y_1 = F(x, y_0)`, ``F`` frozen: ``method.step``, which asks ``passes.second(passes.y0)``
3. :math:`\theta \leftarrow \theta - \eta \nabla_\theta d(y_0, y_1)`: ``method.step``, by
   ``state.step(loss)``
4. predict :math:`f_\theta(x, 0)`, then restore: ``self._predict(...)``, and at the end of
   :meth:`BatchAdapter.adapted` ``source.restore_weights()``

The adapted weights are storage of their own behind the module's own parameters, so whatever runs
inside :meth:`BatchAdapter.adapted` uses them, and the source comes back by reference, exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from it3_lightning.engine.evidence import SourceMoments, believed, check_moments, put
from it3_lightning.engine.passes import AnchoredWeights, Network, NetworkPasses, all_finite
from it3_lightning.engine.restore import Draws, NormStatistics, Snapshot, Undo, without_side_effects
from it3_lightning.engine.result import Adaptation
from it3_lightning.engine.selection import Movers, select
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.state import Carried, SourceInPlace, State, Unshared
from it3_lightning.engine.trees import batch_size, divisible, laid_out, taken
from it3_lightning.engine.types import (
    SOURCE,
    Answer,
    Enters,
    Evaluation,
    Forward,
    InputsIn,
    Isolation,
    NormStats,
    Plain,
    SampleDims,
    Skip,
    ToLabel,
    ValidIn,
)
from it3_lightning.methods.base import TestTimeMethod

_T = TypeVar("_T")


class BatchAdapter:
    """Adapts a module to one batch after another.

    Args:
        module: whose parameters adapt.
        forward: ``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one.
        to_label: brings outputs into label space, ``(B, C, ...)``: the prior of the second pass.
        settings: how to adapt.
        enters: the layers at whose input or output the prior enters, by name; what comes before
            them is not computed twice. Empty: unknown.
        isolation: returns a context in which passes leave no trace, in logs for example.
        inputs_in: finds the network's inputs in what :meth:`adapted` is given.
        sample_dims: says which dimension of each tensor holds the samples; default: the first.
        valid_in: says which positions of a prediction count, from what :meth:`adapted` is given;
            default: all do.
        moments: of source data, for ``norm_stats="evidence"``; :meth:`fit_moments` adds to them.
        in_company: whether a second prediction depends on the other samples of its batch, so that a
            gate takes none of them out.

    Raises:
        ValueError: the selection of parameters matches nothing, there is no layer of a name, or the
            moments are not known.

    >>> net, x = nn.Linear(1, 1, bias=False), torch.ones(2, 1)
    >>> _ = nn.init.ones_(net.weight)
    >>> def forward(x, prior):  # knows the second prediction: half of the first
    ...     return net(x) if prior is None else prior / 2
    >>> settings = Settings(lr=0.1, optimizer="sgd")
    >>> with BatchAdapter(net, forward, lambda y: y, settings).adapted(x) as adaptation:
    ...     adapted = net.weight.item()
    >>> round(adapted, 4), net.weight.item()  # d = (w - w/2)^2 = w^2 / 4, and 1 - 0.1 / 2
    (0.95, 1.0)
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        to_label: ToLabel,
        settings: Settings,
        *,
        enters: Enters = MappingProxyType({}),
        isolation: Isolation = nullcontext,
        inputs_in: InputsIn | None = None,
        sample_dims: SampleDims | None = None,
        valid_in: ValidIn | None = None,
        moments: SourceMoments | None = None,
        in_company: bool = False,
    ) -> None:
        self._sample_dims, self._in_company = sample_dims, in_company
        self.moments = moments
        self.believes = settings.norm_stats == "evidence" and check_moments(module, moments)
        self.selected = select(module, settings.parameters)
        self.undo, self.drawn = Undo(), False  # whether the last passes drew random numbers
        self._module = module
        self._settings = settings
        if type(settings.method).check is not TestTimeMethod.check:
            settings.method.check(module)
        self._isolation = isolation
        self._carried = Carried(self.selected, settings)
        self._method = self._carried.method
        layers, given = self._method.layers, (inputs_in, valid_in)
        self.network = Network(module, self.selected, forward, to_label, enters, layers, *given)

    def restart(self) -> None:
        """Forget what was carried along: the next batch starts from the source."""
        if self._carried.stateful or self._carried.state is not None:
            self._carried.restart()

    @contextmanager
    def adapted(self, inputs: Any, answer: Answer | None = None) -> Iterator[Adaptation]:
        """Run the body with weights adapted to these inputs, then put the source back.

        A batch that cannot be adapted to (non-finite outputs, loss, gradients or weights; one
        sample where several are needed) runs with the source weights and source statistics, and is
        not counted among the ``N`` of ``reset=N``. Adaptation leaves nothing in buffers and
        attributes; what the body itself writes there stays, as it would without adaptation.

        Args:
            inputs: what ``forward`` takes: tensors ``(B, ...)``, possibly nested. Never labels.
            answer: what to run with the adapted weights before the body, without side effects:
                inputs to outputs ``(B, ...)`` and what becomes :attr:`Adaptation.answers`.

        Raises:
            ValueError: the selected parameters have no influence on the prediction.
        """
        self.network.forwards = self.network.cache.hits = 0
        self.drawn = False
        if self._sample_dims is not None:
            inputs = laid_out(inputs, self._sample_dims(inputs))
        draws = partial(self.draws, inputs)
        with self.undo.begin() as undo:
            kind, count = self._settings.norm_stats, self._settings.norm_prior
            statistics = NormStatistics(self._module, kind, undo, count)
            if self.believes:
                self._believe(inputs, undo, draws)
            undo.add((source := Snapshot(self._module)).restore)
            with torch.inference_mode(False), torch.enable_grad():
                try:
                    source.detach_parameters()
                    with without_side_effects(source, self._isolation, draws):
                        adaptation = self._adapt(inputs, answer)
                except Skip as reason:
                    source.restore_parameters()
                    statistics.restore()
                    undo.add((source := Snapshot(self._module)).restore)
                    with without_side_effects(source, self._isolation, draws):
                        adaptation = self._keep_source(inputs, answer, str(reason))
                finally:
                    self.network.cache.clear()
            self.drawn |= source.drawn
            try:
                yield adaptation
            except Exception:  # what the body itself has written stays, unless it is interrupted
                undo.end(source.restore_weights, statistics.restore)
                raise
            undo.end(source.restore_weights, statistics.restore)

    def _believe(self, inputs: Any, undo: Undo, draws: Draws) -> None:
        """Put statistics in place that the batch proves, by passes of the source."""
        undo.add((source := Snapshot(self._module)).restore)
        without = without_side_effects(source, self._isolation, draws)
        with torch.inference_mode(False), torch.enable_grad(), without:
            assert self.moments is not None
            run = partial(self.network.run, inputs, None)
            found = believed(self._module, inputs, run, self.network.to_label, self.moments)
        put(self._module, found)
        self.drawn |= source.drawn

    def _adapt(self, inputs: Any, answer: Answer | None) -> Adaptation:
        """Adapt, and leave the adapted weights in place; all or nothing."""
        settings = self._settings
        if settings.needs_batch and batch_size(inputs) < 2:
            raise Skip("batch statistics and batch terms need at least two samples")
        state, carried = self._carried.start()
        unadapted = self._measure(inputs, SourceInPlace()) if carried and settings.measure else None
        with state.all_or_nothing():
            state.enter()
            started, version = time.perf_counter(), state.version
            gate = None if settings.gate is None else self._gate(inputs, state, settings.gate)
            first = self._steps(inputs, state, gate)
            seconds = time.perf_counter() - started
            last, outputs, answers = self._predict(inputs, state, gate, answer)
            prediction = (
                self._prediction(inputs, state, outputs) if self._settings.predicts else None
            )
        moves = state.version != version and state.differs
        if not settings.episodic:
            self._carried.keep(state)
        moved = first or last
        return Adaptation.of(
            inputs,
            outputs=outputs,
            source=unadapted if carried else moved,
            moved=moved,
            moves=moves,
            adapted=last if settings.measure else None,
            weights=dict(state.weights),
            forwards=self.network.forwards,
            backwards=state.backwards,
            cache_hits=self.network.cache.hits,
            seconds=seconds,
            answers=answers,
            gated=None if gate is None else gate.within.cpu(),
            prediction=prediction,
        )

    def _steps(self, inputs: Any, state: State, gate: Movers | None) -> Evaluation | None:
        """Take the steps; return the evaluation before the first, of the whole batch."""
        first: Evaluation | None = None
        method, movers = self._method, inputs
        if gate is not None:
            method, movers = gate.method(method), gate.movers
        for _ in range(0 if gate is not None and gate.closed else self._settings.steps):
            passes = self._passes(movers, state)
            objective = method.step(passes, state)
            first = first or Evaluation(passes.outputs.detach(), objective.detached())
            del passes, objective  # and their graph, before the next is built
        return first if gate is None else gate.whole(first)

    def _predict(
        self, inputs: Any, state: State, gate: Movers | None, answer: Answer | None
    ) -> tuple[Evaluation | None, Tensor | None, Any]:
        """Predict with the weights after the last step; measure, where asked to."""
        if gate is not None and gate.closed and (answer is None or isinstance(answer, Plain)):
            return gate.before, gate.before.outputs, None  # no weight has moved
        outputs, answers = None, None
        if answer is not None:
            outputs, answers = self.network.answer(inputs, answer, state.version)
            if not all_finite(outputs):
                raise Skip("non-finite output")
        if not self._settings.measure:
            return None, outputs, answers
        last = self._measure(inputs, state, outputs)
        return last, last.outputs, answers

    @torch.no_grad()
    def _prediction(self, inputs: Any, state: State, outputs: Tensor | None) -> Tensor | None:
        """Return what the method predicts by itself."""
        prediction = self._method.predict(self._passes(inputs, state, outputs))
        if prediction is not None and not all_finite(prediction):
            raise Skip("non-finite prediction")
        return prediction

    def fit_source(self, inputs: Any) -> None:
        """Show the method a batch of source data, inputs ``(B, ...)``; nothing else is changed.

        Its passes have the same statistics as in :meth:`adapted`. A batch that could not be adapted
        to (see there) is not shown.
        """
        if self._settings.needs_batch and batch_size(inputs) < 2:
            return

        def see(source: Snapshot) -> None:
            with suppress(Skip):
                source.detach_parameters()
                self._carried.start()[0].enter()
                self._method.fit_source(self._passes(inputs, SourceInPlace()))
                if self._carried.stateful:
                    self._settings.method.load_source_dict(self._method.source_dict())

        self._shown(see, self._settings.norm_stats)

    def fit_moments(self, inputs: Any) -> None:
        """Add a batch of source data, inputs ``(B, ...)``, to :attr:`moments`."""
        moments = self.moments = self.moments or SourceMoments()
        run = partial(self.network.run, inputs, None)
        self._shown(lambda _: moments.add(self._module, inputs, run, self.network.to_label))

    def _shown(self, see: Callable[[Snapshot], _T], norm_stats: NormStats = "source") -> _T:
        """Let something see source data with these statistics; the module stays as it is."""
        with self.undo.begin() as undo:
            statistics = NormStatistics(self._module, norm_stats, undo, self._settings.norm_prior)
            undo.add((source := Snapshot(self._module)).restore)
            isolated = without_side_effects(source, self._isolation)
            with torch.inference_mode(False), torch.enable_grad(), isolated:
                seen = see(source)
            self.network.restart()
            undo.end(source.restore_weights, statistics.restore)
            return seen

    def _keep_source(self, inputs: Any, answer: Answer | None, reason: str) -> Adaptation:
        """Return what a skipped batch gets: the source prediction, and why."""
        outputs: Tensor | None = None
        answers: Any = None
        if answer is not None:
            outputs, answers = self.network.answer(inputs, answer, SOURCE)
        elif self._settings.measure:
            with torch.no_grad():
                outputs = self.network.run(inputs, None)
        hits = self.network.cache.hits
        return Adaptation.skipping(inputs, outputs, reason, self.network.forwards, hits, answers)

    def _passes(
        self, inputs: Any, weights: AnchoredWeights, outputs: Tensor | None = None
    ) -> NetworkPasses:
        return NetworkPasses(self.network, inputs, weights, outputs)

    @torch.no_grad()
    def _measure(
        self, inputs: Any, weights: AnchoredWeights, outputs: Tensor | None = None
    ) -> Evaluation:
        """Evaluate without a graph, from these outputs of the first pass where they are given."""
        passes = self._passes(inputs, weights, outputs)
        return Evaluation(passes.outputs, self._method.loss(passes))

    def _gate(self, inputs: Any, state: State, limit: float) -> Movers | None:
        """Measure the batch and say which samples move the weights; nothing to say: no steps."""
        if not self._settings.steps:
            return None
        before = self._measure(inputs, state)
        within = before.objective.measure <= limit
        known = self._sample_dims is not None or divisible(inputs, len(within), self._module)
        alone = self._settings.norm_stats == "source" and known and not self._in_company
        rows = (~within).nonzero()[:, 0].tolist()
        alone = alone and bool(rows)
        return Movers(before, within, taken(inputs, rows) if alone else inputs, alone)

    def draws(self, inputs: Any) -> frozenset[str] | None:
        """Return the random generators that the method's passes draw from; ``None``: unknown."""
        return self.network.draws(partial(self._measure, inputs, SourceInPlace()))

    def bytes_of_step(self, inputs: Any, count: Any) -> int:
        """Return ``count(run)`` of the passes of a step, as the bytes that they keep."""

        def see(_: Snapshot) -> int:
            state = self._carried.start()[0]
            state.enter()
            passes = partial(self._passes, inputs, Unshared(state.anchor))
            return int(count(lambda: self._method.loss(passes())))

        with suppress(Skip):
            return self._shown(see)
        return 0
