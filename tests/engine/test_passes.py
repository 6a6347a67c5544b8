"""Passes: what methods whose samples go at once may not ask for, and what others get."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.modules import images, takes_prior, toy
from helpers.reference import forward_predict, softmax_label
from torch import Tensor, nn

from it3_lightning.engine.passes import FunctionalPasses, Network, NetworkPasses, Sites
from it3_lightning.engine.state import SourceInPlace

REFUSED: dict[str, Callable[[FunctionalPasses], Any]] = {
    "inputs": lambda passes: passes.inputs,
    "weights": lambda passes: passes.weights,
    "other": lambda passes: passes.other(images()),
    "anchor": lambda passes: passes.anchor(images()),
    "unadapted": lambda passes: passes.unadapted(images()),
    "features": lambda passes: passes.features("head"),
    "features_of": lambda passes: passes.features_of("head", images()),
    "submodule": lambda passes: passes.submodule("head"),
    "again": lambda passes: passes.again(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_vectorised_method_asks_for_two_predictions_alone(name: str) -> None:
    y0 = torch.ones(1, 3)
    passes = FunctionalPasses(y0, y0 / 3, lambda prior: 2 * prior)
    assert torch.equal(passes.second(passes.y0), 2 * y0 / 3)
    with pytest.raises(NotImplementedError, match=rf"asks for y0 and second.*not for {name}$"):
        REFUSED[name](passes)


def network_of(net: nn.Module) -> Network:
    selected = dict(net.named_parameters())
    return Network(net, selected, takes_prior(net), softmax_label, {})


def test_passes_once_more_are_those_of_the_weights_as_they_are() -> None:
    net, x = toy(), images()
    passes = NetworkPasses(network_of(net), x, SourceInPlace())
    with torch.no_grad():
        net.head.bias.add_(torch.tensor([1.0, 0.0, 0.0]).double())
    again = passes.again()
    assert isinstance(again, NetworkPasses)
    expected = forward_predict(net, x, None)
    assert torch.equal(again.outputs, expected)
    assert torch.equal(again.y0, softmax_label(expected))
    assert torch.equal(again.inputs, x)
    assert not torch.equal(passes.outputs, expected)


def test_weights_in_place_of_others_are_in_every_place_and_come_back() -> None:
    net = toy()
    net.add_module("tied", nn.Linear(1, 1))
    net.get_submodule("tied").bias = net.head.bias
    own = net.head.bias
    other = torch.zeros(3).double()

    def run() -> list[Tensor]:
        return [net.head.bias, net.get_submodule("tied").bias]  # type: ignore[list-item]

    found = Sites(net, {"head.bias": own}).run_with({"head.bias": other}, run)
    assert all(each is other for each in found)
    assert all(each is own for each in run())
