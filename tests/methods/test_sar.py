"""SAR against its paper in plain torch: both filters, the sharp step, recovery from collapse.

The published code (github.com/mr-eggplant/SAR) agrees in filters, step and moving mean. Three
things differ: where no sample counts, it takes a step without gradients, which momentum moves, and
the paper takes none; after a recovery it keeps the mean that has fallen, so that it may recover
again at once, and here it begins anew; its predictions are those before the step. torch-ttt 0.0.2
has no SAR.
"""

import copy
import math
from typing import Any

import pytest
import torch
from helpers.method_runs import NEVER, RESETS, batches, from_yaml
from helpers.modules import drawn
from helpers.online import (
    LR,
    adapter_of,
    assert_close,
    entropies,
    network,
    of_batches,
    outputs_of,
    plain_module,
    predicted,
    run,
)
from torch import Tensor, nn

from it3_lightning import SAR, TestTimeCallback, select

GIVEN: dict[str, Any] = {"margin": 0.8, "rho": 0.2, "recovery": 0.7}


class ByHand:
    """SAR as its paper has it, and how often each of its parts did something."""

    def __init__(self, source: nn.Module, margin: float, rho: float, recovery: float) -> None:
        self.source, self.rho, self.recovery = source, rho, recovery
        self.e0 = margin * math.log(3)
        self.recoveries = self.dropped = self.idle = 0
        self.begin()

    def begin(self) -> None:
        self.net, self.weights = of_batches(self.source)
        self.optimizer = torch.optim.SGD(self.weights, lr=LR, momentum=0.9)
        self.mean: float | None = None

    def entropy(self, x: Tensor) -> Tensor:
        e = entropies(self.net(x))
        return e.flatten(1).mean(1) if e.ndim > 1 else e

    def step(self, x: Tensor) -> None:
        e = self.entropy(x)
        first = e.detach() < self.e0
        if not first.any():
            self.idle += 1
            return
        gradients = torch.autograd.grad(e[first].mean(), self.weights)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        here = [w.detach().clone() for w in self.weights]
        with torch.no_grad():
            for w, g in zip(self.weights, gradients, strict=True):
                w.add_(self.rho * g / norm)
        e = self.entropy(x)
        both = first & (e.detach() < self.e0)
        self.dropped += int(first.sum() - both.sum())
        if both.any():
            loss = e[both].mean()
            sharp = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            for w, old in zip(self.weights, here, strict=True):
                w.copy_(old)
        if not both.any():
            self.idle += 1
            return
        for w, g in zip(self.weights, sharp, strict=True):
            w.grad = g
        self.optimizer.step()
        value = float(loss.detach())
        self.mean = value if self.mean is None else 0.9 * self.mean + 0.1 * value
        if self.mean < self.recovery:
            self.begin()
            self.recoveries += 1

    def run(self, stream: list[Tensor], every: int = NEVER, steps: int = 1) -> list[Tensor]:
        outputs = []
        for index, x in enumerate(stream):
            if index % every == 0:
                self.begin()
            for _ in range(steps):
                self.step(x)
            outputs.append(self.net(x).detach())
        return outputs


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_stream_is_adapted_to_as_in_the_paper_whatever_bad_batches_are_in_it(
    reset: Any, steps: int
) -> None:
    reference = ByHand(network(), **GIVEN)
    expected = reference.run(batches(8), RESETS[reset], steps)
    assert 0 < reference.recoveries < 8 * steps
    assert reference.dropped > 0
    found = outputs_of(SAR(**GIVEN), network(), batches(8), reset=reset, steps=steps)
    assert_close(found, expected)


def test_batches_without_a_sample_that_counts_change_nothing() -> None:
    given = {**GIVEN, "margin": 0.5}
    reference = ByHand(network(), **given)
    expected = reference.run(batches(8))
    assert 0 < reference.idle < 8
    adapter = adapter_of(SAR(**given), net := network())
    found = run(adapter, net, batches(8))
    assert_close([torch.as_tensor(each.outputs) for each in found], expected)
    assert sum(each.backwards == 0 for each in found) > 0


def test_measuring_changes_nothing() -> None:
    expected = ByHand(network(), **GIVEN).run(batches())
    assert_close(outputs_of(SAR(**GIVEN), network(), batches(), measure=False), expected)


def test_without_recovery_and_radius_it_is_filtered_entropy() -> None:
    given = {"margin": 0.8, "rho": 0.0, "recovery": 0.0}
    net, weights = of_batches(network())
    optimizer = torch.optim.SGD(weights, lr=LR, momentum=0.9)
    expected = []
    for x in batches():
        e = entropies(net(x))
        optimizer.zero_grad()
        torch.autograd.backward(e[e < 0.8 * math.log(3)].mean())
        optimizer.step()
        expected.append(net(x).detach())
    assert_close(outputs_of(SAR(**given), network(), batches()), expected)


def maps() -> nn.Module:
    return drawn(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1)))


def test_maps_count_by_their_mean_entropy_and_group_norm_by_one_sample() -> None:
    net, given = maps(), {**GIVEN, "margin": 0.95, "recovery": 0.0}
    stream = [x[:1] for x in batches()]
    expected = ByHand(net, **given).run(stream)
    found = run(adapter_of(SAR(**given), net, norm_stats="source"), net, stream)
    assert_close([torch.as_tensor(each.outputs) for each in found], expected)
    assert not torch.equal(expected[-1], net(stream[-1]))


def test_an_untouched_module_is_adapted_and_left_as_it_was() -> None:
    module = plain_module()
    expected = ByHand(module.net, **GIVEN).run(batches(8))
    assert_close(predicted(TestTimeCallback(SAR(**GIVEN), lr=LR), module, batches(8)), expected)


class Tower(nn.Module):
    """Names of torchvision's ResNets and timm's vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d
        self.bn1 = norm(1)
        for index in range(1, 5):
            block = nn.ModuleDict({"bn1": norm(1), "downsample": nn.Sequential(nn.ReLU(), norm(1))})
            self.add_module(f"layer{index}", nn.Sequential(block))
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm1": norm(1)}) for _ in range(12))
        self.norm = norm(1)


def test_the_norm_layers_that_the_paper_moves_can_be_named() -> None:
    module = nn.ModuleDict({"net": Tower()})
    text = " ".join((SAR.__doc__ or "").split())
    resnet = ["net.bn1.*", "net.layer[123].*.bn*", "net.layer[123].*.downsample.1.*"]
    assert all(f'"{pattern}"' in text for pattern in [*resnet, "net.blocks.[0-8].norm*"])
    names = {name.rpartition(".")[0] for name in select(module, resnet)}
    layers = [f"net.layer{i}.0.{last}" for i in (1, 2, 3) for last in ("bn1", "downsample.1")]
    assert names == {"net.bn1", *layers}
    names = {name.rpartition(".")[0] for name in select(module, ["net.blocks.[0-8].norm*"])}
    assert names == {f"net.blocks.{i}.norm1" for i in range(9)}


def test_its_papers_settings_are_its_defaults() -> None:
    method = SAR()
    assert (method.margin, method.rho, method.recovery) == (0.4, 0.05, 0.2)
    settings = TestTimeCallback(method).settings
    assert (settings.parameters, settings.norm_stats, settings.reset) == ("norm", "batch", "never")
    assert settings.moves == ("momentum", 2.5e-4)
    assert from_yaml("SAR", rho=0.1) == SAR(rho=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"margin": -0.4}, "Expected margin > 0, a share of ln C, got -0.4"),
        ({"rho": -0.1}, "Expected a finite rho >= 0, got -0.1"),
        ({"rho": math.inf}, "Expected a finite rho >= 0, got inf"),
        ({"recovery": -1.0}, "Expected recovery >= 0, got -1.0"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAR(**given)


def test_values_are_refused() -> None:
    net = copy.deepcopy(nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 1))).double()
    with pytest.raises(ValueError, match="SAR needs class probabilities"):
        run(adapter_of(SAR(), net), net, batches(1))
