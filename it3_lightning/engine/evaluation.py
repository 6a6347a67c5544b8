"""The objective and its gradients: the first pass, and the anchor's pass on other weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from it3_lightning.engine.finite import all_finite
from it3_lightning.engine.first_step import FirstStep
from it3_lightning.engine.outcome import Evaluation, Forward, Skip, ToLabel
from it3_lightning.engine.polyak_step import PolyakStep
from it3_lightning.engine.record import Record
from it3_lightning.engine.samples import Answer, Plain, copied
from it3_lightning.engine.weights import Sites
from it3_lightning.objectives import TestTimeObjective


class Evaluator:
    """Evaluates an objective and its gradients on a module, and counts the passes.

    Args:
        module: whose weights are in place in the first pass.
        selected: the adapting parameters by name, which the anchor replaces.
        forward: ``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one.
        to_label: brings outputs into label space.
        objective: what is evaluated.
        record: of what need not be computed twice; ``None``: everything is.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        forward: Forward,
        to_label: ToLabel,
        objective: TestTimeObjective,
        record: Record | None = None,
    ) -> None:
        self._sites = Sites(module, selected)
        self._selected = selected
        self._forward = forward
        self._to_label = to_label
        self._objective = objective
        self._record = record
        self.restart()

    def restart(self) -> None:
        """Begin with a new batch."""
        self.forwards = self.backwards = 0
        if self._record is not None:
            self._record.answered = 0
        self.forget()

    def forget(self) -> None:
        """Begin with other inputs: nothing is known of their passes."""
        if self._record is not None:
            self._record.clear()

    @property
    def answered(self) -> int:
        """Calls of modules that were answered from the record, in this batch."""
        return 0 if self._record is None else self._record.answered

    def __call__(
        self,
        inputs: Any,
        anchor: Mapping[str, Tensor] | None,
        *,
        at_source: bool = False,
        outputs: Tensor | None = None,
    ) -> Evaluation:
        """Evaluate, ready for a backward pass.

        Args:
            inputs: of the network.
            anchor: weights of the second pass; ``None``: those in place.
            at_source: whether these are the weights that the first evaluation had in place.
            outputs: of the first pass, where they are known.

        Raises:
            Skip: an output is not finite.
        """
        if outputs is None:
            with nullcontext() if self._record is None else self._record.first_pass(inputs):
                outputs = self.run(inputs, None)
            if not all_finite(outputs):
                raise Skip("non-finite output")
        second = partial(self._second, inputs, anchor, at_source)
        return Evaluation(outputs, self._objective(self._to_label(outputs), second))

    @torch.no_grad()
    def measured(
        self,
        inputs: Any,
        anchor: Mapping[str, Tensor] | None,
        *,
        at_source: bool = False,
        outputs: Tensor | None = None,
    ) -> Evaluation:
        """Evaluate without a graph, from these outputs of the first pass where they are given."""
        return self(inputs, anchor, at_source=at_source, outputs=outputs)

    @torch.no_grad()
    def answer(self, inputs: Any, answer: Answer, *, finite: bool = True) -> tuple[Tensor, Any]:
        """Run an answer with the weights in place; other passes than the first have no record.

        Raises:
            Skip: an output is not finite, but has to be.
        """
        self.forwards += 1
        record = self._record if isinstance(answer, Plain) else None
        with nullcontext() if record is None else record.first_pass(inputs):
            outputs, answers = answer(copied(inputs))
        if finite and not all_finite(outputs):
            raise Skip("non-finite output")
        return outputs.detach(), answers

    def gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return the loss's gradients by the selected parameters, ``None`` where it has none.

        Raises:
            Skip: the loss is not finite.
            ValueError: there are no gradients at all.
        """
        self._check(loss)
        parameters = list(self._selected.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.backwards += 1
        if all(gradient is None for gradient in gradients):
            raise self._uninfluenced()
        return gradients

    def backward(
        self, loss: Tensor, single: FirstStep | PolyakStep
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the weights after the only step there is, where it moves them, and their sum.

        Raises:
            Skip: the loss is not finite.
            ValueError: there are no gradients at all.
        """
        self._check(loss)
        moved, total = single.backward(loss, self._selected)
        self.backwards += 1
        if not moved:
            raise self._uninfluenced()
        return moved, total

    def _check(self, loss: Tensor) -> None:
        if not all_finite(loss):
            raise Skip("non-finite loss")
        if not loss.requires_grad:
            raise self._uninfluenced()

    def _uninfluenced(self) -> ValueError:
        return ValueError(
            "None of the selected parameters influences the neutral prediction: "
            f"{', '.join(list(self._selected)[:5])}. Select parameters of the network itself, "
            "and let the forward pass keep its graph (no detach, no torch.no_grad)."
        )

    def run(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Run one forward pass, on inputs that it may write into, and count it.

        Raises:
            TypeError: it returned something else than a tensor.
        """
        self.forwards += 1
        outputs = self._forward(copied(inputs), prior)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"Expected the forward pass to return a tensor (B, ...), got "
                f"{type(outputs).__name__}. Override it3_forward to return the predictions alone."
            )
        return outputs

    def _second(
        self, inputs: Any, anchor: Mapping[str, Tensor] | None, at_source: bool, y0: Tensor
    ) -> Tensor:
        """Run the anchor: the loss moves what feeds it, ``y0``, and none of its weights."""
        with ExitStack() as stack:
            if anchor is not None:
                stack.enter_context(self._sites.swapped(anchor))
            if self._record is not None:
                stack.enter_context(self._record.second_pass(same=at_source))
            return self._to_label(self.run(inputs, y0))
