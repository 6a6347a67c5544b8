"""Batches and samples that go wrong in a given way."""

import torch
from torch import Tensor

from helpers.modules import images, toy
from helpers.reference import forward_predict


class BadBatch:
    """Makes one batch, marked by its size, go wrong in a given way."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.net = toy()
        self.passes = 0

    def batch(self) -> Tensor:
        """Return the one that goes wrong."""
        x = images(5, seed=9)
        return x * torch.nan if self.kind == "input" else x

    def forward(self, x: Tensor, prior: Tensor | None) -> Tensor:
        """Return logits `(B, 3)`."""
        logits = forward_predict(self.net, x, prior)
        if len(x) != 5:
            return logits
        self.passes += 1
        if self.kind == "output after a step" and self.passes == 5:
            return logits / torch.zeros_like(logits)
        if self.kind == "second pass" and prior is not None:
            return logits / torch.zeros_like(logits)
        return logits

    def distance(self, p: Tensor, q: Tensor) -> Tensor:
        """Return the distances `(B,)`."""
        measure = (p - q).square().sum(1)
        if len(p) != 5:
            return measure
        if self.kind == "loss":
            return measure + torch.inf
        if self.kind == "gradient":
            return measure + (p - p.detach()).sum(1).sqrt()  # 0, with an infinite slope
        return measure


BATCH_FAULTS = {
    "input": "non-finite output",
    "output after a step": "non-finite output",
    "second pass": "non-finite loss",
    "loss": "non-finite loss",
    "gradient": "non-finite gradient or weights",
}


NAN, MARK = torch.nan, 1e3


class BadSample:
    """Makes one sample, marked in a corner, go wrong in a given way."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.net, self.source = toy(), toy()

    def batch(self, bad: int | None) -> Tensor:
        """Return images, of which one is bad, if any."""
        x = images()
        if bad is not None:
            x[bad, 0, 0, 0] = NAN if self.kind == "input" else MARK
        return x

    def forward(self, x: Tensor, prior: Tensor | None) -> Tensor:
        """Return logits `(B, 3)`."""
        marked = x[:, 0, 0, :1] == MARK
        clean = torch.where(marked[:, :, None, None], 0.0, x)
        logits = forward_predict(self.net, clean, prior)
        if self.kind == "second pass" and prior is not None:
            return torch.where(marked, NAN, logits)
        if self.kind == "gradient":  # adds 0, with an infinite slope
            return logits + torch.where(marked, logits - logits.detach(), 1.0).sqrt() * marked
        if self.kind == "last output" and prior is None:
            there = forward_predict(self.source, clean, None).detach()
            moved = (logits.detach() - there).abs().amax(1, keepdim=True) > 1e-9
            return torch.where(marked & moved, NAN, logits)
        return logits


SAMPLE_FAULTS = {
    "input": "non-finite output",
    "second pass": "non-finite loss",
    "gradient": "non-finite gradient or weights",
    "last output": "non-finite output",
}
