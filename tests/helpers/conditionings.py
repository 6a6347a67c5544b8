"""What tests of conditionings share: attached ones, priors for them, and samples alone."""

import torch
from torch import Tensor, nn

from it3_lightning.conditioning import (
    Conditioning,
)
from it3_lightning.priors import ClassPrior, Prior

CLASSES = 3


def attached(
    conditioning: Conditioning, network: nn.Module, prior: Prior | None = None
) -> Conditioning:
    """Attach, then draw all new weights, the embedder's last too, which starts at zero."""
    conditioning.attach(network, prior or ClassPrior(CLASSES))
    for parameter in conditioning.parameters():
        nn.init.normal_(parameter)
    return conditioning


def priors(batch: int) -> Tensor:
    """Draw priors `(B, 3)`."""
    return torch.randn(batch, CLASSES).softmax(1)


def embedded(injection: Conditioning, key: str, prior: Tensor) -> Tensor:
    """Run the embedder by hand."""
    mlp = injection.get_submodule(f"embedders.{key}")
    first, last = mlp.get_submodule("first"), mlp.get_submodule("last")
    rows: Tensor = last(first(prior).relu())
    return rows


def assert_samples_as_alone(
    network: nn.Module, conditioning: Conditioning, x: Tensor, prior: Tensor
) -> None:
    """Check that samples along dimension 1 come out as each does by itself."""
    with conditioning.given(prior):
        together = network(x)
    for index in range(len(prior)):
        with conditioning.given(prior[index : index + 1]):
            alone = network(x[:, index : index + 1])
        torch.testing.assert_close(together[:, index : index + 1], alone)
