"""T3A: agreement with a plain implementation of its paper, along a stream.

The paper's public code differs in one thing: it gives each row of the classifier's weights the
class that the classifier names for it, so that a class may begin without a support; the paper's
first supports, and ours, are of their own class. Where both name the same, they agree.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.method_runs import (
    RESETS,
    adapted,
    adapter_of,
    batches,
    from_yaml,
    plain_module,
    predicted,
    run,
)
from helpers.modules import same, toy
from helpers.reference import ToyNet
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from it3_lightning import T3A, TestTimeCallback
from it3_lightning.engine import BatchAdapter, Settings


def entropy(logits: Tensor) -> float:
    p = logits.softmax(0)
    return -float((p * p.log()).sum())


@torch.no_grad()
def by_hand(net: ToyNet, stream: Sequence[Tensor], most: int, every: int) -> list[Tensor]:
    """T3A as its paper has it, one support after the other in plain lists, by class."""
    weight, found = net.head.weight, []
    for batch, x in enumerate(stream):
        if batch % every == 0:
            supports = [[(entropy(net.head(w)), w / w.norm())] for w in weight]
        features = net.dense(net.bn(net.conv(x)).relu().flatten(1)).relu()
        for z in features:
            logits = net.head(z)
            supports[int(logits.argmax())].append((entropy(logits), z / z.norm()))
        for each in supports:
            each.sort(key=lambda pair: pair[0])
            del each[most:]
        centres = [torch.stack([z for _, z in each]).mean(0) for each in supports]
        weights = torch.stack([centre / centre.norm() for centre in centres])
        found.append((features @ weights.T).softmax(1))
    return found


@pytest.mark.parametrize("reset", [*RESETS])
@pytest.mark.parametrize("filter_k", [1, 3, -1])
def test_predictions_are_those_of_the_paper_and_bad_batches_leave_nothing(
    reset: Any, filter_k: int
) -> None:
    net, stream = toy(), batches()
    expected = by_hand(net, stream, 10**6 if filter_k == -1 else filter_k, RESETS[reset])
    found = run(adapter_of(T3A("head", filter_k), net, reset=reset), net, stream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.prediction, theirs, rtol=0, atol=1e-10)
        assert ours.backwards == 0


def test_supports_make_a_difference_to_the_next_batch() -> None:
    net, stream = toy(), batches(2)
    carried = run(adapter_of(T3A("head"), net), net, stream)[1].prediction
    alone = run(adapter_of(T3A("head"), net), net, stream[1:])[0].prediction
    assert carried is not None
    assert alone is not None
    assert (carried - alone).abs().max() > 1e-3


def test_no_weight_moves_and_the_entropy_of_the_network_is_logged() -> None:
    net, x = toy(), batches(1)[0]
    weights = {name: weight.clone() for name, weight in net.named_parameters()}
    found = adapted(adapter_of(T3A("head"), net), net, x)
    p = net(x).softmax(1)
    torch.testing.assert_close(found.distance_adapted, -(p * p.log()).sum(1), check_stride=False)
    assert found.outputs is not None
    assert same([(found.outputs, net(x).detach()), (found.distance_source, found.distance_adapted)])
    assert same((found.weights[name], weight) for name, weight in weights.items())


def test_each_dataloader_and_each_run_begins_with_the_weights_of_the_classifier() -> None:
    module, callback = plain_module(), TestTimeCallback(T3A("net.head"))
    first, second = batches(5)[:2], batches(5)[2:]
    expected = [by_hand(module.net, stream, 100, 1000) for stream in (first, second)]
    for _ in range(2):
        found = predicted(callback, module, first, second)
        for ours, theirs in zip(found, expected, strict=True):
            for logits, prediction in zip(ours, theirs, strict=True):
                torch.testing.assert_close(logits.softmax(1), prediction, rtol=0, atol=1e-10)


def test_its_papers_settings_are_its_defaults() -> None:
    method = T3A("head")
    settings = TestTimeCallback(method).settings
    assert (settings.steps, settings.reset, settings.needs_batch) == (0, "never", False)
    assert (method.filter_k, method.layers) == (100, ("head",))


def test_a_configuration_names_its_layer() -> None:
    method = from_yaml("T3A", layer="net.head", filter_k=5)
    assert (method.layer, method.filter_k) == ("net.head", 5)


def test_half_precision_classifies_alike() -> None:
    net, stream = toy(), batches(2)
    expected = by_hand(net, stream, 100, 1000)
    half = toy().to(torch.bfloat16)
    adapter = adapter_of(T3A("head"), half)
    for x, theirs in zip(stream, expected, strict=True):
        found = adapted(adapter, half, x.to(torch.bfloat16)).prediction
        assert found is not None
        torch.testing.assert_close(found.double(), theirs, rtol=0, atol=0.1)


@pytest.mark.parametrize("filter_k", [0, -2])
def test_no_supports_are_refused(filter_k: int) -> None:
    with pytest.raises(ValueError, match=f"Expected filter_k >= 1, or -1 for all, got {filter_k}"):
        T3A("head", filter_k)


def test_what_is_no_last_linear_layer_is_refused() -> None:
    net, x = toy(), batches(1)[0]
    with pytest.raises(ValueError, match=r"Unknown layer 'hed'. Did you mean 'head'"):
        adapter_of(T3A("hed"), net)
    for layer, given in (("dense", "Linear"), ("bn", "BatchNorm2d")):
        with pytest.raises(ValueError, match=rf"the layer '{layer}'.*{given}.*Name"):
            adapted(adapter_of(T3A(layer), net), net, x)
    with pytest.raises(MisconfigurationException, match="Unknown layer 'fc'"):
        predicted(TestTimeCallback(T3A("fc")), plain_module(), [x])


@pytest.mark.parametrize(
    ("size", "maps", "message"),
    [(1, False, "T3A needs class probabilities"), (2, True, "T3A needs one class vector")],
)
def test_values_and_maps_are_refused(size: int, maps: bool, message: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, size, 1) if maps else nn.Linear(4, size))
    x = torch.ones(2, 1, 2, 2) if maps else torch.ones(2, 4)
    settings = Settings(objective=T3A("0"), steps=0)
    adapter = BatchAdapter(net, lambda x, _: net(x), lambda outputs: outputs, settings)
    with pytest.raises(ValueError, match=message):
        adapted(adapter, net, x)
