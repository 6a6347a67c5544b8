"""What is answered from a record is what would have been computed, to the bit; or it is off."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from helpers.modules import (
    Conditioned,
    LastOutput,
    Tied,
    bits,
    changed,
    drawn,
    images,
    stream,
    takes_prior,
)
from helpers.reference import softmax_label
from helpers.zoo import KINDS, Injected, noise
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from it3_lightning.conditioning import FeatureInjection, InputConcat
from it3_lightning.engine import Adaptation, BatchAdapter, Enters, Forward, Settings
from it3_lightning.engine.fast import NoCache
from it3_lightning.methods import Entropy, Idempotence
from it3_lightning.priors import ClassPrior

PUBLISHED = Idempotence("l2", None)
Log = list[str]


def adapter_of(
    net: nn.Module, enters: Enters, forward: Forward | None = None, **given: Any
) -> BatchAdapter:
    made = Settings(**{"objective": PUBLISHED, "lr": 0.01, **given})
    return BatchAdapter(net, forward or takes_prior(net), softmax_label, made, enters=enters)


def run(adapter: BatchAdapter, batches: list[Any]) -> list[tuple[Adaptation, dict[str, Tensor]]]:
    kept = []
    for inputs in batches:
        with adapter.adapted(inputs) as adaptation:
            weights = {name: value.clone() for name, value in adaptation.weights.items()}
        kept.append((adaptation, weights))
    return kept


def assert_the_record_changes_no_bit(
    make: Callable[[], nn.Module],
    batches: list[Any],
    enters: Enters,
    of: Callable[[nn.Module], Forward] = takes_prior,
    atol: float = 0.0,
    **given: Any,
) -> list[Adaptation]:
    """Compare with no record at all, and with one that does not know where the prior enters."""
    found = []
    for known, exact in ((enters, True), ({}, True), (enters, False)):
        torch.manual_seed(0)
        net = make()
        before = bits(net)
        adapter = adapter_of(net, known, of(net), **given)
        if not exact:
            adapter.network.cache = NoCache()
        found.append(run(adapter, batches))
        assert changed(before, net) == []
    for first, second, third in zip(*found, strict=True):
        for other in (second, third):
            for name in ("outputs", "source_outputs", "distance_source", "distance_adapted"):
                assert equal(getattr(first[0], name), getattr(other[0], name), atol), name
            assert first[1].keys() == other[1].keys()
            assert all(equal(value, other[1][name], atol) for name, value in first[1].items())
        assert third[0].cache_hits == 0
        assert first[0].reason is None
    return [adaptation for adaptation, _ in found[0]]


def equal(a: Tensor | None, b: Tensor | None, atol: float = 0.0) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) or bool((a - b).abs().max() <= atol)


def told(layer: nn.Module, name: str, log: Log) -> nn.Module:
    """Let a layer write its name into a log, out of the sight of the record, when it runs."""
    kind: Any = type(layer)

    class Told(kind):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            log.append(name)
            return super().forward(*args)

    layer.__class__ = Told
    return layer


class Deep(nn.Module):
    """`stem`, `trunk` of two blocks of two layers, `head`; the prior enters where it is told."""

    def __init__(self, entry: str = "trunk.0", where: str = "output", log: Log | None = None):
        super().__init__()
        log = [] if log is None else log
        self.stem = told(nn.Linear(16, 8), "stem", log)

        def block(name: str) -> nn.Module:
            first = told(nn.Linear(8, 8), f"{name}.0", log)
            return nn.Sequential(first, told(nn.Tanh(), f"{name}.1", log))

        self.trunk = nn.Sequential(block("trunk.0"), block("trunk.1"))
        self.head = told(nn.Linear(8, 3), "head", log)
        self.embed = nn.Linear(3, 3 if entry == "head" and where == "output" else 8)
        self.prior: Tensor | None = None
        layer = self.get_submodule(entry)
        if where == "output":
            layer.register_forward_hook(self._after)
        else:
            layer.register_forward_pre_hook(self._before)

    def _after(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        return None if self.prior is None else output + self.embed(self.prior)

    def _before(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self.prior is None else (args[0] + self.embed(self.prior),)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        self.prior = prior
        try:
            logits: Tensor = self.head(self.trunk(self.stem(x.flatten(1)).tanh()))
            return logits
        finally:
            self.prior = None


ENTRIES: dict[str, tuple[str, Literal["input", "output"]]] = {
    "first": ("stem", "output"),
    "outer": ("trunk", "output"),
    "block": ("trunk.0", "output"),
    "inner": ("trunk.1.0", "output"),
    "last": ("head", "output"),
    "input of a block": ("trunk.1", "input"),
    "input of the last": ("head", "input"),
}
EVERY: dict[str, dict[str, Any]] = {
    "one step": {},
    "steps": {"steps": 3},
    "live": {"steps": 3, "anchor": "live"},
    "ema": {"steps": 3, "anchor": "ema", "ema_decay": 0.5},
    "online": {"steps": 2, "reset": "never"},
    "every second": {"reset": 2, "anchor": "ema"},
    "unmeasured": {"steps": 2, "measure": False},
    "no step": {"steps": 0},
    "gated": {"steps": 2, "gate": 0.02},
    "entropy": {"steps": 2, "objective": Entropy()},
}
SELECTED: dict[str, Any] = {"all": "all", "later": ["trunk.1.*", "head.*"], "head": ["head.*"]}


def assert_deep_networks_change_no_bit(entry: str, settings: str, selected: str) -> None:
    layer, where = ENTRIES[entry]
    assert_the_record_changes_no_bit(
        lambda: drawn(Deep(layer, where)),
        stream(3 if settings == "every second" else 2),
        {layer: where},
        **EVERY[settings],
        parameters=SELECTED[selected],
    )


@pytest.mark.parametrize("settings", EVERY)
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_record_changes_no_bit(entry: str, settings: str) -> None:
    assert_deep_networks_change_no_bit(entry, settings, "later")


@pytest.mark.parametrize("selected", ["all", "head"])
@pytest.mark.parametrize("settings", ["steps", "ema", "gated"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_record_changes_no_bit_of_other_weights(
    entry: str, settings: str, selected: str
) -> None:
    assert_deep_networks_change_no_bit(entry, settings, selected)


def test_the_record_changes_no_bit_where_the_prior_enters_in_several_places() -> None:
    class Twice(Deep):
        def __init__(self) -> None:
            super().__init__("trunk.0")
            self.trunk[1].register_forward_hook(self._after)

    for enters in ({"trunk.0": "output", "trunk.1": "output"}, {"trunk.1": "output"}):
        (adaptation,) = assert_the_record_changes_no_bit(
            lambda: drawn(Twice()),
            stream(1),
            {"trunk.0": "output", **enters},  # type: ignore[dict-item]
            steps=2,
        )
        assert adaptation.cache_hits > 0


class Custom:
    def __init__(self, values: Tensor) -> None:
        self.values = values


@dataclass
class Data:
    values: Tensor


class Wrapping(nn.Module):
    """A layer that puts its output out in a container of some kind."""

    def __init__(self, kind: str, width: int = 8) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Any:
        out = self.layer(x)
        if self.kind == "tuple":
            return out, None, 3
        if self.kind == "nested":
            return {"a": [out, 2 * out], "b": (out.sin(),)}
        return Custom(out) if self.kind == "object" else Data(out)


def unwrapped(kind: str, value: Any) -> Tensor:
    if kind == "tuple":
        out: Tensor = value[0] * value[2]
        return out
    if kind == "nested":
        value["a"].reverse()  # changes what it was given
        return unwrapped("tuple", (value["a"][0] - value["b"][0], None, 1))
    inner: Tensor = value.values
    return inner


class Containers(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = Wrapping(kind, 16), Wrapping(kind)
        self.third, self.head, self.embed = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, 8)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        first = unwrapped(self.kind, self.first(x.flatten(1)))
        features = self.third(unwrapped(self.kind, self.second(first)).tanh())
        features = features if prior is None else features + self.embed(prior)
        logits: Tensor = self.head(features.tanh())
        return logits


@pytest.mark.parametrize("selected", [["head.*"], "all"])
@pytest.mark.parametrize("kind", ["tuple", "nested", "object", "dataclass"])
def test_modules_may_put_out_anything(kind: str, selected: Any) -> None:
    (adaptation,) = assert_the_record_changes_no_bit(
        lambda: drawn(Containers(kind)),
        stream(1),
        {"third": "output"},
        steps=2,
        parameters=selected,
    )
    assert adaptation.cache_hits > 0


class Shared(nn.Module):
    """One layer called by itself and inside others, some of whose outputs are written into."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.layer = nn.Linear(8, 8)
        self.stem, self.head, self.embed = nn.Linear(16, 8), nn.Linear(8, 3), nn.Linear(3, 8)
        self.block = nn.Sequential(nn.Tanh(), self.layer)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        features = self.block(self.stem(x.flatten(1)))
        if self.in_place:
            features += 1  # so that the block runs again, and inside of it the layer
        features = self.layer(features) + self.layer(2 * features)
        features = self.block(features).sin()
        features = features if prior is None else features + self.embed(prior)
        logits: Tensor = self.head(features)
        return logits


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("selected", [["head.*"], "all"])
def test_a_module_may_be_called_in_several_places(in_place: bool, selected: Any) -> None:
    (adaptation,) = assert_the_record_changes_no_bit(
        lambda: drawn(Shared(in_place)),
        stream(1),
        {"head": "input"},
        steps=3,
        parameters=selected,
    )
    assert adaptation.cache_hits > 0


@pytest.mark.parametrize(
    ("layer", "width", "norm_stats", "selected"),
    [
        ("layer2", 128, "source", ["net.layer4.*", "net.fc.*"]),
        ("layer3.0.conv2", 256, "batch", "norm"),
        ("maxpool", 64, "source", "norm"),
        ("fc", 3, "batch", ["net.layer4.*", "net.fc.*"]),
    ],
)
def test_residual_networks_with_operations_in_place(
    layer: str, width: int, norm_stats: str, selected: Any
) -> None:
    def make() -> nn.Module:
        net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
        return Injected(net, layer, width).eval()

    (adaptation,) = assert_the_record_changes_no_bit(
        make,
        [noise(3, 16, 16, count=3).float()],
        {f"net.{layer}": "output"},
        lr=1e-3,
        steps=2,
        norm_stats=norm_stats,
        parameters=selected,
    )
    assert adaptation.cache_hits > 0


class InPlace(nn.Module):
    """Writes between modules into what they put out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.same = nn.Identity()
        self.head, self.embed = nn.Linear(8, 3), nn.Linear(3, 8)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        a = self.a(x.flatten(1))
        b = self.b(F.relu_(self.same(a)))
        b += 1
        c = self.c(b.sin()).add_(b)
        c[:, 0] = 0
        c = c if prior is None else c + self.embed(prior)
        logits: Tensor = self.head(c.mul(2).add_(a))
        return logits


@pytest.mark.parametrize("selected", [["head.*"], ["c.*"], "all"])
def test_what_is_written_into_is_computed_anew(selected: Any) -> None:
    for entry in ("a", "b", "c"):
        assert_the_record_changes_no_bit(
            lambda: drawn(InPlace()), stream(2), {entry: "output"}, steps=3, parameters=selected
        )


def test_a_conditioning_may_write_into_the_output_of_its_layer() -> None:
    class Writes(Deep):
        def _after(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            return None if self.prior is None else output.add_(self.embed(self.prior))

    (adaptation,) = assert_the_record_changes_no_bit(
        lambda: drawn(Writes()), stream(1), {"trunk.0": "output"}, steps=3
    )
    assert adaptation.cache_hits > 0


FUSED = ("lstm", "transformer", "vit")  # torch rounds otherwise where no gradient is needed


@pytest.mark.parametrize("kind", ["lstm", "transformer", "vit", "batch norm", "graph"])
@pytest.mark.parametrize("parameters", ["all", ["*head*"], ["*out_proj*", "*head*"]])
def test_every_kind_of_network(kind: str, parameters: Any) -> None:
    network = KINDS[kind]
    if parameters != "all" and kind in ("batch norm", "lstm", "graph"):
        parameters = ["*head*"]
    (adaptation,) = assert_the_record_changes_no_bit(
        lambda: network.build(),
        [network.batch(3)],
        network.enters,
        atol=1e-12 if kind in FUSED else 0.0,
        steps=2,
        lr=1e-3,
        parameters=parameters,
    )
    assert adaptation.cache_hits > 0


def test_weights_used_by_another_module_than_their_owner_end_the_record() -> None:
    class Gated(nn.Module):
        """Chooses by weights of a layer that never runs: no gradient tells of that."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.stem = nn.Linear(16, 4), nn.Linear(16, 8)
            self.table, self.head = nn.Embedding(4, 8), nn.Linear(8, 3)
            self.embed = nn.Linear(3, 8)

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            choice = F.linear(x.flatten(1), self.gate.weight).argmax(1)
            features = self.table(choice) + self.stem(x.flatten(1))
            soft = F.linear(x.flatten(1), self.gate.weight).softmax(1)
            logits: Tensor = self.head(features) * soft[:, :3]
            return logits if prior is None else logits + prior

    assert_the_record_changes_no_bit(
        lambda: drawn(Gated()), stream(2), {}, steps=6, lr=1.0, parameters=["gate.weight"]
    )


def test_anchors_with_other_weights_know_only_what_came_before_these() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.more, self.moves = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.moves(self.more(self.frozen(x).tanh()).tanh())
            return out

    class Net(Deep):
        def __init__(self) -> None:
            super().__init__("trunk")
            self.trunk: Any = (
                Stem()
            )  # one call, in which weights adapt, instead of two that know none
            self.trunk.register_forward_hook(self._after)

    (adaptation,) = assert_the_record_changes_no_bit(
        lambda: drawn(Net()),
        stream(1),
        {"trunk": "output"},
        parameters=["trunk.moves.*"],
        steps=3,
        anchor="ema",
        ema_decay=0.5,
    )
    assert adaptation.cache_hits > 0


# Conditionings of the library


@pytest.mark.parametrize("selected", [["head.*"], "all"])
def test_a_conditioning_notices_that_its_layer_was_passed(selected: Any) -> None:
    conditionings: list[Any] = [
        FeatureInjection("trunk.0.0"),
        FeatureInjection(["trunk.0.0", "trunk.1"], mode="film"),
        InputConcat("trunk.1.0"),
    ]
    for conditioning in conditionings:

        def make(conditioning: Any = conditioning) -> nn.Module:
            net = Deep()
            own = type(conditioning)(**conditioning.init_args())
            own.attach(net, ClassPrior(3))
            net.it3_conditioning = own
            return drawn(net)

        def of(net: Any) -> Forward:
            def forward(x: Tensor, prior: Tensor | None) -> Tensor:
                with net.it3_conditioning.given(prior):
                    outputs: Tensor = net(x)
                    return outputs

            return forward

        where: Any = "input" if isinstance(conditioning, InputConcat) else "output"
        (adaptation,) = assert_the_record_changes_no_bit(
            make,
            stream(1),
            dict.fromkeys(conditioning.layers, where),
            of,
            steps=3,
            parameters=selected,
        )
        assert adaptation.cache_hits > 0


# Where another pass would not be the same, the record is off


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
def test_a_network_with_a_state_is_not_recorded(kind: str) -> None:
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
    adaptations = assert_the_record_changes_no_bit(
        lambda: drawn(SkipsOnSelf(kind)),
        stream(2),
        {"middle": "output"},
        steps=2,
        parameters=selected,
    )
    assert [adaptation.cache_hits for adaptation in adaptations] == [0, 0]


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

    (adaptation,) = assert_the_record_changes_no_bit(
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
        adaptations = assert_the_record_changes_no_bit(
            lambda: drawn(Experts()), batches, {"middle": "output"}, steps=2, parameters=selected
        )
        assert all(adaptation.cache_hits > 0 for adaptation in adaptations)


def test_a_layer_that_runs_only_with_a_prior_ends_the_record_where_it_is_not_seen() -> None:
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

    assert_the_record_changes_no_bit(
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
    assert_the_record_changes_no_bit(make, stream(1), enters, steps=2)


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

    (adaptation,) = assert_the_record_changes_no_bit(
        make, stream(1), {"net.trunk.1": "output"}, steps=2
    )
    assert adaptation.cache_hits > 0  # the modules around


def test_a_batch_in_inference_tensors_is_not_recorded() -> None:
    net = drawn(Deep())
    with torch.inference_mode():
        inputs = images() * 1
        adapter = adapter_of(net, {"trunk.0": "output"}, steps=0)
        ((adaptation, _),) = run(adapter, [inputs])
    assert inputs.is_inference()
    assert adaptation.cache_hits == 0
    expected = run(adapter_of(net, {}, steps=0), [images()])[0][0]
    assert equal(adaptation.outputs, expected.outputs)


def test_tied_weights_and_nested_networks() -> None:
    for body in (Tied(), LastOutput(nn.GRU(4, 8, batch_first=True))):
        (adaptation,) = assert_the_record_changes_no_bit(
            lambda body=body: drawn(Conditioned(body)),  # type: ignore[misc]
            stream(1),
            {"body": "output"},
            atol=1e-15,  # recurrent layers compute otherwise without a graph
            steps=3,
        )
        assert adaptation.cache_hits > 0


# What it saves


def test_no_activation_is_kept_after_a_batch() -> None:
    net = drawn(Deep())
    adapter = adapter_of(net, {"trunk.0": "output"}, steps=2)
    with adapter.adapted(images()):
        cache = vars(adapter.network.cache)
        assert cache["_outputs"] == cache["_left"] == {}
        assert cache["_inputs"] is None


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        # what ran in: the first pass, the second, and both with the adapted weights
        ({}, {"stem": 2, "trunk.0.0": 2, "trunk.1.0": 4, "head": 4}),
        ({"measure": False}, {"stem": 1, "trunk.0.0": 1, "trunk.1.0": 2, "head": 2}),
        ({"steps": 3}, {"stem": 4, "trunk.0.0": 4, "trunk.1.0": 8, "head": 8}),
        ({"anchor": "live"}, {"stem": 4, "trunk.0.0": 4, "trunk.1.0": 4, "head": 4}),
        ({"parameters": ["head.*"]}, {"stem": 2, "trunk.0.0": 2, "trunk.1.0": 4, "head": 4}),
        (
            {"parameters": ["head.*"], "anchor": "ema"},
            {"stem": 3, "trunk.0.0": 3, "trunk.1.0": 4, "head": 4},
        ),
        (
            {"parameters": ["trunk.1.*"], "anchor": "live"},
            {"stem": 4, "trunk.0.0": 4, "trunk.1.0": 4, "head": 4},
        ),
        (
            {"parameters": ["trunk.1.*"], "steps": 3},
            {"stem": 4, "trunk.0.0": 4, "trunk.1.0": 8, "head": 8},
        ),
    ],
)
def test_what_is_known_is_not_run(settings: dict[str, Any], runs: dict[str, int]) -> None:
    log: Log = []
    adapter = adapter_of(drawn(Deep("trunk.0", log=log)), {"trunk.0": "output"}, **settings)
    for batch in stream(3):
        log.clear()
        ((adaptation, _),) = run(adapter, [batch])
        assert {name: log.count(name) for name in runs} == runs
        steps, measure = settings.get("steps", 1), settings.get("measure", True)
        assert adaptation.forwards == 2 * steps + 2 * measure
        assert adaptation.backwards == steps
        assert (adaptation.cache_hits > 0) == (runs["stem"] < adaptation.forwards)


def test_carried_weights_are_measured_against_a_source_that_is_run_once() -> None:
    log: Log = []
    adapter = adapter_of(drawn(Deep(log=log)), {"trunk.0": "output"}, reset="never")
    counts = []
    for batch in stream(3):
        log.clear()
        run(adapter, [batch])
        counts.append({name: log.count(name) for name in ("stem", "trunk.0.0", "head")})
    assert counts[0] == {"stem": 2, "trunk.0.0": 2, "head": 4}
    # of the source, of the carried weights before and after the step; and an anchor of each
    assert counts[1:] == [{"stem": 3, "trunk.0.0": 3, "head": 6}] * 2


def test_entries_at_an_input_are_known_in_every_batch() -> None:
    log: Log = []
    adapter = adapter_of(drawn(Deep("head", "input", log)), {"head": "input"})
    for batch in stream(3):
        log.clear()
        run(adapter, [batch])
        assert {name: log.count(name) for name in ("trunk.1.0", "head")} == {
            "trunk.1.0": 2,
            "head": 4,
        }


def test_the_outermost_known_modules_are_answered() -> None:
    ((one, _),) = run(adapter_of(drawn(Deep("trunk")), {"trunk": "output"}), stream(1))
    assert (
        one.cache_hits == 2 * 2
    )  # stem and trunk, in the second pass of the step and of measuring
    ((one, _),) = run(adapter_of(drawn(Deep("trunk.1")), {"trunk.1": "output"}), stream(1))
    assert one.cache_hits == 2 * 3  # stem, trunk.0, trunk.1


def test_without_a_known_entry_the_anchor_runs_in_full() -> None:
    log: Log = []
    run(adapter_of(drawn(Deep("trunk.0", log=log)), {}), stream(1))
    assert {log.count(name) for name in ("stem", "trunk.0.0", "trunk.1.0", "head")} == {4}


def test_gated_samples_are_recorded_apart() -> None:
    log: Log = []
    ((ungated, _),) = run(adapter_of(drawn(Deep("trunk.0")), {}), [images()])
    assert ungated.distance_source is not None
    median = float(ungated.distance_source.median())
    net = drawn(Deep("trunk.0", log=log))
    adapter = adapter_of(net, {"trunk.0": "output"}, gate=median)
    for batch in [images()] * 2:
        log.clear()
        ((adaptation, _),) = run(adapter, [batch])
        assert adaptation.gated is not None
        assert int(adaptation.gated.sum()) == 3
        assert log.count("stem") == 1 + 1 + 2  # the whole, what moves, the whole with other weights
        assert log.count("head") == 6
