"""Multilayer perceptrons written out in plain torch, and networks in the units of their target."""

import pytest
import torch
from torch import nn

from it3_lightning import ClassPrior, FeatureInjection
from it3_lightning.networks import MLP, Rescaled


def test_batch_norm_layers_follow_the_hidden_ones() -> None:
    torch.manual_seed(0)
    network = MLP(3, 2, (4, 5), batch_norm=True, output_mean=7.0, output_std=3.0)
    x = torch.randn(9, 3)
    names = [name for name, _ in network.named_children()]
    assert names == ["layer0", "norm0", "layer1", "norm1", "head"]
    hidden = x
    for index in range(2):
        hidden = network.get_submodule(f"layer{index}")(hidden)
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
        hidden = hidden.clamp_min(0)
    expected = 7 + 3 * (hidden @ network.head.weight.T + network.head.bias)
    torch.testing.assert_close(network(x), expected)


def test_a_network_without_hidden_layers_or_deviation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one hidden layer"):
        MLP(3, 1, ())
    with pytest.raises(ValueError, match="output_std > 0, got 0"):
        MLP(3, 1, output_std=0)


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
