"""A snapshot puts back everything a module is, whatever was done to it meanwhile."""

import copy
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.interrupting import saved_tensors_hooks
from helpers.modules import bits, changed, toy
from helpers.reference import ToyNet
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from it3_lightning.engine.fast.stacked_weights import _never
from it3_lightning.engine.restore import (
    NormStatistics,
    Snapshot,
    Undo,
    _Drawn,
    counted_once,
    generators_drawn_by,
    undisturbed_rng,
    without_side_effects,
)


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


# What a pass may write into, by kind


class Box:
    """An object of the user's."""

    def __init__(self) -> None:
        self.seen = [0]
        self.tensor = torch.zeros(2)

    def write(self) -> None:
        self.seen.append(1)
        self.tensor.add_(1)


class Counts(nn.Module):
    """Has a buffer, as a metric does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))


def _write_tensor(value: Tensor) -> None:
    value.add_(1)


KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "list": (lambda: [1], lambda v: v.append(2)),
    "dict": (lambda: {"a": 1}, lambda v: v.update(a=2, b=3)),
    "set": (lambda: {1}, lambda v: v.add(2)),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda v: v.append(3)),
    "Counter": (lambda: Counter("aab"), lambda v: v.update("abc")),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda v: v["b"].append(1)),
    "OrderedDict": (lambda: OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
    "nested": (lambda: {"train": {"count": [0]}}, lambda v: v["train"]["count"].append(1)),
    "in a tuple": (lambda: ([1], {}), lambda v: v[0].append(2)),
    "tensor": (lambda: torch.zeros(3), _write_tensor),
    "transposed tensor": (lambda: torch.zeros(2, 3).T, _write_tensor),
    "tensor in a list": (lambda: [torch.zeros(3)], lambda v: _write_tensor(v[0])),
    "array": (lambda: np.zeros(3), lambda v: v.fill(1)),
    "torch.Generator": (lambda: torch.Generator().manual_seed(0), lambda v: v.manual_seed(1)),
    "random.Random": (lambda: random.Random(0), lambda v: v.random()),
    "numpy Generator": (lambda: np.random.default_rng(0), lambda v: v.random()),
    "own object": (Box, Box.write),
    "unregistered module": (lambda: [Counts()], lambda v: v[0].seen.add_(1)),
}


def held(value: Any) -> Any:
    """Return what a value holds, to compare by."""
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, nn.Module):
        return {name: tensor.tolist() for name, tensor in value.state_dict().items()}
    if isinstance(value, Box):
        return value.seen.copy(), value.tensor.tolist()
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return [(key, held(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [held(item) for item in value]
    return copy.copy(value)


@pytest.mark.parametrize("way", ["snapshot", "passes", "counted once"])
@pytest.mark.parametrize("kind", KEPT)
def test_whatever_kind_is_written_into_is_put_back(kind: str, way: str) -> None:
    make, write = KEPT[kind]
    net: Any = nn.Sequential(nn.Linear(1, 1))
    net[0].kept = value = make()  # on a submodule
    before = held(value)
    if way == "snapshot":
        snapshot = Snapshot(net)
        write(value)
        assert held(value) != before
        snapshot.restore()
    else:
        context = without_side_effects(Snapshot(net)) if way == "passes" else counted_once(net)
        with context:
            write(value)
            assert held(value) != before
    assert net[0].kept is value
    assert held(value) == before


def test_long_containers_are_not_looked_into_and_large_data_is_not_copied() -> None:
    net: Any = nn.Linear(1, 1)
    net.results = [torch.zeros(1) for _ in range(1000)]
    net.data, net.array = torch.zeros(5_000_000), np.zeros(5_000_000)
    kept = [each for each, _ in Snapshot(net)._contents]
    assert any(each is net.results for each in kept)
    assert not any(isinstance(each, Tensor | np.ndarray) for each in kept)


def test_what_cannot_be_written_into_is_left_alone() -> None:
    net: Any = nn.Linear(1, 1)
    net.register_buffer("expanded", torch.zeros(1).expand(2))
    net.table = np.arange(3)
    net.table.setflags(write=False)
    with without_side_effects(Snapshot(net)):
        pass
    assert net.table.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_weights_that_hooks_compute_come_back_with_the_parameters(kind: str) -> None:
    layer: Any = nn.Linear(3, 2)
    if kind == "prune":
        prune.random_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
    else:
        layer = getattr(nn.utils, kind)(layer)
    layer.eval()(torch.ones(1, 3))
    before = layer.weight
    snapshot = Snapshot(layer)
    for parameter in layer.parameters():
        parameter.data = parameter.data * 2
    layer(torch.ones(1, 3))
    assert layer.weight is not before
    snapshot.restore_weights()
    assert layer.weight is before


def test_tables_of_inference_mode_are_ordinary_within_passes_and_come_back() -> None:
    net: Any = nn.Linear(2, 2)
    with torch.inference_mode():
        tables = [torch.ones(2) for _ in range(4)]
    net.table, net.tables, net.box = tables[0], {"a": tables[1]}, SimpleNamespace()
    net.register_buffer("buffer", tables[2], persistent=False)
    net.ordinary = ordinary = torch.ones(2)
    with torch.enable_grad(), without_side_effects(Snapshot(net)):
        assert net.ordinary is ordinary
        x = net(torch.ones(1, 2)) * net.table * net.tables["a"] * net.buffer
        torch.autograd.backward(x.sum())
    assert net.table is tables[0]
    assert net.tables["a"] is tables[1]
    assert net.buffer is tables[2]


def test_hooks_and_parameters_that_were_replaced_come_back() -> None:
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    calls: list[int] = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    snapshot = Snapshot(net)
    own = net[0]._parameters["weight"]
    net[0]._parameters["weight"] = torch.zeros(2, 2)
    net[0]._forward_hooks.clear()
    net[1].register_forward_pre_hook(lambda *_: calls.append(2))
    snapshot.restore()
    net(torch.ones(1, 2))
    assert net[0].weight is own
    assert calls == [1]


# Undone however it ends


def test_what_interrupts_an_undoing_leaves_it_to_the_next() -> None:
    undo, done = Undo(), []

    def fails_once() -> None:
        done.append("second")
        if done.count("second") == 1:
            raise KeyboardInterrupt

    undo.add(lambda: done.append("first"))
    undo.add(fails_once)
    with pytest.raises(KeyboardInterrupt):
        undo.run()
    assert done == ["second"]
    with undo:  # the next start
        assert done == ["second", "second", "first"]
    undo.run()
    assert done == ["second", "second", "first"]


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="before torch 2.8 nothing tells which hooks there are",
)
def test_what_watches_passes_does_not_stay_and_that_of_others_does() -> None:
    def theirs(tensor: Tensor) -> Tensor:
        return tensor

    outer = torch.autograd.graph.saved_tensors_hooks(theirs, theirs)
    with outer, FlopCounterMode(display=False) as counted:
        torch.autograd.graph.saved_tensors_hooks(theirs, _never).__enter__()  # and interrupted
        _Drawn().__enter__()  # type: ignore[no-untyped-call]
        Snapshot(nn.Linear(1, 1)).restore()
        weight = torch.ones(2, 2, requires_grad=True)
        torch.autograd.backward((weight @ weight).sum())
        assert counted.get_total_flops() > 0
    assert saved_tensors_hooks() is None


def test_norm_statistics_are_registered_before_they_change() -> None:
    net, undo = nn.Sequential(nn.BatchNorm1d(2)).eval(), Undo()
    statistics = NormStatistics(net, "batch", undo)
    assert net[0].training
    assert not net[0].track_running_stats
    undo.run()
    statistics.restore()  # it can run twice
    assert not net[0].training
    assert net[0].track_running_stats


# Random numbers


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), float(np.random.rand())


def test_all_generators_of_the_process_are_put_back() -> None:
    draw()
    with undisturbed_rng():
        first = draw()
    assert draw() == first


def test_it_is_told_which_generators_a_pass_draws_from() -> None:
    assert generators_drawn_by(lambda: torch.ones(2) * 2) == frozenset()
    assert generators_drawn_by(lambda: torch.rand(1)) == {"torch", "cuda"}
    assert generators_drawn_by(random.random) == {"python"}
    assert generators_drawn_by(np.random.rand) == {"numpy"}


def test_a_pass_that_is_watched_computes_what_it_would() -> None:
    found: list[Tensor] = []
    generators_drawn_by(lambda: found.append(torch.full((2,), 3, dtype=torch.int16)))
    assert found[0].dtype == torch.int16
    assert found[0].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("begins", "ends"),
    [("before", "within"), ("before", "after"), ("within", "after")],  # others are of the pass
)
def test_numbers_of_a_thread_do_not_come_again_whenever_it_lives(begins: str, ends: str) -> None:
    net, done, go, drawn = nn.Linear(1, 1), threading.Event(), threading.Event(), list[float]()

    def other() -> None:
        go.wait()
        drawn.extend(torch.rand(100).tolist())
        done.set()
        if ends == "after":
            go.clear()
            go.wait()

    thread = threading.Thread(target=other)
    if begins == "before":
        thread.start()
    with without_side_effects(Snapshot(net), draws=lambda: frozenset()):
        if begins == "within":
            thread.start()
        go.set()
        done.wait()
        if ends == "within":
            thread.join()
    after = torch.rand(100).tolist()
    go.set()
    thread.join()
    assert not set(drawn) & set(after)


def test_numbers_that_other_threads_draw_meanwhile_do_not_come_again() -> None:
    net, go, drawn = nn.Linear(1, 1), threading.Barrier(2), list[float]()

    def other() -> None:
        go.wait()
        drawn.extend(torch.rand(100).tolist())
        go.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with without_side_effects(Snapshot(net), draws=lambda: frozenset()):
        go.wait()
        go.wait()
    thread.join()
    assert not set(drawn) & set(torch.rand(100).tolist())
