"""Scope ``"sample"`` under a Trainer: a step on a whole batch, each sample with its own weights.

The step runs once, with the source weights in place. What it asks the module for by ``self(...)``
is computed with weights adapted to each sample, and answered in the structure that the module's
``forward`` returns.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from it3_lightning.arguments import same
from it3_lightning.engine import Adaptation, Settings
from it3_lightning.host import normal
from it3_lightning.protocols import IT3Module
from it3_lightning.questions import Answers, Question
from it3_lightning.standing_in import told_of_calls
from it3_lightning.takeover import Prediction

_NEVER_ASKED = """{step} of {name} never called self(...), so nothing of it saw the adapted weights.
    wrong:  logits = self.net(x)
    right:  logits = self(x)  # with def forward(self, x): return self.net(x)
scope='sample' answers self(...) with each sample's own weights. scope='batch' serves any step."""

_BESIDE = """{step} of {name} ran {layer!r} by itself, and so with the source weights.
scope='sample' answers only self(...) with each sample's own weights. scope='batch' serves any."""


class Answering:
    """Runs a step of scope ``"sample"``: its calls of ``self(...)`` are answered.

    The weights adapt to what ``it3_inputs`` finds in the batch. A call with other arguments, such
    as augmented views of as many samples, is answered with those weights; each such call adapts
    anew. A call under ``self.it3_given(prior)``, as ``self.predict_with`` makes it, is answered
    with that prior. What ``forward`` itself logs, counts or keeps on the module is not kept: it ran
    for single samples, possibly inside ``torch.func``; log in the step.

    Args:
        module: whose step runs.
        host: the same, as what predicts with a prior.
        settings: how to adapt.
        prediction: what ``self(...)`` returns: the ``"first"`` prediction, the ``"second"``, which
            sees the first as its prior, or the ``"mean"`` of both.
        step: name of the step.

    Raises:
        MisconfigurationException: the selection of parameters matches nothing, or the module has no
            ``forward``.
    """

    def __init__(
        self,
        module: LightningModule,
        host: IT3Module,
        settings: Settings,
        *,
        prediction: Prediction,
        step: str,
    ) -> None:
        self._module = module
        self._names = {"step": step, "name": type(module).__name__}
        if module.forward == LightningModule.forward.__get__(module):
            raise MisconfigurationException(_NEVER_ASKED.format(**self._names))
        self._answers = Answers(module, host, settings, prediction)
        self.adapter = self._answers.adapter
        ids = {id(parameter) for parameter in self.adapter.selected.values()}
        self._adapting = {
            id(owner): name  # the hash of a metric changes with its state
            for name, owner in list(module.named_modules())[1:]
            if any(id(parameter) in ids for parameter in owner.parameters(recurse=False))
        }

    def run(self, inputs: Any, step: Callable[[], Any]) -> tuple[Any, Adaptation]:
        """Run the step and return what it returned, and the adaptation to the inputs.

        Raises:
            MisconfigurationException: the step never calls the module.
            ValueError: it calls it with another number of samples.
        """
        asking = _Asking(self._module, self._answers, normal(inputs))
        with asking.listening():
            output = step()
        if not asking.answered:
            raise MisconfigurationException(_NEVER_ASKED.format(**self._names))
        layers = [self._adapting[id(m)] for m in asking.called if id(m) in self._adapting]
        if layers:
            rank_zero_warn(_BESIDE.format(**self._names, layer=layers[0]))
            self._adapting = {}  # once is enough
        return output, asking.adaptation


class _Asking:
    """What a step asks while it runs, and what it was answered."""

    def __init__(self, module: LightningModule, answers: Answers, inputs: Any) -> None:
        self._module = module
        self._answers = answers
        self._inputs = inputs
        self._priors: list[Tensor | None] = []  # given by the step, innermost last
        self._stack = ExitStack()
        self.answered: list[tuple[Any, Any, Adaptation]] = []
        self.called: list[nn.Module] = []  # modules that the step ran by itself

    @property
    def adaptation(self) -> Adaptation:
        """What the answers came from; its time is that of all of them."""
        parts = [adaptation for *_, adaptation in self.answered]
        return replace(parts[0], seconds=sum(part.seconds for part in parts))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Stand in for ``forward`` and ``it3_given`` within."""
        self._listen()
        try:
            yield
        finally:
            self._stack.close()

    def _listen(self) -> None:
        forward = self.forward
        if "torch._dynamo" in sys.modules:  # a compiled step runs it as it is
            forward = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
        standing_in = self._answers.standing_in(forward=forward, it3_given=self.given)
        self._stack.enter_context(standing_in)
        self._stack.enter_context(told_of_calls(self.called.append))

    @contextmanager
    def given(self, prior: Tensor | None) -> Iterator[None]:
        """Let calls within be answered with a prior."""
        self._priors.append(prior)
        try:
            yield
        finally:
            self._priors.pop()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call; one that was answered before, with the same again."""
        given = bool(self._priors)
        prior = self._priors[-1] if given else None
        question = Question(self._inputs, *normal((args, kwargs, prior)))
        for former, answer, _ in self.answered:
            if same(former, (question[1:], given)):
                return copy.deepcopy(answer)  # the step may write into it
        self._stack.close()
        try:
            answer, adaptation = self._answers.to(question, given=given)
        finally:
            self._listen()
        self.answered.append(((question[1:], given), answer, adaptation))
        return copy.deepcopy(answer)
