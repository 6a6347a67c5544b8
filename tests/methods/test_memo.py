"""MEMO: agreement with a plain implementation of its paper, on untouched modules too."""

import copy
from typing import Any

import pytest
import torch
from helpers.modules import SHIFTS, Brighter
from helpers.reference import ToyNet
from helpers.toy import LitNet, differing, everything, loader, quiet, samples, seeded
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from it3_lightning import MEMO, TestTimeCallback
from it3_lightning.engine import Settings, adapt


def by_hand(net: nn.Module, images: Tensor, lr: float, steps: int = 1) -> Tensor:
    """MEMO as its paper has it: for each input, step on the entropy of the mean, then predict."""
    outputs = []
    for image in images:
        own = copy.deepcopy(net).eval()
        optimizer = torch.optim.SGD(own.parameters(), lr=lr)
        for _ in range(steps):
            views = torch.stack([image + shift for shift in SHIFTS])
            mean = own(views).softmax(1).mean(0)
            loss = -(mean * mean.log()).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        outputs.append(own(image[None])[0])
    return torch.stack(outputs).detach()


def double() -> nn.Module:
    net: nn.Module = seeded(ToyNet()).double().eval()
    return net


@pytest.mark.parametrize("steps", [1, 3])
def test_every_input_adapts_as_in_the_paper(steps: int) -> None:
    net, images = double(), samples(5)[0].double()
    expected = by_hand(net, images, lr=0.05, steps=steps)
    settings = Settings(
        objective=MEMO(views=3, augment=Brighter()),
        scope="sample",
        optimizer="sgd",
        lr=0.05,
        steps=steps,
        backend="loop",
    )

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        assert prior is None  # it asks for no second prediction
        outputs: Tensor = net(x)
        return outputs

    found = adapt(net, images, forward=forward, to_label=lambda y: y.softmax(1), settings=settings)
    torch.testing.assert_close(found.outputs, expected, rtol=0, atol=1e-10)
    mean = torch.stack([net(images + shift).softmax(1) for shift in SHIFTS]).mean(0)
    entropy = -(mean * mean.log()).sum(1)
    torch.testing.assert_close(found.distance_source, entropy.detach(), rtol=0, atol=1e-10)
    assert (found.forwards, found.backwards) == (5 * (steps + 1) * (1 + 3), 5 * steps)


def test_an_untouched_module_predicts_adapted_and_is_left_as_it_was() -> None:
    module = seeded(LitNet()).double()
    data = loader(8)
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])  # type: ignore[attr-defined]
    quiet().predict(module, data)  # a Trainer leaves something of its own
    before = everything(module)
    callback = TestTimeCallback(MEMO(views=3, augment=Brighter()), lr=0.05)
    found = torch.cat(quiet(callbacks=[callback]).predict(module, data))  # type: ignore[arg-type]
    assert differing(before, everything(module)) == []
    expected = by_hand(module.net, data.dataset.tensors[0], lr=0.05)  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert callback.summary.samples == callback.summary.moved == 8


def test_its_papers_settings_are_its_defaults_and_can_be_changed() -> None:
    settings = TestTimeCallback(MEMO()).settings
    assert (settings.scope, settings.reset, settings.steps) == ("sample", "batch", 1)
    assert settings.moves == ("sgd", 5e-3)
    assert TestTimeCallback(MEMO(), lr=0.1, steps=2).settings.moves == ("sgd", 0.1)


def test_a_sample_does_not_depend_on_its_batch_though_views_are_random() -> None:
    module: LightningModule = seeded(LitNet())

    def predicted(batch: int) -> Tensor:
        trainer = quiet(callbacks=[TestTimeCallback(MEMO(views=4), lr=0.05)])
        torch.manual_seed(0)
        found: Any = trainer.predict(module, loader(6, batch=batch))
        return torch.cat(found)

    torch.testing.assert_close(predicted(6), predicted(1), rtol=0, atol=1e-6)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one view, got 0"):
        MEMO(views=0)
    net, settings = nn.Linear(1, 1), Settings(objective=MEMO(), scope="sample")

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net(x)
        return outputs

    with pytest.raises(ValueError, match="MEMO needs class probabilities"):
        adapt(net, torch.ones(2, 1), forward=forward, to_label=lambda y: y, settings=settings)
