"""Statistics by evidence against the formulas of `it3_lightning.engine.evidence` in plain torch."""

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.adapters import WAYS, any_adapter, batch_adapter, sample_adapter
from helpers.modules import bits, changed, drawn
from torch import Tensor, nn

from it3_lightning.engine import BatchAdapter, Settings, SourceMoments, adapt, adapter
from it3_lightning.methods import Idempotence

MOVES = Idempotence("l2", reliability=None)


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 2),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 4, 2),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(16, 3),
        )


class Dense(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
        )


class Steps(nn.Module):
    """Normalises the rows of an image as samples of their own, as sequence models do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x.reshape(-1, 4))
        logits: Tensor = self.head(rows.relu().reshape(len(x), -1))
        return logits


NETS: dict[str, Callable[[], nn.Module]] = {"conv": Conv, "dense": Dense, "rows": Steps}


def images(count: int, seed: int = 0, *, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Draw images of three kinds: the sample's number tells which."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    bright = torch.arange(4) == torch.arange(count).remainder(3)[:, None]
    rows = 4 * bright.double() - 1  # of a kind: where it is bright, not how bright it is
    return scale * (noise + rows[:, None, :, None]) + shift


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return trained(request.param)


def trained(name: str = "conv") -> nn.Module:
    """Return a network whose statistics are those of the images, and that tells their kinds."""
    network = drawn(NETS[name]())
    x = images(300, 9)
    network.train()
    for layer in norms(network).values():
        layer.momentum = None  # a plain mean
        layer.reset_running_stats()
    with torch.no_grad():
        for _ in range(2):
            network(x)
        head: Any = list(network.modules())[-1]
        features: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        network.eval()(x)
        handle.remove()
        kinds = nn.functional.one_hot(torch.arange(300) % 3, 3).double()
        given = torch.cat([features[0], torch.ones(300, 1, dtype=torch.float64)], 1)
        solved = 10 * torch.linalg.lstsq(given, kinds, driver="gelsd").solution
        head.weight.copy_(solved[:-1].T)
        head.bias.copy_(solved[-1])
    return network


def norms(network: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in network.named_modules() if hasattr(m, "running_mean")}


def blind(network: nn.Module) -> Any:
    """Return a forward pass whose second prediction differs from the first."""
    return lambda x, prior: network(x) if prior is None else network(x) + prior


def moments_of(network: nn.Module, *batches: Any, **given: Any) -> SourceMoments:
    measuring = batch_adapter(network, blind(network), **given)
    for x in batches or (images(150, 1), images(150, 2)):
        measuring.fit_moments(x)
    assert measuring.moments is not None
    return measuring.moments


def by_evidence(
    network: nn.Module, moments: SourceMoments, way: str = "batch", **given: Any
) -> Any:
    settings = {"objective": MOVES, "norm_stats": "evidence", "steps": 0, **given}
    return any_adapter(network, way, blind(network), moments=moments, **settings)


def statistics(network: nn.Module, moments: SourceMoments, x: Tensor, **given: Any) -> list[Tensor]:
    with by_evidence(network, moments, **given).adapted(x):
        return [t.clone() for n in norms(network).values() for t in (n.running_mean, n.running_var)]


# The reference


def entering(network: nn.Module, x: Tensor) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Return what enters each norm layer, for each sample ``(C, L)``, and the probabilities."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(name, split(args[0], len(x)))
        )
        for name, layer in norms(network).items()
    ]
    probabilities = network(x).softmax(1)
    for handle in handles:
        handle.remove()
    return found, probabilities


def split(values: Tensor, count: int) -> list[Tensor]:
    parts = values.detach().reshape(count, -1, *values.shape[1:])
    return [part.transpose(0, 1).flatten(1) for part in parts]


@torch.no_grad()
def source_of(network: nn.Module, x: Tensor, *, classes: bool = True) -> dict[str, Any]:
    """Return, of each layer, class means, spread within classes, and counts."""
    found, weights = entering(network, x)
    weights = weights if classes else torch.ones(len(x), 1, dtype=torch.float64)
    tables = {}
    for name, samples in found.items():
        own = norms(network)[name].running_mean[:, None]
        pairs = torch.stack(
            [torch.stack([(s - own).mean(1), (s - own).square().mean(1)]) for s in samples]
        )
        every = pairs.mean(0)
        means, spread = [], torch.zeros_like(every)
        for k in range(weights.shape[1]):
            w = weights[:, k]
            mean = ((w[:, None, None] * pairs).sum(0) + every) / (w.sum() + 1)
            spread += (w[:, None, None] * (pairs - mean).square()).sum(0) / len(x)
            means.append(mean)
        tables[name] = {"means": means, "spread": spread, "count": weights.sum(0)}
    return tables


def chi_square(relative: float) -> tuple[float, float]:
    """Return mean and variance of ``log(X / E X)`` of a chi-square with this relative variance."""
    half = torch.tensor(min(max(1 / relative, 0.02), 1e6), dtype=torch.float64)
    mean = torch.special.digamma(half) - half.log()
    return float(mean), float(torch.special.polygamma(1, half))


def shrunk(value: float, error: float) -> float:
    return 0.0 if value * value <= error else value * (1 - error / value**2)


def channel_by_hand(
    mean: float, var: float, samples: list[Tensor], table: dict[str, Any], p: Tensor, c: int
) -> tuple[float, float]:
    n = len(samples)
    a = sum(float((s[c] - mean).mean()) for s in samples) / n
    q = sum(float((s[c] - mean).square().mean()) for s in samples) / n
    place = sum(float(p[k] * m[0, c]) for k, m in enumerate(table["means"]))
    square = sum(float(p[k] * m[1, c]) for k, m in enumerate(table["means"]))
    unit = 1 / n + sum(float(p[k] ** 2 / (table["count"][k] + 1)) for k in range(len(p)))
    s_a, s_q = (float(table["spread"][i, c]) for i in range(2))
    total = square - place**2
    expected = max(total - s_a / n, 0.01 * total)
    bias, error = chi_square((s_q + 4 * place**2 * s_a) * unit / expected**2)
    scale = 0.0
    if n * samples[0].shape[1] > 1:
        scale = shrunk(math.log(max((q - a * a) / expected, 1e-6)) - bias, error)
    moved = shrunk(a - place, s_a * unit)
    return mean + place + moved - math.exp(scale / 2) * place, var * math.exp(scale)


@torch.no_grad()
def by_hand(network: nn.Module, x: Tensor, *, classes: bool = True) -> list[Tensor]:
    """Return mean and variance of each layer for a batch, one channel after the other."""
    tables = source_of(network, torch.cat([images(150, 1), images(150, 2)]), classes=classes)
    layers = norms(network)
    own = {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in layers.items()}
    p = network(x).softmax(1).mean(0) if classes else torch.ones(1)
    for _ in range(2 if classes else 1):
        for name, layer in layers.items():
            layer.running_mean, layer.running_var = (t.clone() for t in own[name])
        for name, layer in layers.items():  # one after the other: each sees those before it
            samples, _ = entering(network, x)
            mean, var = own[name]
            for c in range(len(mean)):
                layer.running_mean[c], layer.running_var[c] = channel_by_hand(
                    float(mean[c]), float(var[c]), samples[name], tables[name], p, c
                )
        p = network(x).softmax(1).mean(0)
    found = [t for m in layers.values() for t in (m.running_mean, m.running_var)]
    for name, layer in layers.items():
        layer.running_mean, layer.running_var = own[name]
    return found


def close(found: list[Tensor], expected: list[Tensor], atol: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize(
    "shift", [{}, {"scale": 2.0, "shift": 1.0}, {"scale": 0.2}, {"scale": 0.0, "shift": 1.0}]
)
def test_statistics_are_those_of_the_formulas(
    net: nn.Module, count: int, shift: dict[str, float]
) -> None:
    x = images(count, 5, **shift)
    moments = doubled(moments_of(net))
    close(statistics(net, moments, x), by_hand(net, x), 1e-9)


def doubled(moments: SourceMoments) -> SourceMoments:
    """Return moments as they were before they became float32."""
    tables = {
        name: moments._table({k: v.double() for k, v in sums.items()}, torch.float64)
        for name, sums in moments._sums.items()
    }
    exact = SourceMoments()
    exact.load_source_dict({"layers": tables})
    return exact


def test_models_that_predict_no_classes_have_one(net: nn.Module) -> None:
    x = images(6, 5, scale=2.0)
    values: Any = {"to_label": lambda outputs: outputs}
    moments = doubled(moments_of(net, **values))
    assert moments.classes == 1
    found = statistics(net, moments, x, **values)
    close(found, by_hand(net, x, classes=False), 1e-9)


# What follows from the rule


def far(found: list[Tensor], network: nn.Module) -> float:
    """Return how far means have moved, in deviations of the source, at most."""
    pairs = zip(found[::2], norms(network).values(), strict=True)
    return max(float(((m - n.running_mean) / n.running_var.sqrt()).abs().max()) for m, n in pairs)


def test_clean_batches_keep_the_source_whatever_their_classes() -> None:
    net = trained()
    moments, mixed, alike = moments_of(net), images(300, 5), images(300, 5)[::3]
    assert far(statistics(net, moments, mixed), net) < 0.1
    assert far(statistics(net, moments, alike), net) < 0.1
    with batch_statistics(net, alike) as of_batch:
        assert far(of_batch, net) > 0.5  # which take the one class for a shift


class batch_statistics:  # noqa: N801  # read as a context
    def __init__(self, network: nn.Module, x: Tensor) -> None:
        self._given = network, x

    @torch.no_grad()
    def __enter__(self) -> list[Tensor]:
        network, x = self._given
        found: list[Tensor] = []
        values, _ = entering(network, x)
        for samples in values.values():
            every = torch.cat(samples, 1)
            found += [every.mean(1), every.var(1, correction=0)]
        return found

    def __exit__(self, *_: object) -> None:
        pass


def test_a_shift_is_believed_the_more_the_more_samples_show_it() -> None:
    net, shift = trained(), {"scale": 1.5, "shift": 2.0}
    first = norms(net)["1"]
    moments = moments_of(net)
    apart = []
    for count in (1, 3, 30, 300):
        x = images(count, 5, **shift)
        with batch_statistics(net, x) as of_batch:
            found = statistics(net, moments, x)
            apart.append(float((found[0] - of_batch[0]).abs().max()))
    whole = float((of_batch[0] - first.running_mean).abs().max())
    assert apart[-1] < 0.15 * whole
    assert sum(a > b for a, b in pairwise(apart)) >= 2


def test_differences_within_the_sampling_error_change_no_bit() -> None:
    net = trained("dense")
    moments, x = moments_of(net), images(1, 5)
    found, before = statistics(net, moments, x), norms(net)["2"]
    seen = entering(net, x)[0]["2"][0][:, 0] - before.running_mean
    table = source_of(net, torch.cat([images(150, 1), images(150, 2)]))["2"]
    p = net(x).softmax(1)[0].detach()
    expected = sum(p[k] * table["means"][k][0] for k in range(3))
    usual = (seen - expected).square() < 0.5 * table["spread"][0]
    assert usual.any()
    assert torch.equal(found[0][usual], before.running_mean[usual])
    assert torch.equal(found[1], before.running_var)  # one value has no variance


def test_moments_do_not_depend_on_how_source_data_are_split(net: nn.Module) -> None:
    x = torch.cat([images(150, 1), images(150, 2)])
    whole, parts = (moments_of(net, *each) for each in ([x], x.chunk(7)))
    for name, table in whole.source_dict()["layers"].items():
        for key, value in table.items():
            other = parts.source_dict()["layers"][name][key]
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)


def test_source_data_may_be_added_to_moments_that_are_in_use() -> None:
    net, x = trained(), images(6, 5, scale=2.0)
    measuring = batch_adapter(net, blind(net))
    for seed in (1, 2):
        measuring.fit_moments(images(150, seed))
        assert measuring.moments is not None
        last = statistics(net, measuring.moments, x)
    close(last, statistics(net, moments_of(net), x), 0)


def test_predictions_of_other_rows_than_samples_tell_no_classes() -> None:
    net = trained()
    twice = batch_adapter(net, lambda x, _: torch.cat([net(x), net(x)]))
    twice.fit_moments(images(6))
    assert twice.moments is not None
    assert not twice.moments.known


def test_moments_travel_as_plain_data_and_begin_anew(net: nn.Module) -> None:
    moments, x = moments_of(net), images(5, 3, scale=2.0)
    other = SourceMoments()
    other.load_source_dict(moments.source_dict())
    close(statistics(net, other, x), statistics(net, moments, x), 0)
    other.load_source_dict({})
    assert not other.known
    assert other.source_dict() == {}


# Adaptation by them


def test_predictions_and_steps_are_those_of_a_network_with_these_statistics(
    net: nn.Module,
) -> None:
    moments, x = moments_of(net), images(6, 5, scale=2.0, shift=1.0)
    own = statistics(net, moments, x)
    with by_evidence(net, moments, steps=2, optimizer="sgd", lr=0.1).adapted(x) as found:
        pass
    pairs = iter(own)
    for layer in norms(net).values():
        layer.running_mean, layer.running_var = next(pairs), next(pairs)
    plain = any_adapter(net, "batch", blind(net), objective=MOVES, steps=2, optimizer="sgd", lr=0.1)
    with plain.adapted(x) as expected:
        pass
    assert found.forwards == expected.forwards + 3
    assert found.outputs is not None
    assert expected.outputs is not None
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=0, atol=1e-12)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "given", [{"steps": 1}, {"steps": 2}, {"steps": 0}, {"steps": 1, "gate": 0.1}]
)
def test_both_backends_equal_each_sample_alone(net: nn.Module, given: dict[str, Any]) -> None:
    moments, x = moments_of(net), images(5, 5, scale=2.0, shift=1.0)
    given = {"optimizer": "sgd", "lr": 0.1, **given}
    found = {}
    for backend in ("loop", "vectorised"):
        sampling = by_evidence(net, moments, backend, **given)
        with sampling.adapted(x) as adaptation:
            found[backend] = adaptation.outputs
        if given["steps"] and "gate" not in given:
            assert sampling.backend_selection.backend == backend
    alone = []
    for row in x.chunk(len(x)):
        with by_evidence(net, moments, "loop", **given).adapted(row) as adaptation:
            alone.append(adaptation.outputs)
    for backend in found:
        torch.testing.assert_close(found[backend], torch.cat(alone), rtol=0, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_passes_for_the_statistics_are_counted(net: nn.Module, way: str) -> None:
    moments, x, calls = moments_of(net), images(4, 5, scale=2.0), list[int]()
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    adapting = by_evidence(net, moments, way, steps=2)
    for _ in range(2):  # the second relies on what was found of the first
        calls.clear()
        with adapting.adapted(x) as found:
            pass
    times = len(x) if way == "loop" else 1
    assert found.forwards == len(calls) == times * (3 + 2 * 2 + 2)


def test_samples_without_steps_have_statistics_of_their_own(net: nn.Module) -> None:
    moments, x = moments_of(net), images(4, 5, scale=2.0, shift=1.0)
    with by_evidence(net, moments, "vectorised").adapted(x) as found:
        pass
    alone = []
    for row in x.chunk(len(x)):
        with by_evidence(net, moments).adapted(row), torch.no_grad():
            alone.append(net(row))
    torch.testing.assert_close(found.outputs, torch.cat(alone), rtol=0, atol=1e-12)
    assert (torch.cat(alone) - net(x)).abs().max() > 1e-3


@pytest.mark.parametrize("norm_stats", ["mixed", "evidence"])
def test_without_steps_a_sample_does_not_depend_on_its_batch(norm_stats: Any) -> None:
    net = trained()
    moments, x = moments_of(net), images(4, 5, scale=2.0)
    whole: list[Any] = []
    alone: list[Any] = []
    for rows, into in (([x], whole), (x.chunk(len(x)), alone)):
        for row in rows:
            made = by_evidence(net, moments, "loop", norm_stats=norm_stats)
            with made.adapted(row) as found:
                into.append(found.outputs)
    torch.testing.assert_close(torch.cat(whole), torch.cat(alone), rtol=0, atol=1e-12)


# Nothing is left behind, and what is bad harms nobody


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [0, 1])
def test_every_buffer_is_bitwise_what_it_was_however_it_ends(way: str, steps: int) -> None:
    net = trained()
    moments, x = moments_of(net), images(4, 5, scale=2.0)
    before, held = bits(net), {n: (m.running_mean, m.running_var) for n, m in norms(net).items()}
    adapting = by_evidence(net, moments, way, steps=steps)
    with adapting.adapted(x):
        pass
    assert changed(before, net) == []
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), adapting.adapted(x):
            raise error
        assert changed(before, net) == []
    handle = net[5].register_forward_pre_hook(interrupted)  # type: ignore[index]
    with pytest.raises(KeyboardInterrupt), adapting.adapted(x):
        pass
    handle.remove()
    adapting.undo.run()
    assert changed(before, net) == []
    for name, layer in norms(net).items():
        assert (layer.running_mean, layer.running_var) == held[name] or all(
            a is b for a, b in zip((layer.running_mean, layer.running_var), held[name], strict=True)
        )
        assert not layer._forward_pre_hooks


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("way", ["loop", "vectorised"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_bad_sample_gets_the_source_and_does_not_touch_the_others(way: str, steps: int) -> None:
    net = trained()
    moments, x = moments_of(net), images(4, 5, scale=2.0)
    bad = x.clone()
    bad[1] = torch.nan
    given = {"steps": steps, "optimizer": "sgd", "lr": 0.1}
    with by_evidence(net, moments, way, **given).adapted(x) as good:
        pass
    with by_evidence(net, moments, way, **given).adapted(bad) as found:
        pass
    assert found.outputs is not None
    assert found.outputs[1].isnan().all()
    rest = [0, 2, 3]
    torch.testing.assert_close(found.outputs[rest], good.outputs[rest], rtol=0, atol=1e-9)
    assert found.skipped.tolist() == [False, True, False, False]


def test_a_bad_batch_gets_the_source_and_does_not_touch_the_next() -> None:
    net = trained()
    moments, x = moments_of(net), images(4, 5, scale=2.0)
    bad = x.clone()
    bad[1] = torch.inf
    adapting = by_evidence(net, moments, steps=1)
    own = [t.clone() for n in norms(net).values() for t in (n.running_mean, n.running_var)]
    with adapting.adapted(bad) as found:
        now = [t for n in norms(net).values() for t in (n.running_mean, n.running_var)]
        assert all(map(torch.equal, now, own))
        assert found.reason == "non-finite output"
    with adapting.adapted(x) as after:
        pass
    with by_evidence(net, moments, steps=1).adapted(x) as fresh:
        pass
    assert after.outputs is not None
    assert fresh.outputs is not None
    assert torch.equal(after.outputs, fresh.outputs)


def test_source_data_that_are_not_finite_are_left_out() -> None:
    net = trained()
    bad = images(30, 3)
    bad[0] = torch.nan
    close_to, found = moments_of(net, images(60, 1)), moments_of(net, images(60, 1), bad)
    for name, table in close_to.source_dict()["layers"].items():
        for key, value in table.items():
            assert torch.equal(value, found.source_dict()["layers"][name][key])


# Layers and networks of all kinds


class Graphs(SimpleNamespace):
    """A batch of graphs as graph libraries have it: nodes, and which graph each is of."""

    def clone(self) -> "Graphs":
        return Graphs(x=self.x.clone(), batch=self.batch.clone(), num_graphs=self.num_graphs)


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(2, 3)

    def forward(self, graphs: Graphs) -> Tensor:
        nodes = self.norm(graphs.x)
        pooled = nodes.new_zeros(graphs.num_graphs, 2).index_add(0, graphs.batch, nodes)
        logits: Tensor = self.head(pooled)
        return logits


def graphs(*sizes: int, seed: int = 0, shift: float = 0.0) -> Graphs:
    batch = torch.tensor([row for row, size in enumerate(sizes) for _ in range(size)])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(batch), 2, generator=generator, dtype=torch.float64) + shift
    return Graphs(x=x, batch=batch, num_graphs=len(sizes))


def test_nodes_of_graphs_count_as_their_graphs() -> None:
    net = drawn(GraphNet())
    norm: Any = net.get_submodule("norm")
    source = graphs(*(1 + i % 4 for i in range(40)))
    moments = doubled(moments_of(net, source))
    table = moments.source_dict()["layers"]["norm"]
    each = torch.stack(
        [(source.x - norm.running_mean)[source.batch == g].mean(0) for g in range(40)]
    )
    weights = net(source).softmax(1).detach()
    expected = (weights.T @ each + each.mean(0)) / (weights.sum(0)[:, None] + 1)
    torch.testing.assert_close(table["means"][0], expected)
    before = norm.running_mean
    with by_evidence(net, moments).adapted(graphs(3, 2, 4, seed=1, shift=9.0)):
        assert (norm.running_mean - before).min() > 5
    assert norm.running_mean is before


def test_graphs_may_come_beside_tensors() -> None:
    net, source = drawn(GraphNet()), graphs(*(1 + i % 4 for i in range(40)))

    def beside(each: Graphs) -> dict[str, Any]:
        return {"scale": torch.ones(each.num_graphs, 1), "graphs": each}

    whole = moments_of(net, source)
    both = batch_adapter(net, lambda held, _: net(held["graphs"]))
    both.fit_moments(beside(source))
    assert both.moments is not None
    expected = whole.source_dict()["layers"]["norm"]
    found = both.moments.source_dict()["layers"]["norm"]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_layers_that_run_twice_or_whose_samples_cannot_be_told_keep_the_source() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.cut, self.once = (nn.BatchNorm1d(16) for _ in range(3))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.twice(self.twice(x.flatten(1)))
            self.cut(torch.cat([rows, rows[:1]]))
            logits: Tensor = self.head(self.once(rows))
            return logits

    net = drawn(Odd())
    moments = moments_of(net)
    assert list(moments.source_dict()["layers"]) == ["once"]
    before = {name: layer.running_mean for name, layer in norms(net).items()}
    with by_evidence(net, moments).adapted(images(6, 5, scale=9.0, shift=9.0)):
        moved = {n for n, m in norms(net).items() if not torch.equal(m.running_mean, before[n])}
    assert moved == {"once"}


def test_networks_without_such_layers_need_no_source_data_and_are_as_they_are() -> None:
    net = drawn(
        nn.Sequential(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3))
    )
    x = images(4, scale=2.0)
    with by_evidence(net, SourceMoments()).adapted(x) as found, torch.no_grad():
        assert torch.equal(net(x), net(x))
        assert found.forwards == 2
    assert found.outputs is not None
    assert torch.equal(found.outputs, net(x).detach())


def test_layers_in_training_mode_are_left_alone() -> None:
    net = trained()
    moments = moments_of(net)
    layer = norms(net)["1"]
    layer.train()
    before = layer.running_mean
    with by_evidence(net, moments).adapted(images(6, scale=2.0)):
        assert layer.running_mean is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_its_moments_in_full(dtype: torch.dtype) -> None:
    net, x = trained("dense"), images(12, 5, scale=2.0, shift=1.0)
    exact = statistics(net, moments_of(net), x)
    half = trained("dense").to(dtype)
    source = [images(150, seed).to(dtype) for seed in (1, 2)]
    found = statistics(half, moments_of(half, *source), x.to(dtype))
    assert all(t.dtype == dtype for t in found)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.1, atol=0.3)


def test_unknown_moments_and_other_classes_are_refused() -> None:
    net = trained()
    with pytest.raises(ValueError, match=r"has seen none with these weights\. Run Trainer"):
        by_evidence(net, SourceMoments())
    with pytest.raises(ValueError, match="has seen none"):
        sample_adapter(net, blind(net), norm_stats="evidence")
    given: dict[str, Any] = {"forward": blind(net), "to_label": lambda y: y.softmax(1)}
    with pytest.raises(ValueError, match="has seen none"):
        adapt(net, images(2), settings=Settings(norm_stats="evidence"), **given)
    moments = moments_of(net)
    other = adapter(net, blind(net), lambda y: y[:, :2].softmax(1), Settings(), moments=moments)
    assert isinstance(other, BatchAdapter)
    with pytest.raises(ValueError, match=r"Expected predictions of 3 classes.*got 2"):
        other.fit_moments(images(4))
