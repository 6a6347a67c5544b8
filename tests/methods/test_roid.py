"""ROID against its algorithm in plain torch, online and not, and its weights and corrections.

The published code (github.com/mariodoebler/test-time-adaptation) agrees in the loss, the weights,
the moving mean and the weight ensembling. It differs where the class says so: its view is of those
samples alone that count, its prior corrects logits, those before the step, and its momentum is
Nesterov's; in a last batch that is smaller, it divides by the usual size. torch-ttt 0.0.2 has no
ROID.
"""

import math
from typing import Any

import pytest
import torch
from helpers.method_runs import NEVER, RESETS, batches, from_yaml
from helpers.online import (
    LR,
    adapter_of,
    entropies,
    network,
    of_batches,
    plain_module,
    predicted,
    run,
    with_bad_ones,
)
from torch import Tensor, nn

from it3_lightning import ROID, TestTimeCallback
from it3_lightning.methods.roid import soft_likelihood_ratio
from it3_lightning.methods.views import crop_and_flip

Y = tuple[Tensor, Tensor]


def brighter(x: Tensor) -> Tensor:
    """Make a view that anyone can repeat."""
    return x + 0.4


def to_unit(values: list[float]) -> list[float]:
    return [(value - min(values)) / (max(values) - min(values)) for value in values]


def weights_of(logits: Tensor, mean: Tensor) -> list[float]:
    """Return the weights of samples; 0 for those that do not count."""
    p = logits.softmax(1).detach()
    diverse = to_unit([1 - float(mean @ q / (mean.norm() * q.norm())) for q in p])
    certain = to_unit([-float(e) for e in entropies(logits).detach()])
    middle = sum(diverse) / len(diverse)
    both = zip(diverse, certain, strict=True)
    return [math.exp(3 * d * c) * (d >= middle) for d, c in both]


def term(logits: Tensor, other: Tensor) -> Tensor:
    """Return likelihood ratio and consistency of one sample."""
    p = logits.softmax(0).clamp(max=0.99)
    ratio = -(p * ((p / (1 - p)) + 1e-5).log()).sum()
    there = (other.softmax(0) * logits.log_softmax(0)).sum()
    back = (logits.softmax(0) * other.log_softmax(0)).sum()
    return ratio - there / 2 - back / 2


def corrected(logits: Tensor) -> Tensor:
    """Return probabilities, multiplied by smoothed frequencies of the classes."""
    p = logits.softmax(1).detach()
    prior = p.mean(0)
    smooth = max(1 / p.shape[0], 1 / p.shape[1]) / prior.max()
    found = p * ((prior + smooth) / (1 + smooth * p.shape[1]))
    return found / found.sum(1, keepdim=True)


def by_hand(
    source: nn.Module, stream: list[Tensor], every: int = NEVER, steps: int = 1
) -> tuple[list[Y], list[int]]:
    """ROID as published; return outputs and predictions, and how many samples counted."""
    found, counts = [], []
    start = of_batches(source)[1]
    for batch, x in enumerate(stream):
        if batch % every == 0:
            net, weights = of_batches(source)
            optimizer = torch.optim.SGD(weights, lr=LR, momentum=0.9)
            mean = torch.full((3,), 1 / 3, dtype=x.dtype)
        for _ in range(steps):
            logits, other = net(x), net(brighter(x))
            w = weights_of(logits, mean)
            counts.append(sum(each > 0 for each in w))
            terms = [w[i] * term(logits[i], other[i]) for i in range(len(x)) if w[i] > 0]
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(terms).sum() / len(x))
            optimizer.step()
            mean = 0.9 * mean + 0.1 * logits.softmax(1).mean(0).detach()
            with torch.no_grad():
                for weight, s in zip(weights, start, strict=True):
                    weight.copy_(0.99 * weight + 0.01 * s)
        outputs = net(x).detach()
        found.append((outputs, corrected(outputs)))
    return found, counts


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_stream_is_adapted_to_as_published_and_bad_batches_leave_no_trace(
    reset: Any, steps: int
) -> None:
    stream, net = batches(), network()
    adapter = adapter_of(ROID(augment=brighter), net, reset=reset, steps=steps)
    found = run(adapter, net, with_bad_ones(stream))
    assert {each.reason for each in found[1::2]} == {"non-finite output"}
    expected, counts = by_hand(net, stream, RESETS[reset], steps)
    assert all(0 < count < 8 for count in counts)
    for ours, (outputs, prediction) in zip(found[::2], expected, strict=True):
        torch.testing.assert_close(ours.outputs, outputs, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.prediction, prediction, rtol=0, atol=1e-9)


def test_an_untouched_module_predicts_corrected_and_is_left_as_it_was() -> None:
    stream, module = batches(), plain_module()
    found = predicted(TestTimeCallback(ROID(augment=brighter), lr=LR), module, stream)
    for ours, (_, theirs) in zip(found, by_hand(module.net, stream)[0], strict=True):
        torch.testing.assert_close(ours.softmax(1), theirs, rtol=0, atol=1e-9)


def test_a_sample_among_its_likes_counts_as_it_is() -> None:
    net = network()
    x = batches(1, 1)[0]
    (found,) = run(adapter_of(ROID(augment=brighter), net, norm_stats="source"), net, [x])
    assert torch.as_tensor(found.reliable).tolist() == [True]
    (found,) = run(adapter_of(ROID(augment=brighter), net), net, [x.expand(4, -1, -1, -1)])
    assert torch.as_tensor(found.reliable).tolist() == [True] * 4
    assert torch.as_tensor(found.outputs).isfinite().all()


def test_certain_predictions_still_move_where_their_entropy_no_longer_does() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = soft_likelihood_ratio(logits.softmax(1)).sum()
    (ours,) = torch.autograd.grad(loss, logits)
    (theirs,) = torch.autograd.grad(entropies(logits).sum(), logits)
    assert ours[0, 0] < 5 * theirs[0, 0] < 0
    sure = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (still,) = torch.autograd.grad(soft_likelihood_ratio(sure.softmax(1)).sum(), sure)
    assert still.abs().max() < 1e-2


def test_the_same_seed_draws_the_same_views_and_other_ones_at_each_step() -> None:
    seen: list[Tensor] = []

    def view(x: Tensor) -> Tensor:
        seen.append(crop_and_flip(x) + torch.rand(()))
        return seen[-1]

    def found(seed: int, among: int) -> Tensor:
        net = network()
        torch.manual_seed(among)
        expected = torch.rand(2)
        torch.manual_seed(among)
        adapter = adapter_of(ROID(augment=view, seed=seed), net, measure=False)
        last = run(adapter, net, [batches(1)[0]] * 3)[-1]
        assert torch.equal(torch.rand(2), expected)
        return torch.as_tensor(last.prediction)

    assert torch.equal(found(0, 1), found(0, 2))
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(found(0, 1), found(1, 1))


def test_its_papers_settings_are_its_defaults() -> None:
    method = ROID()
    assert (method.temperature, method.momentum) == (1 / 3, 0.9)
    settings = TestTimeCallback(method).settings
    assert settings.moves == ("momentum", 2.5e-4)
    assert (settings.parameters, settings.weight_ensembling) == ("norm", 0.01)
    assert (settings.norm_stats, settings.reset, settings.steps) == ("batch", "never", 1)


def test_a_configuration_names_it() -> None:
    method = from_yaml("ROID", temperature=0.5)
    assert (type(method), method.temperature) == (ROID, 0.5)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature > 0, got 0"):
        ROID(temperature=0)
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\], got 2"):
        ROID(momentum=2)
    net = nn.Conv2d(1, 3, 1).double()
    with pytest.raises(ValueError, match=r"ROID needs one class vector .* got maps"):
        run(adapter_of(ROID(), net, parameters="all"), net, batches(1))
