"""The prior of independent labels (multi-label): each is there or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from it3_lightning.priors.classes import (
    NOT_LOGITS,
    OutputKind,
    check_outputs,
    counted,
    mean_outputs,
    shares,
    unrounded,
)
from it3_lightning.priors.prior import Neutral, Prior


class LabelsPrior(Prior):
    r"""Independent labels, each of which is there with a probability of its own (sigmoid).

    Label space is ``(B, 2, L)``: of every label the probabilities that it is absent and present. So
    distances, filters and entropies are those of two classes, averaged over the labels. The network
    sees the ``L`` probabilities of presence.

    Perturbed: each sample's labels mixed, by a random share, with those of a random sample of the
    batch; where this is the sample itself, with its own in reverse order.

    Args:
        num_labels: number of labels ``L``.
        outputs: what the network puts out: ``"logits"`` or ``"probabilities"``.
        neutral: see :class:`Prior`; ``"uniform"``: 1/2 of each label.
        neutral_value: see :class:`Prior`.
        ignore_index: value of single labels that the loss ignores, such as -1 for unknown: their
            prior is 1/2. A sample without any known label sees the neutral prior.

    Shapes:
        targets ``(B, L)``: 0 and 1, or probabilities; outputs ``(B, L)``.

    Raises:
        ValueError: an unknown name, a target outside [0, 1], or another number of labels.

    >>> LabelsPrior(3).from_target(torch.tensor([[1, 0, 1]]))[:, 1]
    tensor([[1., 0., 1.]])
    """

    def __init__(
        self,
        num_labels: int,
        *,
        outputs: OutputKind = "logits",
        neutral: Neutral = "zeros",
        neutral_value: float = -1.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            num_labels, neutral=neutral, neutral_value=neutral_value, presence_flag=True
        )
        check_outputs(outputs)
        self.outputs: OutputKind = outputs
        self.ignore_index = ignore_index

    def from_target(self, target: Tensor) -> Tensor:
        """Return ``(B, 2, L)`` probabilities of absence and presence."""
        self._check(target, "a target")
        return _both(shares(target, self.ignore_index, _ADVICE))

    def known(self, target: Tensor) -> Tensor | None:
        """Return which samples have a label that is not ignored, ``(B,)``; ``None``: all."""
        found = counted(target, self.ignore_index)
        found = None if found is None else found.any(1)
        return None if found is None or bool(found.all()) else found

    def from_output(self, output: Tensor) -> Tensor:
        """Return ``(B, 2, L)`` probabilities of absence and presence."""
        self._check(output, "an output")
        values = unrounded(output)
        return _both(values.sigmoid() if self.outputs == "logits" else values)

    def check_output(self, prior: Tensor) -> None:
        """Refuse outputs outside [0, 1] that were said to be probabilities."""
        if self.outputs == "probabilities":
            shares(prior, advice=NOT_LOGITS)

    def joined(self, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the probabilities of presence, ``(B, 2, L) -> (B, L)``.

        Raises:
            ValueError: the prior has another shape.
        """
        if prior.ndim != 3 or prior.shape[1:] != (2, self.channels):
            raise ValueError(
                f"Expected a prior of shape (B, 2, {self.channels}), absent and present, got "
                f"{tuple(prior.shape)}. Make it by from_target(labels) or from_output(outputs)."
            )
        return prior[:, 1]

    def neutral_input(self, batch_size: int, like: Tensor) -> Tensor:
        """Return the neutral prior ``(B, L + 1)``; uniform is 1/2 of each label."""
        values = super().neutral_input(batch_size, like)
        if self.neutral == "uniform":
            values[:, : self.channels] = 0.5
        return values

    def mean_output(self, first: Tensor, second: Tensor) -> Tensor:
        """Return outputs, logits or probabilities, of the mean of both probabilities."""
        return mean_outputs(first, second, self.outputs, single=True)

    def to_output(self, prediction: Tensor, like: Tensor) -> Tensor:
        """Return logits or probabilities ``(B, L)``."""
        tiny = torch.finfo(prediction.dtype).tiny
        absent, present = prediction.clamp_min(tiny).unbind(1)
        values = present.log() - absent.log() if self.outputs == "logits" else prediction[:, 1]
        return values.reshape(like.shape).to(like.dtype)

    def perturb(self, prior: Tensor) -> Tensor:
        """Mix each sample's labels with those of a random one, or with its own in reverse order."""
        drawn = torch.randperm(prior.shape[0], device=prior.device)
        itself = drawn == torch.arange(prior.shape[0], device=prior.device)
        other = torch.where(itself[:, None, None], prior.flip(2), prior[drawn])
        share = torch.rand(prior.shape[0], 1, 1, device=prior.device, dtype=prior.dtype)
        return share * prior + (1 - share) * other

    def weights(self, prior: Tensor) -> Tensor:
        r"""Return weights that make some labels frequent, :math:`e^{t^T p}`, ``t ~ N(0, 1)``."""
        present = prior[:, 1]
        return (present @ torch.randn_like(present[0])).softmax(0)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = {"num_labels": self.channels, "outputs": self.outputs}
        return {**own, **super().init_args(), "ignore_index": self.ignore_index}

    def _check(self, values: Tensor, what: str) -> None:
        if values.ndim != 2 or values.shape[1] != self.channels:
            raise ValueError(
                f"LabelsPrior({self.channels}) expected {what} of shape (B, {self.channels}), got "
                f"{tuple(values.shape)}. Give it as many labels as the network has outputs; "
                "ClassPrior takes classes of which each sample has one."
            )


_ADVICE = "Give labels of 0 and 1, or set ignore_index to the value that the loss ignores."


def _both(present: Tensor) -> Tensor:
    """Return the probabilities of absence and presence, ``(B, L) -> (B, 2, L)``."""
    return torch.stack([1 - present, present], dim=1)
