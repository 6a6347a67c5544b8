"""The peer: IT3 as published in torch-ttt, on the same network with the same settings."""

from __future__ import annotations

from torch import Tensor, nn
from torch_ttt.engine.it3_engine import IT3Engine


class Peer:
    """``IT3Engine`` of torch-ttt 0.0.2, which adapts all weights to a batch by Adam.

    It copies the network (with the embedder and the last batch's optimizer) for every batch, runs
    both passes on live weights and takes gradients by all weights, those of its embedder included.
    The embedder that it builds at its first pass is built here, before anything is timed.

    Args:
        network: to adapt.
        layer: behind which the embedding of the prior is added.
        images: any input.
        steps: optimizer steps per batch.
        lr: learning rate.
    """

    def __init__(
        self, network: nn.Module, layer: str, images: Tensor, *, steps: int, lr: float
    ) -> None:
        settings = {"optimizer_name": "adam", "num_steps": steps, "lr": lr, "copy_model": True}
        self._network = network
        self._steps = steps
        self._engine = IT3Engine(network, layer, optimization_parameters=settings)
        self._engine.eval()
        self._engine.ttt_forward(images)
        assert self._engine.embeder is not None

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C)`` from weights adapted to the images."""
        logits: Tensor = self._engine(images)[0]
        return logits

    def deeds(self, images: Tensor) -> tuple[int, int, int, int]:
        """Return weights adapted, forwards, backwards, calls answered from a record."""
        forwards: list[None] = []
        counting = self._network.register_forward_hook(lambda *_: forwards.append(None))
        self(images)  # on a copy of the network, with a copy of the hook
        counting.remove()
        weights = sum(p.numel() for p in self._network.parameters() if p.requires_grad)
        return weights, len(forwards), self._steps, 0


def one_by_one(peer: Peer, images: Tensor) -> list[Tensor]:
    """Return logits of each image by itself, each from weights of its own."""
    singles: tuple[Tensor, ...] = images.split(1)  # type: ignore[no-untyped-call]
    return [peer(single) for single in singles]
