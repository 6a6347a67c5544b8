"""CoTTA against its paper in plain torch, online and not, and its views, draws and refusals.

The published code (github.com/qinenergy/cotta) agrees in the loss, the order of step, teacher and
restoring, and the confidence, which is that of the batch. It differs in three places, where the
paper is followed here: it averages the logits of the views (eq. 3 has predictions), predicts by the
pseudo-labels, which may be averaged, and does so before the step. torch-ttt 0.0.2 has no CoTTA.
"""

import copy
from typing import Any

import pytest
import torch
from helpers.method_runs import NEVER, RESETS, batches, from_yaml
from helpers.modules import SHIFTS, Brighter
from helpers.online import (
    LR,
    adapter_of,
    network,
    of_batches,
    plain_module,
    predicted,
    run,
    with_bad_ones,
)
from torch import Tensor, nn

from it3_lightning import CoTTA, TestTimeCallback
from it3_lightning.methods.views import jitter_and_warp

P = 0.1
DECAY = 0.9


def adam(parameters: Any) -> torch.optim.Adam:
    """Make the paper's optimizer; its ``eps`` is larger, so that rounding makes no steps.

    Where the source is confident, student and teacher are the same at first, and gradients are 0.
    """
    return torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-2)


def confidence(source: nn.Module, x: Tensor) -> Tensor:
    """Return the mean of the source's largest probabilities."""
    found: Tensor = of_batches(source)[0](x).softmax(1).amax(1).mean()
    return found.detach()


def threshold(stream: list[Tensor]) -> float:
    """Return a confidence that some batches have and others do not."""
    found = torch.stack([confidence(network(), x) for x in stream])
    assert found.min() < found.median() < found.max()
    return float(found.median())


def restore(net: nn.Module, source: nn.Module, seed: int, step: int) -> None:
    """Put a share of all elements back, by the numbers that are drawn at this step."""
    generator = torch.Generator().manual_seed((1_000_003 * seed - 1 - step) % 2**32)
    with torch.no_grad():
        for w, s in zip(net.parameters(), source.parameters(), strict=True):
            mask = (torch.rand(w.shape, generator=generator) < P).to(w)
            w.copy_(mask * s + (1 - mask) * w)


def by_hand(
    source: nn.Module, stream: list[Tensor], p_th: float, every: int = NEVER, steps: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """CoTTA as its paper has it; return the student's outputs and the teacher's predictions."""
    found = []
    for batch, x in enumerate(stream):
        if batch % every == 0:
            net, _ = of_batches(source)
            teacher, t = copy.deepcopy(net), 0
            optimizer = adam(net.parameters())
        for _ in range(steps):
            with torch.no_grad():
                label = teacher(x).softmax(1)
                if confidence(source, x) < p_th:
                    views = torch.stack([teacher(x + shift).softmax(1) for shift in SHIFTS])
                    label = views.mean(0)
            loss = -(label * net(x).log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            with torch.no_grad():
                for m, w in zip(teacher.parameters(), net.parameters(), strict=True):
                    m.copy_(DECAY * m + (1 - DECAY) * w)
            restore(net, source, seed=3, step=t)
            t += 1
        found.append((net(x).detach(), teacher(x).softmax(1).detach()))
    return found


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_stream_is_adapted_to_as_in_the_paper_and_bad_batches_leave_no_trace(
    reset: Any, steps: int
) -> None:
    stream, net = batches(), network()
    p_th = threshold(stream)
    method = CoTTA(views=3, augment=Brighter(), confidence=p_th, restore=P, seed=3)
    adapter = adapter_of(method, net, reset=reset, steps=steps, ema_decay=DECAY, optimizer=adam)
    found = run(adapter, net, with_bad_ones(stream))
    assert {each.reason for each in found[1::2]} == {"non-finite output"}
    expected = by_hand(net, stream, p_th, RESETS[reset], steps)
    for ours, (outputs, prediction) in zip(found[::2], expected, strict=True):
        torch.testing.assert_close(ours.outputs, outputs, rtol=0, atol=1e-8)
        torch.testing.assert_close(ours.prediction, prediction, rtol=0, atol=1e-8)


def test_an_untouched_module_predicts_by_the_teacher_and_is_left_as_it_was() -> None:
    stream, module = batches(), plain_module()
    p_th = threshold(stream)
    method = CoTTA(views=3, augment=Brighter(), confidence=p_th, restore=P, seed=3)
    found = predicted(TestTimeCallback(method, optimizer=adam, ema_decay=DECAY), module, stream)
    for ours, (_, theirs) in zip(found, by_hand(module.net, stream, p_th), strict=True):
        torch.testing.assert_close(ours.softmax(1), theirs, rtol=0, atol=1e-8)


def test_elements_come_back_with_the_probability_and_others_at_each_step() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2000), nn.Tanh(), nn.Linear(2000, 3)).double()
    source = {name: w.detach().clone() for name, w in net.named_parameters()}
    adapter = adapter_of(CoTTA(views=1, restore=0.01), net)
    restored = []
    for x in batches(3):
        (found,) = run(adapter, net, [x])
        back = torch.cat([(w == source[name]).flatten() for name, w in found.weights.items()])
        assert 0.008 < back.double().mean() < 0.012
        restored.append(back)
    assert 0 < (restored[0] & restored[1]).sum() < 20  # one of ten thousand, by chance


def test_the_same_seed_draws_the_same_whatever_the_global_generator_is() -> None:
    def found(seed: int, among: int) -> Tensor:
        net = network()
        torch.manual_seed(among)
        expected = torch.rand(2)
        torch.manual_seed(among)
        last = run(adapter_of(CoTTA(views=2, confidence=1.0, seed=seed), net), net, batches())[-1]
        assert torch.equal(torch.rand(2), expected)
        return torch.as_tensor(last.prediction)

    assert torch.equal(found(0, 1), found(0, 2))
    assert not torch.equal(found(0, 1), found(1, 1))


def test_views_differ_from_step_to_step_but_not_between_a_step_and_its_measure() -> None:
    seen: list[float] = []

    def view(x: Tensor) -> Tensor:
        seen.append(float(torch.rand(())))
        return x

    net = network()
    adapter = adapter_of(CoTTA(views=2, augment=view, confidence=1.0), net, measure=False)
    run(adapter, net, batches(3))
    assert len(set(seen)) == len(seen) == 6
    method = CoTTA(views=2, augment=view, confidence=1.0)
    seen.clear()
    run(adapter_of(method, net), net, batches(3))
    unique = list(dict.fromkeys(seen))
    assert seen[:4] == [*unique[:2], *unique[2:4]]  # the step, and the measure after it
    assert seen[4:6] == seen[6:8] == unique[2:4]  # the next batch, of the source and for the step


def test_its_papers_settings_are_its_defaults() -> None:
    method = CoTTA()
    assert (method.views, method.confidence, method.restore) == (32, 0.92, 0.01)
    settings = TestTimeCallback(method).settings
    assert settings.moves == ("adam", 1e-3)
    assert (settings.anchor, settings.ema_decay, settings.parameters) == ("ema", 0.999, "all")
    assert (settings.norm_stats, settings.reset, settings.steps) == ("batch", "never", 1)


def test_a_configuration_names_it_and_its_views() -> None:
    method = from_yaml("CoTTA", views=4, augment=f"{jitter_and_warp.__module__}.jitter_and_warp")
    assert (type(method), method.views, method.augment) == (CoTTA, 4, jitter_and_warp)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one view, got 0"):
        CoTTA(views=0)
    with pytest.raises(ValueError, match=r"confidence in \[0, 1\], got 92"):
        CoTTA(confidence=92)
    with pytest.raises(ValueError, match=r"restore in \[0, 1\], got -0.1"):
        CoTTA(restore=-0.1)
    net = nn.Conv2d(1, 3, 1).double()
    with pytest.raises(ValueError, match=r"CoTTA needs one class vector .* got maps"):
        run(adapter_of(CoTTA(), net), net, batches(1))
