"""Scope ``batch``: one set of adapted weights for a whole batch, put in place and taken back.

The adapted weights are storage of their own behind the module's own parameters, so whatever runs
inside :meth:`BatchAdapter.adapted` uses them, and the source comes back by reference, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from it3_lightning.engine.adaptation import Adaptation
from it3_lightning.engine.chunks import bytes_kept
from it3_lightning.engine.episode import adapt_state, keep_source
from it3_lightning.engine.evaluation import Evaluator
from it3_lightning.engine.first_step import single_step
from it3_lightning.engine.norm import norm_statistics
from it3_lightning.engine.outcome import Forward, Skip, ToLabel
from it3_lightning.engine.record import Enters, Record
from it3_lightning.engine.samples import Answer, batch_size
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.state import State
from it3_lightning.engine.untraced import untraced
from it3_lightning.selection import select
from it3_lightning.snapshot import Snapshot


class BatchAdapter:
    """Adapts a module to one batch after another.

    Args:
        module: whose parameters adapt.
        forward: ``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one.
        to_label: brings outputs into label space, ``(B, C, ...)``: the prior of the second pass.
        settings: how to adapt.
        enters: the layers at whose input or output the prior enters, by name; what comes before
            them is not computed twice. Empty: unknown.

    Raises:
        ValueError: the selection of parameters matches nothing.

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
    ) -> None:
        self.selected = select(module, settings.parameters)
        self._module = module
        self._settings = settings
        self.record = Record(module, enters, self.selected)
        self._evaluate = Evaluator(
            module, self.selected, forward, to_label, settings.objective, self.record
        )
        self._single = single_step(settings)
        self.restart()

    def restart(self) -> None:
        """Forget what was carried along: the next batch starts from the source."""
        self._carried: State | None = None
        self._batches = 0

    @contextmanager
    def adapted(self, inputs: Any, answer: Answer | None = None) -> Iterator[Adaptation]:
        """Run the body with weights adapted to these inputs, then put the source back.

        A batch that cannot be adapted to (non-finite outputs, loss, gradients or weights; one
        sample where several are needed) runs with the source weights and source statistics, and is
        not counted among the ``N`` of ``reset=N``. Adaptation leaves nothing in buffers and
        attributes; what the body itself writes there stays, as it would without adaptation.

        Args:
            inputs: what ``forward`` takes: tensors ``(B, ...)``, possibly nested. Never labels.
            answer: what to run with the adapted weights before the body, traceless: inputs to
                outputs ``(B, ...)`` and what becomes :attr:`Adaptation.answers`.

        Raises:
            ValueError: the selected parameters have no influence on the prediction.
        """
        self._evaluate.restart()
        with ExitStack() as norm:
            norm.enter_context(norm_statistics(self._module, self._settings.norm_stats))
            snapshot = Snapshot(self._module)
            try:
                adaptation = self._attempt(inputs, answer, snapshot)
                if isinstance(adaptation, str):
                    snapshot.restore_parameters()
                    norm.close()
                    snapshot = Snapshot(self._module)
                    with untraced(snapshot):
                        adaptation = keep_source(
                            inputs, self._evaluate, self._settings, answer, adaptation
                        )
                yield adaptation
            finally:
                snapshot.restore_parameters()
                snapshot.restore_modes()
                torch.clear_autocast_cache()

    def _attempt(self, inputs: Any, answer: Answer | None, snapshot: Snapshot) -> Adaptation | str:
        """Adapt, and leave the adapted weights in place; or say why the batch is skipped."""
        try:
            with untraced(snapshot):
                return self._adapt(inputs, answer, snapshot)
        except Skip as reason:
            return str(reason)
        finally:
            self._evaluate.forget()

    def _adapt(self, inputs: Any, answer: Answer | None, snapshot: Snapshot) -> Adaptation:
        settings = self._settings
        if settings.needs_batch and batch_size(inputs) < 2:
            raise Skip("batch statistics and batch terms need at least two samples")
        state, carried = self._start()
        for parameter in snapshot.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        adaptation = adapt_state(state, inputs, self._evaluate, settings, answer, carried=carried)
        if not settings.episodic:
            self._carried = state
            self._batches += 1
        return adaptation

    def bytes_kept(self, inputs: Any) -> int:
        """Return the bytes that the passes of a step keep for its backward pass."""
        snapshot = Snapshot(self._module)
        with untraced(snapshot):
            state, _ = self._start()
            state.enter()
            self._evaluate.restart()
            try:
                return bytes_kept(lambda: self._evaluate(inputs, state.anchor), self._module)
            except Skip:
                return 0
            finally:
                self._evaluate.restart()

    def _start(self) -> tuple[State, bool]:
        """Return the state this batch starts from, and whether an earlier batch has moved it."""
        reset = self._settings.reset
        due = isinstance(reset, int) and self._batches % reset == 0
        if self._carried is None or due:
            return State(self.selected, self._settings, self._single), False
        return self._carried, True
