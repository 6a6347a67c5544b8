"""A call of a module on a batch, answered with weights that are each sample's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._pytree import tree_leaves

from it3_lightning.adapters import adapter_of, in_precision
from it3_lightning.arguments import by_name, same
from it3_lightning.averaging import conditioned_only, mean_prediction
from it3_lightning.conditioning import Conditioning
from it3_lightning.engine import Adaptation, Settings, batch_size
from it3_lightning.engine.randomness import undisturbed_rng
from it3_lightning.engine.samples import Answer, Plain, copied, taken
from it3_lightning.graphs import graph_count
from it3_lightning.muting import muted
from it3_lightning.protocols import IT3Module
from it3_lightning.returned import Returned
from it3_lightning.standing_in import hooked_by, stood_in
from it3_lightning.takeover import Prediction


class Question(NamedTuple):
    """A call of a module's ``forward``, all tensors ``(B, ...)``.

    Args:
        inputs: of the batch, which the weights adapt to.
        args: of the call.
        kwargs: of the call.
        prior: that the caller gives; ``None``: none, or the neutral one.
    """

    inputs: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prior: Tensor | None = None


class Answers:
    """Answers calls of a module's ``forward``.

    Args:
        module: whose ``forward``.
        host: the same, as what predicts with a prior.
        settings: how to adapt, in at least one step for each sample.
        prediction: what a call that gives no prior is answered with: the ``"first"`` prediction,
            the ``"second"``, which sees the first as its prior, or the ``"mean"`` of both.

    Raises:
        MisconfigurationException: the selection of parameters matches nothing.
    """

    def __init__(
        self,
        module: LightningModule,
        host: IT3Module,
        settings: Settings,
        prediction: Prediction = "first",
    ) -> None:
        self.adapter = adapter_of(module, host, settings, inputs_in=lambda asked: asked.inputs)
        self._module = module
        self._host = host
        self._prediction = prediction

    def to(self, question: Question, *, given: bool) -> tuple[Any, Adaptation]:
        """Return what ``forward`` returns with each sample's weights, and their adaptation.

        Args:
            question: the call.
            given: whether the caller gives a prior, which may be the neutral one.

        Raises:
            ValueError: the call has another number of samples, or returns no samples.
        """
        self._check(question)
        prediction = "first" if given else self._prediction
        plain = prediction == "first" and question.prior is None
        usual = plain and self._is_usual(question)
        returned: list[Returned] = []

        def answer(asked: Question) -> tuple[Tensor, list[Tensor]]:
            with muted(self._module):
                if usual:
                    outputs, value = self._both(asked)
                else:
                    outputs = self._neutral(asked)
                    value = self._predicted(asked, outputs, prediction)
            returned.append(Returned(value, _samples(asked)))
            returned[0].check(returned[-1])
            return outputs, returned[-1].tensors

        asks = _Neutral(self._neutral, answer) if usual else answer
        with self.adapter.adapted(question, asks) as adaptation:
            structure = returned[-1]

        def ordinary() -> list[Tensor]:
            return answer(taken(question, range(1)))[1]

        tensors = in_precision(adaptation.answers, ordinary, self.adapter, self._module)
        return structure.filled(tensors), adaptation

    @contextmanager
    def standing_in(self, **methods: Callable[..., Any]) -> Iterator[None]:
        """Put methods on the module; they see its calls before the conditioning does."""
        with stood_in(self._module, **methods), hooked_by(self._module, self._not_conditioning):
            yield

    def _check(self, question: Question) -> None:
        size = batch_size(question.inputs)
        try:
            asked = batch_size((question.args, question.kwargs))
        except ValueError:
            asked = 0
        if size != asked:
            raise ValueError(
                f"{type(self._module).__name__} was called with {asked} samples in a batch of "
                f"{size}. With scope='sample' each sample has weights of its own: call it on all "
                "of them, once for each view, or use scope='batch'."
            )

    def _is_usual(self, question: Question) -> bool:
        """Whether a neutral pass on the inputs calls ``forward`` with the same arguments."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(args, kwargs)

        with torch.no_grad(), undisturbed_rng(), muted(self._module):
            try:
                with self.standing_in(forward=forward):
                    self._neutral(question)
            except _Reached as reached:
                asked = by_name(self._module.forward, question.args, question.kwargs)
                return same(by_name(self._module.forward, *reached.args), asked)
        return False

    def _both(self, asked: Question) -> tuple[Tensor, Any]:
        """Return the outputs of a neutral pass, and what ``forward`` returned in it."""
        own, values = self._module.forward, []

        def forward(*args: Any, **kwargs: Any) -> Any:
            values.append(own(*args, **kwargs))
            return values[-1]

        with stood_in(self._module, forward=forward):
            outputs = self._neutral(asked)
        return outputs, values[0]

    def _predicted(self, asked: Question, outputs: Tensor, prediction: Prediction) -> Any:
        """Return what ``forward`` returns; ``outputs`` are those of the neutral pass."""
        if prediction == "first":
            return self._called(asked, asked.prior)
        second = self._called(asked, self._host.it3_prior.from_output(outputs))
        if prediction == "second":
            return second
        return mean_prediction(self._host.it3_prior, self._called(asked, None), second)

    def _neutral(self, asked: Question, prior: Tensor | None = None) -> Tensor:
        return self._host.predict_with(asked.inputs, prior)

    def _called(self, asked: Question, prior: Tensor | None) -> Any:
        given = nullcontext() if prior is None else self._host.it3_given(prior)
        args, kwargs = copied((asked.args, asked.kwargs))  # each pass may write into its own
        with given, conditioned_only(self._module, self._host):
            return self._module(*args, **kwargs)

    def _not_conditioning(self, hook: Any) -> bool:
        conditioning = getattr(self._host, "it3_conditioning", None)
        return not (isinstance(conditioning, Conditioning) and conditioning.owns(hook))


@dataclass(frozen=True)
class _Neutral(Plain):
    """An answer whose pass is the first of a step: what cannot differ need not be computed."""

    answer: Answer

    def __call__(self, inputs: Any) -> tuple[Tensor, Any]:
        return self.answer(inputs)


class _Reached(BaseException):
    """The ``forward`` of a module was reached; carries its arguments."""


def _samples(asked: Question) -> int | None:
    """Return how many samples there are, or ``None``: outputs of graphs may be those of nodes."""
    leaves = [leaf for leaf in tree_leaves(asked.inputs) if not isinstance(leaf, Tensor)]
    return None if any(map(graph_count, leaves)) else batch_size(asked.inputs)
