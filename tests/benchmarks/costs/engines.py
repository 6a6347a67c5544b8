"""Our engine as it is timed: the published objective, one step of Adam, nothing measured."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from costs.networks import CLASSES, Subject
from it3_lightning.engine import Adaptation, SampleAdapter, Settings, adapter
from it3_lightning.engine.types import Plain
from it3_lightning.methods import Idempotence
from it3_lightning.priors import ClassPrior

LR = 1e-4


class Ours:
    """An adapter on a conditioned network, with the final forward pass as its answer.

    Args:
        subject: holds the network.
        settings: besides the published objective, the learning rate and ``measure=False``.
    """

    def __init__(self, subject: Subject, **settings: Any) -> None:
        given = {"objective": Idempotence(reliability=None), "lr": LR, "measure": False}
        self._module = subject.conditioned
        self.adapter = adapter(
            self._module,
            self._module,
            ClassPrior(CLASSES).from_output,
            Settings(**{**given, **settings}),
            enters={self._module.enters: "output"},
        )

    def adapt(self, images: Tensor) -> Adaptation:
        """Return what comes of adapting to the images and predicting them."""
        with self.adapter.adapted(images, Plain(self._module)) as adaptation:
            return adaptation

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C)`` from weights adapted to the images."""
        outputs = self.adapt(images).outputs
        assert outputs is not None
        return outputs

    def deeds(self, images: Tensor) -> tuple[int, int, int, int]:
        """Return weights adapted, forwards, backwards, calls answered from a record."""
        done = self.adapt(images)
        weights = sum(p.numel() for p in self.adapter.selected.values())
        return weights, done.forwards, done.backwards, done.cache_hits

    def choice(self) -> str:
        """Say which backend was chosen, in scope ``"sample"``."""
        return (
            str(self.adapter.backend_selection) if isinstance(self.adapter, SampleAdapter) else ""
        )
