"""TTT: agreement with a plain implementation of its paper, on the rotation of the image.

``torch-ttt`` 0.0.2 has the same loss over four copies; its head moves along at test time, too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.auxiliary import TTTNet, adapter_of, body, descend, headed, run, with_refused
from helpers.modules import bits, changed, stream
from helpers.toy import LitNet, differing, doubles, everything, loader, quiet, seeded
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning import TTT, Auxiliary, Rotation, TestTimeCallback
from it3_lightning.engine import Settings

LR = 0.05


def rotation_loss(features: Callable[[Tensor], Tensor], head: nn.Module, x: Tensor) -> Tensor:
    """The cross-entropy of telling 0, 90, 180 and 270 degrees apart, one copy after the other."""
    turned = x
    losses = []
    for quarter in range(4):
        logits = head(features(turned))
        losses.append(F.cross_entropy(logits, torch.full((len(x),), quarter)))
        turned = turned.transpose(2, 3).flip(2)  # a quarter turn against the clock
    return torch.stack(losses).mean()


def by_hand(net: nn.Module, x: Tensor, steps: int) -> Tensor:
    own, features, weights = body(net)
    head: Any = own.it3_auxiliary
    for _ in range(steps):
        descend(rotation_loss(features, head.head, x), weights, LR)
    outputs: Tensor = own(x).detach()
    return outputs


@pytest.fixture
def net() -> nn.Module:
    return headed(Rotation("dense", channels=8, hidden=5))


@pytest.mark.parametrize("steps", [1, 3])
def test_every_batch_adapts_as_in_the_paper_and_after_one_that_was_refused(
    net: nn.Module, steps: int
) -> None:
    adapter, before = adapter_of(net, TTT(), steps=steps), bits(net)
    batches, bad = with_refused(3)
    for x in batches:
        found = run(adapter, x, net)
        if bad(x):
            assert found.reason == "non-finite output"
            continue
        torch.testing.assert_close(found.outputs, by_hand(net, x, steps), rtol=0, atol=1e-10)
        _, features, _ = body(net)
        expected = rotation_loss(features, net.get_submodule("it3_auxiliary.head"), x)
        assert found.distance_source is not None
        torch.testing.assert_close(found.distance_source.mean(), expected.detach())
    assert changed(before, net) == []


@pytest.mark.parametrize("reset", ["never", 2])
def test_online_the_weights_are_carried_over_a_refused_batch(net: nn.Module, reset: Any) -> None:
    adapter = adapter_of(net, TTT(), reset=reset)
    batches, bad = with_refused(4)
    own, features, weights = body(net)
    seen = 0
    for x in batches:
        found = run(adapter, x, net)
        if bad(x):
            continue
        if reset == 2 and seen % 2 == 0:
            own, features, weights = body(net)
        seen += 1
        head: Any = own.it3_auxiliary
        descend(rotation_loss(features, head.head, x), weights, LR)
        torch.testing.assert_close(found.outputs, own(x).detach(), rtol=0, atol=1e-10)


def test_what_comes_after_the_layer_and_the_head_stay_as_they_were(net: nn.Module) -> None:
    found = run(adapter_of(net, TTT()), stream(1)[0], net)
    source = dict(net.named_parameters())
    moved = {n for n, w in found.weights.items() if not torch.equal(w, source[n])}
    assert moved == {f"{part}.{kind}" for part in ("conv", "bn", "dense") for kind in WEIGHTS}
    assert not any(name.startswith("it3_") for name in found.weights)


WEIGHTS = ("weight", "bias")


def test_a_trained_module_adapts_to_each_sample_and_is_left_as_it_was() -> None:
    with doubles():
        module = seeded(TTTNet(auxiliary=Rotation("net.dense", 8, hidden=5)))
        data = loader(6, batch=3)
        quiet().predict(module, data)  # a Trainer leaves something of its own
        before = everything(module)
        callback = TestTimeCallback(TTT(), lr=LR, steps=2)
        found: Any = torch.cat(quiet(callbacks=[callback]).predict(module, data))  # type: ignore[arg-type]
        assert differing(before, everything(module)) == []
        module.net.it3_auxiliary = module.it3_auxiliary  # where `body` looks for it
        images = data.dataset.tensors[0]  # type: ignore[attr-defined]
        expected = torch.cat([by_hand(module.net.eval(), x[None], 2) for x in images])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert callback.summary.samples == callback.summary.moved == 6


class Brightness(Auxiliary):
    """A task of one's own: tell how much was added, which is drawn."""

    def __init__(self) -> None:
        super().__init__("dense", 8)
        self.head = nn.Linear(8, 1)

    def init_args(self) -> dict[str, Any]:
        return {}

    def forward(
        self, inputs: Any, features: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        added = torch.rand(len(inputs), 1, 1, 1, generator=generator).to(inputs)
        told = self.head(self.pooled(features(inputs + added)))
        loss: Tensor = (told - added.flatten(1)).square().mean(1)
        return loss


@pytest.mark.parametrize("seed", [0, 7])
def test_a_task_of_ones_own_draws_anew_at_each_step_and_the_same_in_each_run(seed: int) -> None:
    net, method = headed(Brightness()), TTT(seed=seed)
    for _ in range(2):  # two runs of the same method
        adapter = adapter_of(net, method, steps=2, reset="never")
        own, features, weights = body(net)
        task: Any = own.it3_auxiliary
        batches, bad = with_refused(2)
        taken = 0
        for x in batches:
            before = torch.get_rng_state()
            found = run(adapter, x, net)
            assert torch.equal(before, torch.get_rng_state())
            if bad(x):
                continue
            for _ in range(2):
                generator = torch.Generator().manual_seed(seed + taken)
                added = torch.rand(len(x), 1, 1, 1, generator=generator).to(x)
                error = task.head(features(x + added)) - added.flatten(1)
                descend(error.square().mean(), weights, LR)
                taken += 1
            torch.testing.assert_close(found.outputs, own(x).detach(), rtol=0, atol=1e-10)


def test_its_papers_settings_are_its_defaults() -> None:
    settings = TestTimeCallback(TTT()).settings
    assert (settings.scope, settings.reset, settings.steps) == ("sample", "batch", 10)
    assert settings.moves == ("sgd", 1e-3)
    online = TestTimeCallback(TTT(), scope="batch", reset="never", steps=1).settings
    assert (online.scope, online.steps, online.moves) == ("batch", 1, ("sgd", 1e-3))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (LitNet(), "TTT needs a module with an auxiliary head, Auxiliary, and LitNet has none"),
        (TTTNet(), "TTTNet has none. Train it with one"),
        (TTTNet(auxiliary=Rotation("net.dens", 8)), "Unknown layer 'net.dens'. Did you mean"),
    ],
)
def test_a_module_without_a_fitting_head_is_refused_before_any_batch(
    module: Any, message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        quiet(callbacks=[TestTimeCallback(TTT())]).predict(module, loader(4))


@pytest.mark.parametrize(
    ("layer", "channels", "shape", "message"),
    [
        ("dense", 9, (2, 1, 4, 4), r"put out features \(B, 9\), .*got \(8, 8\)"),
        ("dense", 8, (2, 1, 4, 3), "needs square images"),
        ("dense", 8, (2, 16), r"needs floating images \(B, C, H, W\)"),
    ],
)
def test_features_and_images_that_do_not_fit_are_refused(
    layer: str, channels: int, shape: tuple[int, ...], message: str
) -> None:
    head = Rotation(layer, channels)
    with pytest.raises(ValueError, match=message):
        head(torch.ones(shape), lambda views: torch.ones(len(views), 8))


def test_features_of_every_layout_are_averaged_over_positions() -> None:
    head = Rotation("layer", 3)
    x = torch.rand(2, 3, 4, 5)
    expected = x.mean((2, 3))
    tokens = x.flatten(2).transpose(1, 2)
    for given in (x, tokens, x.movedim(1, -1), (expected, None)):
        torch.testing.assert_close(head.pooled(given), expected)
    with pytest.raises(ValueError, match="Expected channels >= 1"):
        Rotation("layer", 0)
    with pytest.raises(ValueError, match="TTT takes steps of its own"):
        Settings(objective=TTT(), gate=0.5)
