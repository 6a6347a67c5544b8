"""Activation cache: what is taken from the first pass is what would have been computed."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from helpers.cache import Deep, Log, adapter_of, assert_the_cache_changes_no_bit, run
from helpers.fast import needs_fast_paths
from helpers.modules import (
    drawn,
    images,
    stream,
)
from helpers.zoo import KINDS, Injected, noise
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from it3_lightning.conditioning import FeatureInjection, InputConcat
from it3_lightning.engine import Forward
from it3_lightning.methods import Entropy
from it3_lightning.priors import ClassPrior

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
    assert_the_cache_changes_no_bit(
        lambda: drawn(Deep(layer, where)),
        stream(3 if settings == "every second" else 2),
        {layer: where},
        **EVERY[settings],
        parameters=SELECTED[selected],
    )


@pytest.mark.parametrize("settings", EVERY)
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_cache_changes_no_bit(entry: str, settings: str) -> None:
    assert_deep_networks_change_no_bit(entry, settings, "later")


@pytest.mark.parametrize("selected", ["all", "head"])
@pytest.mark.parametrize("settings", ["steps", "ema", "gated"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_cache_changes_no_bit_of_other_weights(
    entry: str, settings: str, selected: str
) -> None:
    assert_deep_networks_change_no_bit(entry, settings, selected)


@needs_fast_paths
def test_the_cache_changes_no_bit_where_the_prior_enters_in_several_places() -> None:
    class Twice(Deep):
        def __init__(self) -> None:
            super().__init__("trunk.0")
            self.trunk[1].register_forward_hook(self._after)

    for enters in ({"trunk.0": "output", "trunk.1": "output"}, {"trunk.1": "output"}):
        (adaptation,) = assert_the_cache_changes_no_bit(
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


@needs_fast_paths
@pytest.mark.parametrize("selected", [["head.*"], "all"])
@pytest.mark.parametrize("kind", ["tuple", "nested", "object", "dataclass"])
def test_modules_may_put_out_anything(kind: str, selected: Any) -> None:
    (adaptation,) = assert_the_cache_changes_no_bit(
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


@needs_fast_paths
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("selected", [["head.*"], "all"])
def test_a_module_may_be_called_in_several_places(in_place: bool, selected: Any) -> None:
    (adaptation,) = assert_the_cache_changes_no_bit(
        lambda: drawn(Shared(in_place)),
        stream(1),
        {"head": "input"},
        steps=3,
        parameters=selected,
    )
    assert adaptation.cache_hits > 0


@needs_fast_paths
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

    (adaptation,) = assert_the_cache_changes_no_bit(
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
        assert_the_cache_changes_no_bit(
            lambda: drawn(InPlace()), stream(2), {entry: "output"}, steps=3, parameters=selected
        )


@needs_fast_paths
def test_a_conditioning_may_write_into_the_output_of_its_layer() -> None:
    class Writes(Deep):
        def _after(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            return None if self.prior is None else output.add_(self.embed(self.prior))

    (adaptation,) = assert_the_cache_changes_no_bit(
        lambda: drawn(Writes()), stream(1), {"trunk.0": "output"}, steps=3
    )
    assert adaptation.cache_hits > 0


FUSED = ("lstm", "transformer", "vit")  # torch rounds otherwise where no gradient is needed
# The bias of attention's keys has no influence: its gradient is rounding alone, which Adam makes
# steps of, 1e5 times as large, and plain descent does not.


@needs_fast_paths
@pytest.mark.parametrize("kind", ["lstm", "transformer", "vit", "batch norm", "graph"])
@pytest.mark.parametrize("parameters", ["all", ["*head*"], ["*out_proj*", "*head*"]])
def test_every_kind_of_network(kind: str, parameters: Any) -> None:
    network = KINDS[kind]
    if parameters != "all" and kind in ("batch norm", "lstm", "graph"):
        parameters = ["*head*"]
    (adaptation,) = assert_the_cache_changes_no_bit(
        lambda: network.build(),
        [network.batch(3)],
        network.enters,
        atol=1e-12 if kind in FUSED else 0.0,
        steps=2,
        parameters=parameters,
        **({"optimizer": "sgd", "lr": 0.1} if kind in FUSED else {"lr": 1e-3}),
    )
    assert adaptation.cache_hits > 0


def test_weights_used_by_another_module_than_their_owner_end_the_cache() -> None:
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

    assert_the_cache_changes_no_bit(
        lambda: drawn(Gated()), stream(2), {}, steps=6, lr=1.0, parameters=["gate.weight"]
    )


@needs_fast_paths
def test_a_module_may_run_once_more_where_a_prior_is_given() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix, self.middle = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            features = self.middle(self.mix(self.stem(x.flatten(1)).tanh()).tanh())
            if prior is not None:
                features = self.mix(features + self.embed(prior))
            logits: Tensor = self.head(features.tanh())
            return logits

    for selected in (["head.*"], "all"):
        (adaptation,) = assert_the_cache_changes_no_bit(
            lambda: drawn(Again()), stream(1), {"middle": "output"}, steps=2, parameters=selected
        )
        assert adaptation.cache_hits > 0


@needs_fast_paths
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

    (adaptation,) = assert_the_cache_changes_no_bit(
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


@needs_fast_paths
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
        (adaptation,) = assert_the_cache_changes_no_bit(
            make,
            stream(1),
            dict.fromkeys(conditioning.layers, where),
            of,
            steps=3,
            parameters=selected,
        )
        assert adaptation.cache_hits > 0


# What it saves


@needs_fast_paths
def test_no_activation_is_kept_after_a_batch() -> None:
    net = drawn(Deep())
    adapter = adapter_of(net, {"trunk.0": "output"}, steps=2)
    with adapter.adapted(images()):
        cache = vars(adapter.network.cache)
        assert cache["_outputs"] == cache["_left"] == {}
        assert cache["_inputs"] is None


@needs_fast_paths
@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        # what ran in: the first pass, the second, and both with the adapted weights
        ({}, {"stem": 2, "trunk.0.0": 2, "trunk.1.0": 4, "head": 4}),
        ({"measure": False}, {"stem": 1, "trunk.0.0": 1, "trunk.1.0": 2, "head": 2}),
        ({"steps": 3}, {"stem": 4, "trunk.0.0": 4, "trunk.1.0": 8, "head": 8}),
        ({"reset": "weights"}, {"stem": 2, "trunk.0.0": 2, "trunk.1.0": 4, "head": 4}),
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


@needs_fast_paths
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


@needs_fast_paths
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


@needs_fast_paths
def test_the_outermost_known_modules_are_answered() -> None:
    net: Any = drawn(Deep("trunk"))
    adapter = adapter_of(net, {"trunk": "output"})
    ((one, _),) = run(adapter, stream(1))
    assert (
        one.cache_hits == 2 * 2
    )  # stem and trunk, in the second pass of the step and of measuring
    assert list(vars(adapter.network.cache)["_plans"].values()) == [(net.stem, net.trunk)]
    ((one, _),) = run(adapter_of(drawn(Deep("trunk.1")), {"trunk.1": "output"}), stream(1))
    assert one.cache_hits == 2 * 3  # stem, trunk.0, trunk.1


def test_without_a_known_entry_the_anchor_runs_in_full() -> None:
    log: Log = []
    run(adapter_of(drawn(Deep("trunk.0", log=log)), {}), stream(1))
    assert {log.count(name) for name in ("stem", "trunk.0.0", "trunk.1.0", "head")} == {4}


@needs_fast_paths
def test_gated_samples_are_cached_apart() -> None:
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
