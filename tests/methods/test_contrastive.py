"""TTT++: agreement with a plain implementation of its paper, and SimCLR's task in training.

The paper's public code has the same contrastive loss (temperature 0.5), covariances (``n - 1``) and
queue (256); it scales the alignment by what it is of the source data with themselves.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.auxiliary import TTTNet, adapter_of, body, descend, headed, run, with_refused
from helpers.modules import bits, changed, stream
from helpers.toy import differing, doubles, everything, loader, quiet, samples, seeded
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning import Contrastive, Rotation, TestTimeCallback, TTTPlusPlus
from it3_lightning.engine import BatchAdapter
from it3_lightning.methods.contrastive import crop_flip_and_light

LR, TEMPERATURE, QUEUE = 0.02, 0.7, 8


class Brighter(Contrastive):
    """Views that anyone can repeat: each image brighter by a number that is drawn."""

    def view(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return images + torch.rand(len(images), 1, 1, 1, generator=generator).to(images)


def task(layer: str = "dense") -> Brighter:
    return Brighter(layer, channels=8, hidden=5, projection=4, temperature=TEMPERATURE)


def nt_xent(features: Callable[[Tensor], Tensor], head: nn.Module, views: list[Tensor]) -> Tensor:
    """SimCLR's loss, one ordered pair after the other."""
    z = [F.normalize(row, dim=0) for view in views for row in head(features(view))]
    count, losses = len(views[0]), []
    for i in range(2 * count):
        alike = [(z[i] @ other / TEMPERATURE).exp() for other in z]
        pair = alike[(i + count) % (2 * count)]
        losses.append(-(pair / (sum(alike) - alike[i])).log())
    return torch.stack(losses).mean()


def views_of(x: Tensor, generator: torch.Generator | None) -> list[Tensor]:
    return [x + torch.rand(len(x), 1, 1, 1, generator=generator).to(x) for _ in range(2)]


class ByHand:
    """TTT++ as its paper has it, over a stream."""

    def __init__(self, net: nn.Module, source: Tensor, weight: float, lr: float = LR) -> None:
        self.net, self.weight, self.lr = net, weight, lr
        features = body(net)[1](source).detach()
        self.mean, self.covariance = features.mean(0), torch.cov(features.T)
        self.reset()

    def reset(self) -> None:
        self.own, self.features, self.weights = body(self.net)
        self.queue: list[Tensor] = []
        self.taken = 0

    def __call__(self, x: Tensor, steps: int) -> Tensor:
        head: Any = self.own.it3_auxiliary
        for _ in range(steps):
            views = views_of(x, torch.Generator().manual_seed(self.taken))
            loss = nt_xent(self.features, head.head, views)
            rows = torch.cat([self.features(x), *(row[None] for row in self.queue)])
            centred = rows - rows.mean(0)
            covariance = centred.T @ centred / (len(rows) - 1)
            apart = ((rows.mean(0) - self.mean) ** 2).sum()
            spread = ((covariance - self.covariance) ** 2).sum()
            descend(loss + self.weight * (apart + spread), self.weights, self.lr)
            self.taken += 1
        self.queue = [*self.queue, *self.features(x).detach()][-QUEUE:]
        outputs: Tensor = self.own(x).detach()
        return outputs


def shown(net: nn.Module, method: TTTPlusPlus, **settings: Any) -> tuple[BatchAdapter, Tensor]:
    """Return an adapter whose method has seen three batches of source data, and these."""
    source = [2 * x for x in stream(3)]
    adapter = adapter_of(net, method, lr=LR, **settings)
    for x in source:
        adapter.fit_source(x)
    return adapter, torch.cat(source)


@pytest.mark.parametrize("reset", ["never", "batch", 2])
@pytest.mark.parametrize(("weight", "steps"), [(1.0, 1), (0.3, 2)])
def test_every_batch_adapts_as_in_the_paper_and_after_one_that_was_refused(
    reset: Any, weight: float, steps: int
) -> None:
    net = headed(task())
    method, before = TTTPlusPlus(alignment=weight, queue=QUEUE), bits(net)
    adapter, source = shown(net, method, reset=reset, steps=steps)
    by_hand = ByHand(net, source, weight)
    batches, bad = with_refused(4)
    seen = 0
    for x in batches:
        state = torch.get_rng_state()
        found = run(adapter, x, net)
        assert torch.equal(state, torch.get_rng_state())
        if bad(x):
            assert found.reason == "non-finite output"
            continue
        if reset == "batch" or (reset == 2 and seen % 2 == 0):
            by_hand.reset()
        seen += 1
        torch.testing.assert_close(found.outputs, by_hand(x, steps), rtol=0, atol=1e-9)
        recent = adapter._method.state_dict()["recent"]
        torch.testing.assert_close(recent, torch.stack(by_hand.queue), rtol=0, atol=1e-9)
    assert changed(before, net) == []


def test_without_a_queue_the_batch_stands_alone() -> None:
    net, method = headed(task()), TTTPlusPlus(queue=0)
    adapter, _ = shown(net, method, reset="never")
    run(adapter, stream(1)[0], net)
    assert adapter._method.state_dict()["recent"].shape == (0, 8)
    assert run(adapter, stream(2)[1], net).reason is None


class Validates(TTTNet):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def test_under_a_trainer_source_data_come_from_a_validation_and_the_module_stays() -> None:
    with doubles():
        module = seeded(Validates(auxiliary=task("net.dense"))).eval()
        quiet().predict(module, loader(4))  # a Trainer leaves something of its own
        before = everything(module)
        method = TTTPlusPlus(queue=QUEUE)
        callback = TestTimeCallback(method, optimizer="sgd", lr=1e-4, norm_stats="source")
        trainer = quiet(callbacks=[callback])
        with pytest.raises(MisconfigurationException, match="has seen nothing yet"):
            trainer.predict(module, loader(8))
        trainer.validate(module, loader(12, seed=3), verbose=False)
        found: Any = [trainer.predict(module, loader(12)) for _ in range(2)]
        assert differing(before, everything(module)) == []
        module.net.it3_auxiliary = module.it3_auxiliary  # where `body` looks for it
        by_hand = ByHand(module.net, samples(12, seed=3)[0], 1.0, lr=1e-4)
        expected = torch.cat([by_hand(x, 1) for x, _ in loader(12)])
    for each in found:  # the second run begins anew
        torch.testing.assert_close(torch.cat(each), expected, rtol=0, atol=1e-9)


def test_fitting_minimises_the_contrastive_loss_too() -> None:
    with doubles():
        module = seeded(TTTNet(auxiliary=task("net.dense"))).train()
        net, x = module.net, samples(4)[0]

        def features(both: Tensor) -> Tensor:
            dense: Tensor = net.dense(net.bn(net.conv(both)).relu().flatten(1))
            return dense

        def rows(view: Tensor) -> Tensor:  # BatchNorm sees both views at once
            return both[:4] if view is views[0] else both[4:]

        torch.manual_seed(0)
        found = module.it3_auxiliary_loss((x, None))
        torch.manual_seed(0)
        views = views_of(x, None)
        both = features(torch.cat(views))
        expected = nt_xent(rows, module.it3_auxiliary.head, views)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_views_are_parts_of_the_image_in_another_light_and_the_same_for_a_seed() -> None:
    images = torch.rand(64, 3, 8, 8, dtype=torch.float64)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, again, other = (crop_flip_and_light(images, seed) for seed in seeds)
    assert torch.equal(first, again)
    assert first.shape == images.shape
    assert (first != other).flatten(1).any(1).all()
    flat = torch.full((64, 1, 8, 8), 0.5)
    lit = crop_flip_and_light(flat, seeds[0])  # an even image stays so
    torch.testing.assert_close(lit, lit[:, :, :1, :1].expand_as(lit))
    assert 0.3 <= lit.min() < 0.35 < 0.65 < lit.max() <= 0.7
    ramp = torch.linspace(-1, 1, 8).expand(64, 1, 8, 8)
    slope = crop_flip_and_light(ramp, seeds[0]).diff(dim=3).mean((1, 2, 3))
    assert 16 < (slope < 0).sum() < 48  # about half of them are mirrored


def test_its_papers_settings_are_its_defaults_and_bad_ones_are_refused() -> None:
    settings = TestTimeCallback(TTTPlusPlus()).settings
    assert (settings.scope, settings.reset, settings.steps) == ("batch", "never", 1)
    assert (settings.norm_stats, settings.moves) == ("batch", ("momentum", 1e-3))
    assert (TTTPlusPlus().queue, Contrastive("layer", 8).temperature) == (256, 0.5)
    for bad in ({"alignment": -1.0}, {"queue": -1}):
        with pytest.raises(ValueError, match="Expected alignment >= 0 and queue >= 0"):
            TTTPlusPlus(**bad)
    with pytest.raises(ValueError, match="Expected temperature > 0"):
        Contrastive("layer", 8, temperature=0.0)
    with pytest.raises(ValueError, match="scope='sample' adapts to each sample alone"):
        TestTimeCallback(TTTPlusPlus(), scope="sample", norm_stats="source")
    with pytest.raises(ValueError, match="head, Contrastive, and ToyNet has a Rotation"):
        adapter_of(headed(Rotation("dense", 8)), TTTPlusPlus())
    net = headed(task())
    with pytest.raises(ValueError, match="must have seen at least two samples of source data"):
        run(adapter_of(net, TTTPlusPlus()), stream(1)[0], net)


def test_one_sample_alone_keeps_the_source_prediction() -> None:
    net = headed(task())
    adapter, _ = shown(net, TTTPlusPlus())
    found = run(adapter, stream(1)[0][:1], net)
    assert found.reason == "batch statistics and batch terms need at least two samples"
