"""EATA against its paper in plain torch, online and not, with Fisher and without.

The published code (github.com/mr-eggplant/EATA) agrees in the filters, the weights and the moving
mean, which follows the samples that were adapted to. It differs in two places, where the paper is
followed here: its importance squares the mean gradient of a batch (eq. 9 has each sample's), and
its predictions are those before the step. torch-ttt 0.0.2 agrees in the loss of a batch; its
``compute_fishers`` raises a TypeError.
"""

import math
from typing import Any

import pytest
import torch
from helpers.method_runs import NEVER, RESETS, batches, from_yaml, served
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
from helpers.toy import differing, everything, quiet
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning import EATA, TestTimeCallback

Fisher = list[Tensor]
GIVEN: dict[str, Any] = {"margin": 0.8, "epsilon": 0.9}  # some samples of three classes pass
ETA: dict[str, Any] = {**GIVEN, "fisher_weight": 0.0}


def importance(source: nn.Module, stream: list[Tensor]) -> Fisher:
    """Take the mean over samples of the squared gradients towards the network's own labels."""
    net, weights = of_batches(source)
    squares = []
    for x in stream:
        for index in range(len(x)):
            logits = net(x)[index : index + 1]
            loss = F.cross_entropy(logits, logits.argmax(1))
            squares.append([g.square() for g in torch.autograd.grad(loss, weights)])
    return [torch.stack(each).mean(0) for each in zip(*squares, strict=True)]


def by_hand(
    source: nn.Module,
    stream: list[Tensor],
    every: int = NEVER,
    steps: int = 1,
    fisher: Fisher | None = None,
    beta: float = 0.0,
) -> tuple[list[Tensor], list[int]]:
    """EATA as its paper has it; return outputs, and how many samples each step was taken by."""
    e0, outputs, counts = GIVEN["margin"] * math.log(3), [], []
    for batch, x in enumerate(stream):
        if batch % every == 0:
            net, weights = of_batches(source)
            start = [w.detach().clone() for w in weights]
            optimizer = torch.optim.SGD(weights, lr=LR, momentum=0.9)
            m: Tensor | None = None
        for _ in range(steps):
            logits = net(x)
            p, e = logits.softmax(1).detach(), entropies(logits)
            near = [0.0 if m is None else float(m @ q / (m.norm() * q.norm())) for q in p]
            chosen = [i for i in range(len(x)) if e[i] < e0 and near[i] < GIVEN["epsilon"]]
            counts.append(len(chosen))
            if not chosen:
                continue
            terms = [math.exp(e0 - float(e[i].detach())) * e[i] for i in chosen]
            loss = torch.stack(terms).mean()
            for f, w, w0 in zip(fisher or [], weights, start, strict=fisher is not None):
                loss = loss + beta * (f * (w - w0) ** 2).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            mean = p[chosen].mean(0)
            m = mean if m is None else 0.9 * m + 0.1 * mean
        outputs.append(net(x).detach())
    return outputs, counts


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_stream_is_adapted_to_as_in_the_paper_whatever_bad_batches_are_in_it(
    reset: Any, steps: int
) -> None:
    expected, counts = by_hand(network(), batches(), RESETS[reset], steps)
    assert min(counts) < max(counts) < 8
    assert_close(outputs_of(EATA(**ETA), network(), batches(), reset=reset, steps=steps), expected)


def test_measuring_changes_nothing() -> None:
    expected, _ = by_hand(network(), batches())
    assert_close(outputs_of(EATA(**ETA), network(), batches(), measure=False), expected)


@pytest.mark.parametrize("reset", RESETS)
def test_weights_that_matter_to_the_source_are_held(reset: Any) -> None:
    seen, net, method = batches(2, size=3), network(), EATA(**GIVEN, fisher_weight=5.0)
    adapter = adapter_of(method, net, reset=reset, steps=2)
    for x in seen:
        adapter.fit_source(x)
    fisher = importance(network(), seen)
    expected, _ = by_hand(network(), batches(), RESETS[reset], 2, fisher, 5.0)
    free, _ = by_hand(network(), batches(), RESETS[reset], 2)
    assert (expected[-1] - free[-1]).abs().max() > 1e-3
    assert_close([torch.as_tensor(each.outputs) for each in run(adapter, net, batches())], expected)


def test_the_importance_is_the_mean_over_the_first_samples_and_travels() -> None:
    (first, second), method, other = batches(2, size=3), EATA(fisher_samples=3), EATA()
    adapter = adapter_of(method, network())
    for x in (first, second):
        adapter.fit_source(x)
    source = method.source_dict()
    assert (source["samples"], list(source["fisher"])) == (3, ["bn.weight", "bn.bias"])
    assert_close([*source["fisher"].values()], importance(network(), [first]))
    other.load_source_dict(source)
    adapter_of(other, network()).fit_source(second)
    found = other.source_dict()
    assert found["samples"] == 6
    assert_close([*found["fisher"].values()], importance(network(), [first, second]))
    other.load_source_dict({})
    assert other.source_dict() == {}


def test_an_untouched_module_learns_of_source_data_in_a_validation() -> None:
    module, seen = plain_module(), batches(2, size=3)
    callback = TestTimeCallback(EATA(**GIVEN, fisher_weight=5.0), lr=LR)
    with pytest.raises(MisconfigurationException, match="EATA must have seen source data"):
        predicted(callback, module, batches())
    before = everything(module)
    quiet(callbacks=[callback]).validate(module, served(seen), verbose=False)
    assert differing(before, everything(module)) == []
    expected, counts = by_hand(module.net, batches(), fisher=importance(module.net, seen), beta=5.0)
    assert_close(predicted(callback, module, batches()), expected)
    assert callback.summary.moved == sum(counts)
    fresh = TestTimeCallback(EATA(**GIVEN, fisher_weight=5.0), lr=LR)
    checkpoint: dict[str, Any] = {}
    callback.on_save_checkpoint(quiet(), module, checkpoint)
    fresh.on_load_checkpoint(quiet(), module, checkpoint)
    assert_close(predicted(fresh, module, batches()), expected)


def test_an_untouched_module_needs_no_source_data_without_it() -> None:
    module = plain_module()
    expected, counts = by_hand(module.net, batches())
    callback = TestTimeCallback(EATA(**ETA), lr=LR)
    assert_close(predicted(callback, module, batches()), expected)
    assert 0 < callback.summary.moved == sum(counts) < 40


def test_its_papers_settings_are_its_defaults() -> None:
    method = EATA()
    assert (method.margin, method.epsilon, method.fisher_weight) == (0.4, 0.05, 2000)
    assert method.fisher_samples == 2000
    settings = TestTimeCallback(method).settings
    assert (settings.parameters, settings.norm_stats, settings.reset) == ("norm", "batch", "never")
    assert settings.moves == ("momentum", 2.5e-4)
    assert from_yaml("EATA", epsilon=0.4, fisher_weight=1.0) == EATA(epsilon=0.4, fisher_weight=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"margin": 0.0}, "Expected margin > 0, a share of ln C, got 0.0"),
        ({"epsilon": 1.5}, r"Expected epsilon in \[0, 1\], got 1.5"),
        ({"fisher_weight": -1.0}, "Expected fisher_weight >= 0, got -1.0"),
        ({"fisher_samples": 0}, "Expected fisher_samples >= 1, got 0"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EATA(**given)


def test_maps_and_weights_that_were_not_measured_are_refused() -> None:
    maps = nn.Conv2d(1, 3, 1).double()
    with pytest.raises(ValueError, match=r"EATA needs one class vector .* got maps \(8, 3, 4, 4\)"):
        run(adapter_of(EATA(), maps, parameters="all"), maps, batches(1))
    seen, wider, net = EATA(), EATA(), network()
    adapter_of(seen, net).fit_source(batches(1)[0])
    wider.load_source_dict(seen.source_dict())
    with pytest.raises(ValueError, match=r"how much 'conv.weight' matters .* measured 2 other"):
        run(adapter_of(wider, net, parameters="all"), net, batches(1))
