"""A snapshot puts back everything a module is, whatever was done to it meanwhile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.modules import bits, changed, toy
from helpers.reference import ToyNet
from torch import nn

from it3_lightning.engine.restore import Snapshot


def module() -> ToyNet:
    """With gradients, flags, and buffers of every kind."""
    net = toy()
    net.embed.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    net.register_buffer("hidden", torch.arange(3.0), persistent=False)
    net.register_buffer("empty", None)
    net.register_buffer("shared", torch.zeros(1).expand(4))
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    net.register_buffer("nan", torch.tensor([torch.nan, 1.0]))
    return net


def replace(net: ToyNet) -> None:
    for parameter in net.parameters():
        parameter.data = torch.zeros_like(parameter)


def train(net: ToyNet) -> None:
    net.train()
    net.zero_grad()
    torch.autograd.backward(net(torch.ones(2, 1, 4, 4, dtype=torch.float64)).sum())
    net.requires_grad_(False)


def write(net: ToyNet) -> None:
    for name, buffer in net.named_buffers():
        if name != "shared":
            buffer.zero_()


def reassign(net: ToyNet) -> None:
    net.hidden = torch.ones(7)
    net.empty = torch.ones(1)
    net._buffers["shared"] = None
    net.bn.running_mean = None
    net.register_buffer("new", torch.ones(1))
    del net.sparse


def attributes(net: ToyNet) -> None:
    net.conv.stride = (2, 2)
    net.conv.activation = torch.ones(1)
    del net.dense.in_features
    net.bn.track_running_stats = False


CHANGES: list[Callable[[ToyNet], None]] = [replace, train, write, reassign, attributes]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_restore_puts_back_every_bit(
    change: Callable[[ToyNet], None], mode: Callable[[], Any]
) -> None:
    net = module()
    before = bits(net)
    with mode():
        snapshot = Snapshot(net)
    with torch.enable_grad():
        change(net)
    assert changed(before, net) != []
    with mode():
        snapshot.restore()
    assert changed(before, net) == []
    assert not any(p.is_inference() for p in [*net.parameters(), *net.buffers()])


def test_it_can_be_restored_again_and_again() -> None:
    net = module()
    before = bits(net)
    snapshot = Snapshot(net)
    for change in CHANGES:
        change(net)
        snapshot.restore()
        assert changed(before, net) == []


def test_buffers_made_in_inference_mode_are_restored() -> None:
    net = nn.Linear(1, 1)
    with torch.inference_mode():
        net.register_buffer("made", torch.ones(2))
    snapshot = Snapshot(net)
    with torch.inference_mode():
        net.get_buffer("made").zero_()
    snapshot.restore()
    assert net.get_buffer("made").tolist() == [1.0, 1.0]


def test_a_parameter_trains_on_after_restore() -> None:
    net = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    nn.init.ones_(net.weight)
    with torch.inference_mode():
        snapshot = Snapshot(net)
        net.weight.data = torch.zeros(1, 1)
        snapshot.restore()
    torch.autograd.backward(net(torch.full((1, 1), 3.0)).sum())
    optimizer.step()
    assert net.weight.item() == -2.0
