"""Activation cache: where another pass would not be the same, nothing is taken from the first."""

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cache import Deep, adapter_of, assert_the_cache_changes_no_bit, equal, run
from helpers.fast import needs_fast_paths
from helpers.modules import (
    Conditioned,
    LastOutput,
    Tied,
    drawn,
    images,
    stream,
)
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, Enters
from it3_lightning.engine.fast import NoCache


class Outer(nn.Module):
    """A layer of interest before a network whose prior enters late."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = Deep("trunk.1")
        self.layer = layer

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        logits: Tensor = self.net(self.layer(x), prior)
        return logits


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Draws(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class DrawsApart(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, generator=self.generator, dtype=x.dtype)


class DrawsInPython(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class CountsInBuffer(Base):
    def __init__(self, data: bool) -> None:
        super().__init__()
        self.data = data
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.calls, Tensor)
        (self.calls.data if self.data else self.calls).add_(1)  # one counts no version
        return x * self.calls


class CountsInAttribute(Base):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class CountsInObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.state = SimpleNamespace(calls=[1])

    def forward(self, x: Tensor) -> Tensor:
        self.state.calls.append(2)
        return x * len(self.state.calls)


class Replaces(Base):
    """Frees a tensor before it makes the next, which may take its address."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = torch.zeros(6, 1, 4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        assert self.last is not None
        mixed = x + self.last.mean()
        self.last = None
        self.last = mixed.detach() + 0
        return mixed


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "draws": Draws,
    "draws from a generator of its own": DrawsApart,
    "draws in Python": DrawsInPython,
    "counts in a buffer": lambda: CountsInBuffer(data=False),
    "counts in the data of a buffer": lambda: CountsInBuffer(data=True),
    "counts in an attribute": CountsInAttribute,
    "counts in an object": CountsInObject,
    "replaces an attribute": Replaces,
    "drops out": lambda: nn.Dropout(0.5),
    "random leaks": lambda: nn.RReLU(),
}


@pytest.fixture
def seeded_python() -> Iterator[None]:
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.mark.usefixtures("seeded_python")
@pytest.mark.parametrize("kind", STATEFUL)
def test_a_network_with_a_state_is_not_cached(kind: str) -> None:
    def run_with(exact: bool) -> list[Adaptation]:
        torch.manual_seed(0)
        random.seed(0)
        net = drawn(Outer(STATEFUL[kind]()))
        if kind in ("drops out", "random leaks"):
            net.get_submodule("layer").train()
        adapter = adapter_of(net, {"net.trunk.1": "output"}, steps=2)
        if not exact:
            adapter.network.cache = NoCache()
        return [adaptation for adaptation, _ in run(adapter, stream(2))]

    for found, expected in zip(run_with(True), run_with(False), strict=True):
        assert found.cache_hits == 0
        assert equal(found.outputs, expected.outputs)
        assert equal(found.distance_adapted, expected.distance_adapted)


class SkipsOnSelf(nn.Module):
    """An encoder that leaves its features on the network, for a decoder to take them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.kept: Any = {"list": [], "attribute": None, "dict": {}}.get(kind)
        self.encoder = Encoder(self)
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(16, 3)
        self.embed = nn.Linear(3, 8)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        features = self.middle(self.encoder(x.flatten(1)))
        features = features if prior is None else features + self.embed(prior)
        if self.kind == "list":
            skip = self.kept.pop()
        elif self.kind == "dict":
            skip = self.kept.pop("skip")
        else:
            skip, self.kept = self.kept, None
        logits: Tensor = self.head(torch.cat([features, skip], 1))
        return logits


class Encoder(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)
        self.net = [net]  # in a list, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        net: Any = self.net[0]
        if net.kind == "list":
            net.kept.append(out.sin())
        elif net.kind == "dict":
            net.kept["skip"] = out.sin()
        else:
            net.kept = out.sin()
        return out


@pytest.mark.parametrize("kind", ["list", "dict", "attribute"])
@pytest.mark.parametrize("selected", ["all", ["head.*"]])
def test_features_left_on_the_network_and_taken_away_again(kind: str, selected: Any) -> None:
    adaptations = assert_the_cache_changes_no_bit(
        lambda: drawn(SkipsOnSelf(kind)),
        stream(2),
        {"middle": "output"},
        steps=2,
        parameters=selected,
    )
    assert [adaptation.cache_hits for adaptation in adaptations] == [0, 0]


@needs_fast_paths
def test_features_taken_by_hooks_are_taken_in_every_pass() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            features: dict[str, Tensor] = {}  # in a closure, where no state is seen
            self.trunk = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))
            self.head, self.embed = nn.Linear(16, 3), nn.Linear(3, 8)

            def keep(_: nn.Module, __: Any, output: Tensor) -> None:
                features["inner"] = output

            self.trunk[0].register_forward_hook(keep)
            self.taken: Callable[[], Tensor] = lambda: features["inner"]

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            out = self.trunk(x.flatten(1))
            out = out if prior is None else out + self.embed(prior)
            logits: Tensor = self.head(torch.cat([out, self.taken()], 1))
            return logits

    (adaptation,) = assert_the_cache_changes_no_bit(
        lambda: drawn(Hooked()), stream(1), {"trunk": "output"}, steps=3
    )
    assert adaptation.cache_hits > 0  # the layers inside, each with its hook


def test_inputs_written_into_are_seen() -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(1.1).clone()

    class LaterScales(Outer):
        """Writes into its inputs in the second passes only."""

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            logits = super().forward(x.clone(), prior)
            if prior is not None:
                x.mul_(1.1)
            return logits

    makes: list[Callable[[], nn.Module]] = [
        lambda: Outer(Scales()),
        lambda: LaterScales(nn.Identity()),
    ]
    for make in makes:
        found = []
        for exact in (True, False):
            adapter = adapter_of(drawn(make()), {"net.trunk.1": "output"}, steps=3)
            if not exact:
                adapter.network.cache = NoCache()
            ((adaptation, _),) = run(adapter, [images()])
            found.append(adaptation)
        assert equal(found[0].outputs, found[1].outputs)
        assert equal(found[0].distance_adapted, found[1].distance_adapted)


def test_inputs_that_are_objects_are_watched() -> None:
    class Graphs:
        num_graphs = 6

        def __init__(self, nodes: Tensor) -> None:
            self.nodes = nodes

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Deep("trunk.1")

        def forward(self, graphs: Graphs, prior: Tensor | None = None) -> Tensor:
            graphs.nodes = graphs.nodes * 1.1
            logits: Tensor = self.net(graphs.nodes, prior)
            return logits

    found = []
    for exact in (True, False):
        adapter = adapter_of(drawn(Takes()), {"net.trunk.1": "output"}, steps=2)
        if not exact:
            adapter.network.cache = NoCache()
        ((adaptation, _),) = run(adapter, [Graphs(images())])
        found.append(adaptation)
    assert found[0].cache_hits == 0
    assert equal(found[0].outputs, found[1].outputs)


@needs_fast_paths
def test_a_mixture_of_experts_takes_other_ways_with_other_batches() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(16, 8)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
            self.embed = nn.Linear(3, 8)

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            features = self.stem(x.flatten(1))
            for _ in range(1 + int(x.sum() > 0)):
                features = self.experts[int(features.sum() > 0)](features).tanh()
            features = self.middle(features)
            features = features if prior is None else features + self.embed(prior)
            logits: Tensor = self.head(features)
            return logits

    batches = [images(seed=seed) for seed in range(5)]
    for selected in ("all", ["head.*"], ["experts.1.*", "head.*"]):
        adaptations = assert_the_cache_changes_no_bit(
            lambda: drawn(Experts()), batches, {"middle": "output"}, steps=2, parameters=selected
        )
        assert all(adaptation.cache_hits > 0 for adaptation in adaptations)


def test_a_layer_that_runs_only_with_a_prior_ends_the_cache_where_it_is_not_seen() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.embed = nn.Linear(8, 8), nn.Linear(3, 8)
            self.prior: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            return x if self.prior is None else self.mix(x) + self.embed(self.prior)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.some = nn.Linear(16, 8), Sometimes()
            self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            self.some.prior = prior
            try:
                logits: Tensor = self.head(self.middle(self.some(self.stem(x.flatten(1)))))
                return logits
            finally:
                self.some.prior = None

    assert_the_cache_changes_no_bit(
        lambda: drawn(Net()), stream(1), {"some.mix": "output", "head": "input"}, steps=2
    )


def test_a_layer_with_a_forward_of_its_own_is_no_known_entry() -> None:
    def make() -> nn.Module:
        net = drawn(Deep("trunk.0"))
        layer = net.get_submodule("trunk.0")
        own = layer.forward
        vars(layer)["forward"] = lambda *args: own(*args)
        net.get_submodule("trunk.1").register_forward_hook(net._after)  # type: ignore[arg-type]
        return net

    enters: Enters = {"trunk.0": "output", "trunk.1": "output"}
    assert_the_cache_changes_no_bit(make, stream(1), enters, steps=2)


@needs_fast_paths
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which dynamo asks for
@pytest.mark.parametrize("inside", [True, False])
def test_compiled_modules_are_run(inside: bool) -> None:
    def make() -> nn.Module:
        net: Any = Outer(nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh()))
        if inside:
            net.layer[1] = torch.compile(net.layer[1], backend="eager")
        else:
            net.layer[1].compile(backend="eager")
        return drawn(net)

    (adaptation,) = assert_the_cache_changes_no_bit(
        make, stream(1), {"net.trunk.1": "output"}, steps=2
    )
    assert adaptation.cache_hits > 0  # the modules around


def test_a_batch_in_inference_tensors_is_not_cached() -> None:
    net = drawn(Deep())
    with torch.inference_mode():
        inputs = images() * 1
        adapter = adapter_of(net, {"trunk.0": "output"}, steps=0)
        ((adaptation, _),) = run(adapter, [inputs])
    assert inputs.is_inference()
    assert adaptation.cache_hits == 0
    expected = run(adapter_of(net, {}, steps=0), [images()])[0][0]
    assert equal(adaptation.outputs, expected.outputs)


def as_without_a_cache(
    make: Callable[[], Any], enters: Enters, change: Callable[[Any], Any]
) -> int:
    """Adapt before and after a change, which returns the next batch; return the calls answered."""
    found = []
    for exact in (True, False):
        net = drawn(make())
        adapter = adapter_of(net, enters, steps=2)
        if not exact:
            adapter.network.cache = NoCache()
        pairs = run(adapter, [images()])
        found.append([*pairs, *run(adapter, [change(net)])])
    for (ours, _), (theirs, _) in zip(*found, strict=True):
        assert equal(ours.outputs, theirs.outputs)
        assert equal(ours.distance_adapted, theirs.distance_adapted)
    return found[0][0][0].cache_hits


@needs_fast_paths
def test_what_is_found_of_inputs_of_one_shape_does_not_hold_for_another() -> None:
    class Moves(nn.Module):
        """Mixes features of grey images before the prior, and of coloured ones after it."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix, self.head = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.embed, self.middle = nn.Linear(3, 8), nn.Identity()

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            features = self.stem(x.mean(1).flatten(1)).tanh()
            features = self.mix(features) if x.shape[1] == 1 else features
            features = self.middle(features)
            features = features if prior is None else features + self.embed(prior)
            features = features if x.shape[1] == 1 else self.mix(features)
            logits: Tensor = self.head(features.tanh())
            return logits

    hits = as_without_a_cache(Moves, {"middle": "output"}, lambda _: images().repeat(1, 3, 1, 1))
    assert hits > 0


@needs_fast_paths
@pytest.mark.parametrize("way", ["forward", "forward of the class", "hook", "hook before"])
def test_code_that_is_put_in_place_later_is_found_out_about_anew(way: str) -> None:
    def make() -> nn.Module:
        class Own(nn.Linear):
            pass

        return Outer(nn.Sequential(nn.Flatten(), Own(16, 16)))

    def change(net: Any) -> Tensor:
        """Let the inner layer scale by the number of its calls from now on, out of sight."""
        inner, calls = net.layer[1], list[int]()

        def scaled(values: Tensor) -> Tensor:
            calls.append(1)
            return values * len(calls)

        if way == "forward":
            own = inner.forward
            inner.forward = lambda x: scaled(own(x))
        elif way == "forward of the class":
            type(inner).forward = lambda self, x: scaled(nn.Linear.forward(self, x))
        elif way == "hook":
            inner.register_forward_hook(lambda _, __, output: scaled(output))
        else:
            inner.register_forward_pre_hook(lambda _, args: (scaled(args[0]),))
        inner.calls = calls  # where its state is noted
        return images()

    assert as_without_a_cache(make, {"net.trunk.1": "output"}, change) > 0


@needs_fast_paths
@pytest.mark.parametrize("library", ["lightning.pytorch.trainer", "pytorch_lightning.trainer"])
def test_what_runs_a_network_is_no_state_of_it(library: str) -> None:
    class Runs:
        calls = 0

    Runs.__module__ = library

    class Calls(Base):
        def __init__(self) -> None:
            super().__init__()
            self.trainer = Runs()

        def forward(self, x: Tensor) -> Tensor:
            self.trainer.calls += 1
            return x.sin()

    (adaptation,) = assert_the_cache_changes_no_bit(
        lambda: drawn(Outer(Calls())), stream(1), {"net.trunk.1": "output"}
    )
    assert adaptation.cache_hits > 0


@needs_fast_paths
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_are_run() -> None:
    def make() -> nn.Module:
        scripted: Any = torch.jit.script(drawn(nn.Sequential(nn.Flatten(), nn.Linear(16, 16))))
        return Outer(scripted).double().eval()

    (adaptation,) = assert_the_cache_changes_no_bit(
        make, stream(1), {"net.trunk.1": "output"}, parameters=["net.*"]
    )
    assert adaptation.cache_hits > 0  # the modules after it


class Scripted(nn.Module):
    """Scales by what it keeps, in a number or in a list."""

    seen: list[int]

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.counts = kind == "number"
        self.calls, self.seen = 0, [1]

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.calls += 1
        else:
            self.seen.append(2)
        return x * (self.calls + len(self.seen))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["number", "list"])
def test_scripted_parts_with_a_state_end_the_cache(kind: str) -> None:
    def run_with(exact: bool) -> list[Adaptation]:
        scripted: Any = torch.jit.script(Scripted(kind))
        net = Outer(scripted).double().eval()
        drawn(net.net)
        adapter = adapter_of(net, {"net.trunk.1": "output"}, steps=2, parameters=["net.*"])
        if not exact:
            adapter.network.cache = NoCache()
        return [adaptation for adaptation, _ in run(adapter, stream(2))]

    for found, expected in zip(run_with(True), run_with(False), strict=True):
        assert found.cache_hits == 0
        assert equal(found.outputs, expected.outputs)


@needs_fast_paths
def test_tied_weights_and_nested_networks() -> None:
    for body in (Tied(), LastOutput(nn.GRU(4, 8, batch_first=True))):
        (adaptation,) = assert_the_cache_changes_no_bit(
            lambda body=body: drawn(Conditioned(body)),  # type: ignore[misc]
            stream(1),
            {"body": "output"},
            atol=1e-15,  # recurrent layers compute otherwise without a graph
            steps=3,
        )
        assert adaptation.cache_hits > 0
