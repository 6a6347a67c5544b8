"""Which parameters adapt: by kind, by name, by a function; never this library's own."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from it3_lightning.engine.selection import layers_of, select


def network() -> nn.Module:
    """With every kind of norm layer, a frozen layer, and modules of this library."""
    layers = OrderedDict[str, nn.Module](
        conv=nn.Conv2d(3, 4, 3),
        bn=nn.BatchNorm2d(4),
        instance=nn.InstanceNorm2d(4, affine=True),
        plain=nn.BatchNorm2d(4, affine=False),
        gn=nn.GroupNorm(2, 4),
        ln=nn.LayerNorm(4),
        rms=nn.RMSNorm(4),
        frozen=nn.Linear(4, 4),
        it3_conditioning=nn.Linear(4, 4),
    )
    net = nn.Sequential(layers)
    net.frozen.requires_grad_(False)
    return net


NORMS = ["bn.weight", "bn.bias", "instance.weight", "instance.bias", "gn.weight", "gn.bias"]
NORMS += ["ln.weight", "ln.bias", "rms.weight"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("all", ["conv.weight", "conv.bias", *NORMS]),
        ("norm", NORMS),
        ("bias", ["conv.bias", "bn.bias", "instance.bias", "gn.bias", "ln.bias"]),
        ("conv.weight", ["conv.weight"]),
        (["bn.*", "conv.bias"], ["conv.bias", "bn.weight", "bn.bias"]),
        (["frozen.*"], ["frozen.weight", "frozen.bias"]),
        (["frozen.bias"], ["frozen.bias"]),
        (lambda name, p: name.endswith("weight") and p.ndim == 4, ["conv.weight"]),
        (lambda _, p: not p.requires_grad, ["frozen.weight", "frozen.bias"]),
    ],
)
def test_selection(selection: Any, expected: list[str]) -> None:
    net = network()
    found = select(net, selection)
    assert list(found) == expected
    assert all(parameter is net.get_parameter(name) for name, parameter in found.items())


@pytest.mark.parametrize("selection", ["all", "bias", ["*"], lambda *_: True])
def test_own_modules_never_adapt_at_any_depth(selection: Any) -> None:
    outer = nn.ModuleDict({"model": network(), "head": nn.Linear(4, 2)})
    assert not [name for name in select(outer, selection) if "it3_" in name]


def test_tied_parameters_are_selected_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert list(select(net, "all")) == ["0.weight", "0.bias", "1.bias"]


def test_layers_inside_a_norm_layer_are_no_norm_layers() -> None:
    class Activated(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(4)
            self.act = nn.PReLU()

    assert list(select(nn.Sequential(Activated()), "norm")) == ["0.weight", "0.bias"]


def test_parameters_of_whole_numbers_cannot_adapt() -> None:
    net = nn.Linear(2, 2)
    net.steps = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)
    assert list(select(net, ["*"])) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("con.weight", r"'con.weight' matches no trainable parameter. Did you mean 'conv.weight'"),
        (["bn.*", "layer9.*"], r"'layer9.\*' matches no trainable parameter"),
        (["it3_conditioning.*"], "matches no trainable parameter"),
        (lambda *_: False, r"The module has 13 parameters, 11 of them trainable: conv.weight, .*"),
        ([], r"The selection \[\] matches no trainable parameter"),
    ],
)
def test_a_selection_of_nothing_is_refused(selection: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(network(), selection)


def test_a_network_without_norm_layers_says_what_it_has() -> None:
    with pytest.raises(ValueError, match=r"has 2 parameters, 2 of them trainable: weight, bias\."):
        select(nn.Linear(2, 2), "norm")


def test_layers_are_found_by_name_or_are_the_norm_layers() -> None:
    outer = nn.ModuleDict({"model": network(), "it3_head": nn.LayerNorm(2)})
    norms = [f"model.{name}" for name in ("bn", "instance", "plain", "gn", "ln", "rms")]
    for wanted, names in (
        ("norm", norms),
        (["model.ln", "model.conv"], ["model.ln", "model.conv"]),
    ):
        found = layers_of(outer, wanted)
        assert list(found) == names
        assert all(layer is outer.get_submodule(name) for name, layer in found.items())
    assert layers_of(outer, ()) == {}


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"Unknown layer 'cnv'\. Did you mean 'conv'"):
        layers_of(network(), ["bn", "cnv"])
    with pytest.raises(ValueError, match="Expected a module with norm layers, got one without"):
        layers_of(nn.Linear(1, 1), "norm")
