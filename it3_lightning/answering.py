"""A step on a whole batch whose ``self(x)`` is answered with each sample's own adapted weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from it3_lightning.engine import Adaptation, SampleAdapter, batch_size
from it3_lightning.host import normal

Predict = Callable[[Any], Tensor]

_NEVER_ASKED = """{step} of {name} never called self(...), so nothing of it saw the adapted weights.
    wrong:  logits = self.net(x)
    right:  logits = self(x)  # with def forward(self, x): return self.net(x)
scope='sample' answers self(...) with each sample's own weights. scope='batch' serves any step."""


class Answering:
    """Stands in for a module's ``forward`` while its step runs.

    A call with the inputs of the batch is answered with what each sample's own weights predict. A
    call with other inputs of as many samples, such as augmented views, is answered sample by sample
    with the weights adapted to the batch's own inputs: adaptation runs once more for each.

    Args:
        module: whose step runs.
        adapter: adapts to inputs.
        elsewhere: adapts to ``(inputs, others)`` by ``inputs`` alone.
        predict: the prediction that is adapted: inputs to outputs.
    """

    def __init__(
        self,
        module: LightningModule,
        adapter: SampleAdapter,
        elsewhere: SampleAdapter,
        predict: Predict,
    ) -> None:
        self._module = module
        self._adapter = adapter
        self._elsewhere = elsewhere
        self._predict = predict
        self._tensors = 0  # in the arguments of the adapted prediction

    @contextmanager
    def adapted(self, inputs: Any, step: str) -> Iterator[Adaptation]:
        """Adapt to inputs and run the body with ``self(...)`` answered.

        Raises:
            MisconfigurationException: the body never calls the module.
            ValueError: it calls it with another number of samples.
        """
        own, forward_before = normal(inputs), self._module.forward
        asked = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal asked
            asked += 1
            if self._is_batch((args, kwargs), inputs):
                return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, answers)
            with _forward_of(self._module, forward_before):
                return self._other(own, args, kwargs)

        with self._adapter.adapted(own, self._answer) as adaptation:
            answers = adaptation.answers
            with _forward_of(self._module, forward):
                yield adaptation
        if not asked:
            name = type(self._module).__name__
            raise MisconfigurationException(_NEVER_ASKED.format(step=step, name=name))

    def _answer(self, inputs: Any) -> tuple[Tensor, Any]:
        """Predict; return the outputs, and what the module's own ``forward`` returned last."""
        own, returned = self._module.forward, []

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._tensors = len(_tensors((args, kwargs)))
            returned.append(own(*args, **kwargs))
            return returned[-1]

        with _forward_of(self._module, forward):
            outputs = self._predict(inputs)
        return outputs, returned[-1] if returned else outputs

    def _is_batch(self, asked: Any, inputs: Any) -> bool:
        """Whether a call has the inputs of the batch, as the adapted prediction had them."""
        known = tree_leaves(inputs)
        graphs = [leaf for leaf in tree_leaves(asked) if hasattr(leaf, "num_graphs")]
        leaves = [*_tensors(asked), *graphs]
        same = all(any(_equal(leaf, other) for other in known) for leaf in leaves)
        return same and len(_tensors(asked)) == self._tensors

    def _other(self, inputs: Any, args: Any, kwargs: Any) -> Any:
        """Answer a call with other inputs."""
        size, others = batch_size(inputs), batch_size((args, kwargs))
        if size != others:
            raise ValueError(
                f"{type(self._module).__name__} was called with {others} samples in a batch of "
                f"{size}. With scope='sample' each sample has weights of its own: call it once for "
                "each view of the batch, or use scope='batch'."
            )
        own = self._module.forward

        def answer(both: Any) -> tuple[Tensor, Any]:
            _, (its, named) = both
            result = own(*its, **named)
            return _tensors(result)[0], result

        with self._elsewhere.adapted((inputs, normal((args, kwargs))), answer) as adaptation:
            return adaptation.answers


@contextmanager
def _forward_of(module: LightningModule, forward: Callable[..., Any]) -> Iterator[None]:
    """Put a ``forward`` on the instance; hooks of the module still run around it."""
    attributes = vars(module)
    before = {"forward": attributes["forward"]} if "forward" in attributes else {}
    attributes["forward"] = forward
    try:
        yield
    finally:
        attributes.pop("forward", None)
        attributes.update(before)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _equal(a: Any, b: Any) -> bool:
    if a is b or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
