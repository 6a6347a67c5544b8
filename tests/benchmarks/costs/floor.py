"""The floor: the forwards and backwards that no engine can do without, each timed alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from costs.clock import Piece
from costs.engines import LR
from costs.networks import CLASSES, Subject
from it3_lightning.priors import ClassPrior

PARTS = ("first forward", "second forward", "distance", "backward", "final forward")
UPDATE = "update"
LOOP = "plain loop"
BY_OPTIMIZER = "loop with torch.optim"


class Floor:
    """The parts of one step on a batch and of the prediction after it, in plain torch.

    Args:
        subject: holds the network.
        images: the batch.
    """

    def __init__(self, subject: Subject, images: Tensor) -> None:
        self._images = images
        self._before, self._after = subject.split()
        self._embedder = subject.conditioned.embedder().requires_grad_(False)
        self._to_label = ClassPrior(CLASSES).from_output
        self._parameters = list(subject.conditioned.net.parameters())
        self._gradients = [torch.full_like(p, 1e-3) for p in self._parameters]
        self._moved = [torch.empty_like(p, requires_grad=False) for p in self._parameters]

    def pieces(self) -> list[Piece]:
        """Return each of :data:`PARTS`, :data:`UPDATE`, and the loops: all of them in one."""
        return [
            Piece(PARTS[0], lambda _: self.first(), self._train),
            Piece(PARTS[1], lambda known: self.second(*known), self._known),
            Piece(PARTS[2], lambda pair: self.distance(*pair), self._predictions),
            Piece(PARTS[3], self.gradients, self.loss),
            Piece(PARTS[4], lambda _: self.final()),
            Piece(UPDATE, lambda _: self._update()),
            Piece(LOOP, lambda _: self._loop()),
            Piece(BY_OPTIMIZER, lambda _: self._by_optimizer()),
        ]

    def first(self) -> tuple[Tensor, Tensor]:
        """Return the features at which the prior enters, and logits ``y0``."""
        features = self._before(self._images)
        return features, self._after(features)

    def second(self, features: Tensor, prior: Tensor) -> Tensor:
        """Return logits ``y1`` of what runs once the prior has entered, on frozen weights."""
        added: Tensor = self._embedder(prior)
        added = added.reshape(*added.shape, *[1] * (features.ndim - added.ndim))
        logits: Tensor = self._after(features + added)
        return logits

    def distance(self, logits: Tensor, other: Tensor) -> Tensor:
        """Return the mean squared distance of two predictions in label space."""
        return (self._to_label(logits) - self._to_label(other)).square().sum(1).mean()

    def loss(self) -> Tensor:
        """Return the published loss with its whole graph, of both passes."""
        self._train()
        features, logits = self.first()
        self._freeze()
        loss = self.distance(logits, self.second(features.detach(), self._to_label(logits)))
        self._train()
        return loss

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the loss by all weights."""
        return torch.autograd.grad(loss, self._parameters)

    @torch.no_grad()
    def final(self) -> Tensor:
        """Return the prediction, logits ``(B, C)``."""
        return self.first()[1]

    @torch.no_grad()
    def _update(self) -> None:
        """Read weights and gradients and write new weights: the memory that any update moves."""
        for weights, gradients, out in zip(
            self._parameters, self._gradients, self._moved, strict=True
        ):
            torch.add(weights, gradients, alpha=-LR, out=out)

    def _loop(self) -> Tensor:
        """Do all of it, as a loop written by hand does; the new weights are not put in place."""
        self._gradients = list(self.gradients(self.loss()))
        self._update()
        return self.final()

    def _by_optimizer(self) -> Tensor:
        """Do the same with an optimizer of torch, predict by the new weights, put the old back."""
        source = [parameter.detach().clone() for parameter in self._parameters]
        optimizer = torch.optim.AdamW(self._parameters, lr=LR, weight_decay=0.0, fused=True)
        loss = self.loss()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        prediction = self.final()
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self._parameters), source)
        for parameter in self._parameters:
            parameter.grad = None
        return prediction

    def _known(self) -> tuple[Tensor, Tensor]:
        """Return what the second pass starts from: features, and a prior that needs gradients."""
        with torch.no_grad():
            features, logits = self.first()
            prior = self._to_label(logits)
        self._freeze()
        return features, prior.requires_grad_()

    def _predictions(self) -> tuple[Tensor, Tensor]:
        """Return logits of both passes that need gradients."""
        logits = self.final()
        return logits.requires_grad_(), logits.flip(0).requires_grad_()

    def _train(self) -> None:
        _need_gradients(self._parameters, True)

    def _freeze(self) -> None:
        _need_gradients(self._parameters, False)


def _need_gradients(parameters: list[nn.Parameter], need: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(need)
