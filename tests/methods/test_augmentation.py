"""Test-time augmentation: the mean over views of plain torch; what is drawn is seeded."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_runs import (
    adapted,
    adapter_of,
    batches,
    from_yaml,
    plain_module,
    predicted,
    run,
)
from helpers.modules import same, toy
from torch import Tensor, nn
from torchvision.transforms import v2

from it3_lightning import TestTimeAugmentation, TestTimeCallback
from it3_lightning.engine import BatchAdapter, Settings

VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x + 0.3,
    lambda x: x.flip(-1),
    lambda x: 0.5 * x,
]


@torch.no_grad()
def by_hand(net: nn.Module, x: Tensor) -> Tensor:
    found = [net(view(x)).softmax(1) for view in VIEWS]
    return torch.stack([net(x).softmax(1), *found]).mean(0)


def test_predictions_are_the_mean_over_the_input_and_its_views() -> None:
    net, stream = toy(), batches()
    weights = {name: weight.clone() for name, weight in net.named_parameters()}
    adapter = adapter_of(TestTimeAugmentation(VIEWS), net)
    for ours, x in zip(run(adapter, net, stream), stream, strict=True):
        torch.testing.assert_close(ours.prediction, by_hand(net, x), rtol=0, atol=1e-12)
        p = net(x).softmax(1)
        torch.testing.assert_close(ours.distance_adapted, -(p * p.log()).sum(1), check_stride=False)
        assert (ours.backwards, ours.forwards) == (0, 4)
    assert same((dict(net.named_parameters())[n].data, weight) for n, weight in weights.items())


def test_an_untouched_module_predicts_by_it() -> None:
    module, stream = plain_module(), batches(3)
    (found,) = predicted(TestTimeCallback(TestTimeAugmentation(VIEWS)), module, stream)
    for logits, x in zip(found, stream, strict=True):
        torch.testing.assert_close(logits.softmax(1), by_hand(module.net, x), rtol=0, atol=1e-10)


def test_the_default_views_are_the_mirrored_images_and_eight_crops() -> None:
    net, x = toy(), batches(1)[0]
    seen: list[Tensor] = []
    net.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    found = adapted(adapter_of(TestTimeAugmentation(), net), net, x)
    views = seen[1:]
    assert len(views) == 9
    assert same([(seen[0], x), (views[0], x.flip(-1))])
    mean = torch.stack([net(view).softmax(1) for view in (x, *views)]).mean(0)
    torch.testing.assert_close(found.prediction, mean.detach(), rtol=0, atol=1e-12)


class Draws:
    """A view that draws from every generator of the process."""

    def __call__(self, x: Tensor) -> Tensor:
        return x + torch.rand(()) + random.random() + np.random.rand()


def drawn(seed: int, x: Tensor, net: nn.Module) -> Tensor:
    method = TestTimeAugmentation([Draws(), v2.RandomResizedCrop(4, (0.2, 0.9))], seed)
    prediction = adapted(adapter_of(method, net), net, x).prediction
    assert prediction is not None
    return prediction


def test_the_same_seed_draws_the_same_views_whatever_was_drawn_before() -> None:
    net, x = toy(), batches(1)[0]
    first = drawn(0, x, net)
    torch.rand(3), random.random(), np.random.rand()
    assert same([(first, drawn(0, x, net))])
    assert not torch.allclose(first, drawn(1, x, net), atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch_though_views_are_random() -> None:
    net, x = toy(), batches(1)[0]
    singles = torch.cat([drawn(0, each[None], net) for each in x])
    torch.testing.assert_close(drawn(0, x, net), singles, rtol=0, atol=1e-12)


def test_predicting_disturbs_no_generator_though_nobody_else_puts_them_back() -> None:
    net, x = toy(), batches(1)[0]

    class Asks:
        inputs, y0 = x, net(x).softmax(1)

        def other(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = net(inputs).softmax(1)
            return outputs

    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    passes: Any = Asks()
    TestTimeAugmentation([Draws()]).predict(passes)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == repr(np.random.get_state())


def test_maps_are_averaged_over_views_that_leave_positions_where_they_are() -> None:
    net, x = nn.Conv2d(1, 3, 1).double(), batches(1)[0]
    found = adapted(adapter_of(TestTimeAugmentation([lambda x: 2 * x]), net), net, x)
    mean = (net(x).softmax(1) + net(2 * x).softmax(1)) / 2
    torch.testing.assert_close(found.prediction, mean.detach(), rtol=0, atol=1e-12)


def test_its_settings_move_no_weight() -> None:
    settings = TestTimeCallback(TestTimeAugmentation()).settings
    assert (settings.steps, settings.scope, settings.needs_batch) == (0, "batch", False)


def test_a_configuration_names_transforms_of_torchvision() -> None:
    flip = {
        "class_path": "torchvision.transforms.v2.RandomHorizontalFlip",
        "init_args": {"p": 1.0},
    }
    method = from_yaml("TestTimeAugmentation", views=[flip], seed=3)
    assert method.seed == 3
    x = batches(1)[0]
    assert same([(method.views[0](x), x.flip(-1))])


def test_bad_settings_and_what_default_views_are_not_for_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected at least one view, got none"):
        TestTimeAugmentation([])

    def predict(net: nn.Module, x: Tensor) -> None:
        settings = Settings(objective=TestTimeAugmentation(), steps=0)
        adapted(BatchAdapter(net, lambda x, _: net(x), lambda y: y, settings), net, x)

    with pytest.raises(ValueError, match="TestTimeAugmentation needs class probabilities"):
        predict(nn.Linear(2, 1), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"default views needs one class vector \(B, C\)"):
        predict(nn.Conv2d(1, 2, 1), torch.ones(2, 1, 2, 2))
    with pytest.raises(ValueError, match=r"are of images \(B, C, H, W\), and there are none"):
        predict(nn.Linear(2, 2), torch.ones(2, 2))
