"""ForwardArgument: the prior by a parameter of forward."""

from typing import Any

import pytest
import torch
from helpers.conditionings import CLASSES, attached, priors
from torch import Tensor, nn

from it3_lightning.conditioning import (
    ForwardArgument,
)
from it3_lightning.priors import ClassPrior, ValuePrior


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


class Echo(nn.Module):
    """Returns the prior it was called with."""

    def forward(self, x: Any, prior: Tensor | None = None) -> Tensor | None:
        return prior


@pytest.mark.parametrize(
    ("neutral", "expected"),
    [("none", None), ("zeros", 0.0), ("uniform", 1 / 3), ("constant", -1.0)],
)
def test_forward_argument_is_the_neutral_prior_unless_given(
    neutral: Any, expected: float | None
) -> None:
    network, x = Echo(), torch.zeros(5, 4, dtype=torch.float64)
    argument = attached(ForwardArgument(), network, ClassPrior(CLASSES, neutral=neutral))
    with argument.given(None):
        inside = network(x)
    for found in (inside, network(x)):
        if expected is None:
            assert found is None
        else:
            assert torch.equal(found, torch.full((5, CLASSES), expected, dtype=torch.float64))
    prior = priors(5)
    with argument.given(prior):
        assert torch.equal(network(x), prior.double())


def test_forward_argument_of_values_carries_the_presence_flag() -> None:
    network = Echo()
    argument = attached(ForwardArgument(), network, ValuePrior(mean=0.0, std=1.0))
    prior, present = torch.tensor([[2.0], [3.0]]), torch.tensor([True, False])
    with argument.given(prior, present):
        assert network(torch.zeros(2)).tolist() == [[2.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 4, dtype=torch.long), {"x": torch.zeros(2, 4)}, ["a", torch.zeros(2)]]
)
def test_forward_argument_takes_any_inputs_with_a_tensor(inputs: Any) -> None:
    network = Echo()
    attached(ForwardArgument(), network, ClassPrior(CLASSES, neutral="uniform"))
    found = network(inputs)
    assert torch.equal(found, torch.full((2, CLASSES), 1 / 3))


def test_forward_argument_needs_a_tensor() -> None:
    network = Echo()
    attached(ForwardArgument(), network)
    with pytest.raises(
        ValueError, match=r"called with a tensor \(B, ...\) or a batch of graphs, got str"
    ):
        network("text")


def test_a_prior_handed_over_by_the_caller_goes_first() -> None:
    network, own = Echo(), priors(5)
    argument = attached(ForwardArgument(), network)
    assert torch.equal(network(torch.zeros(5, 4), prior=own), own)
    with pytest.raises(RuntimeError, match="never ran"), argument.given(priors(5)):
        network(torch.zeros(5, 4), prior=own)


def test_forward_argument_reaches_a_named_module_by_another_name() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return label

    network, prior = nn.Sequential(Inner()), priors(5)
    argument = attached(ForwardArgument("label", layer="0"), network)
    with argument.given(prior):
        assert torch.equal(network(torch.zeros(5, 4)), prior)
