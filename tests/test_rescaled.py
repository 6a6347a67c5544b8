"""Networks around networks."""

import pytest
import torch
from torch import nn

from it3_lightning import ClassPrior, FeatureInjection
from it3_lightning.networks import MLP, Rescaled


def test_outputs_are_in_the_units_of_the_target_and_gradients_with_them() -> None:
    network, x = nn.Linear(2, 1), torch.randn(5, 2)
    outputs = Rescaled(network, mean=100.0, std=30.0)(x)
    torch.testing.assert_close(outputs, 100 + 30 * (x @ network.weight.T + network.bias))
    outputs.sum().backward()
    assert network.weight.grad is not None
    torch.testing.assert_close(network.weight.grad, 30 * x.sum(0, keepdim=True))


def test_layers_within_take_a_prior() -> None:
    inner, injection = MLP(2, 1, [4]), FeatureInjection("network.layer0")
    network = Rescaled(inner, mean=1.0, std=2.0)
    injection.attach(network, ClassPrior(3))
    with torch.no_grad():
        injection.get_parameter("embedders.network-layer0.last.bias").fill_(1.0)
        with injection.given(torch.eye(3)[:1]):
            given = network(torch.zeros(1, 2))
        hidden = (inner.get_parameter("layer0.bias") + 1).relu()
        torch.testing.assert_close(given[0], 1 + 2 * inner.head(hidden))


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match=rf"std > 0, .* got {std}"):
        Rescaled(nn.Identity(), mean=0.0, std=std)
