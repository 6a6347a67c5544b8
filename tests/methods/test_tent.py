"""Tent with its paper's settings, on an untouched module, against a plain implementation."""

import copy
from typing import Any

import pytest
import torch
from helpers.modules import predictions
from helpers.reference import entropy_objective
from helpers.toy import IT3Net, LitNet, differing, everything, loader, parts, quiet, samples, seeded
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from it3_lightning import Tent, TestTimeCallback
from it3_lightning.methods import Entropy


def by_hand(module: LitNet, batches: list[Tensor], lr: float) -> list[Tensor]:
    """Tent as its paper has it: batch statistics, scale and shift, Adam, online; after the step."""
    net = copy.deepcopy(module.net).eval()
    norm = net.bn
    norm.running_mean = norm.running_var = None
    optimizer = torch.optim.Adam(norm.parameters(), lr=lr)
    found = []
    for batch in batches:
        probabilities = net(batch).softmax(1)
        loss = -(probabilities * probabilities.log()).sum(1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        found.append(net(batch).detach())
    return found


def test_an_untouched_module_adapts_online_as_in_the_paper() -> None:
    module: Any = seeded(LitNet()).double()
    data = loader(12, batch=4)
    data.dataset.tensors = (samples(12)[0].double(), samples(12)[1])  # type: ignore[attr-defined]
    quiet().predict(module, data)  # a Trainer leaves something of its own
    before = everything(module)
    callback = TestTimeCallback(Tent())
    found: Any = quiet(callbacks=[callback]).predict(module, data)
    assert differing(before, everything(module)) == []
    expected = by_hand(module, list(samples(12)[0].double().reshape(3, 4, 1, 4, 4)), lr=1e-3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_the_entropy_falls_along_the_stream() -> None:
    module = seeded(LitNet())
    callback = TestTimeCallback(Tent(), lr=0.05)
    quiet(callbacks=[callback]).test(module, loader(12, batch=4), verbose=False)
    assert callback.summary.distance_adapted < callback.summary.distance_source


def test_its_papers_settings_are_its_defaults() -> None:
    settings = TestTimeCallback(Tent()).settings
    assert (settings.parameters, settings.norm_stats, settings.reset) == ("norm", "batch", "never")
    assert settings.moves == ("adam", 1e-3)
    assert TestTimeCallback(Tent(), reset="batch").settings.episodic


def test_a_module_with_a_prior_takes_it_too() -> None:
    plain, model = seeded(LitNet()), seeded(IT3Net(**parts()))
    model.net.load_state_dict(plain.net.state_dict())
    both = [
        quiet(callbacks=[TestTimeCallback(Tent())]).predict(module, loader(8))
        for module in (plain, model)
    ]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_predict_is_told_before_any_batch() -> None:
    class NoForward(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.BatchNorm1d(1)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError("a batch was run")

    with pytest.raises(MisconfigurationException, match=r"no forward.*Give it one"):
        quiet(callbacks=[TestTimeCallback(Tent())]).test(NoForward(), loader(), verbose=False)


def test_a_prediction_that_needs_a_prior_is_refused() -> None:
    callback = TestTimeCallback(Tent(), prediction="second")
    with pytest.raises(MisconfigurationException, match="module that predicts with a prior"):
        quiet(callbacks=[callback]).test(seeded(LitNet()), loader(), verbose=False)


def test_probabilities_are_taken_as_they_are() -> None:
    class Puts(LitNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    logits, probabilities = seeded(LitNet()), seeded(Puts())
    found = []
    for module, outputs in ((logits, "logits"), (probabilities, "probabilities")):
        callback = TestTimeCallback(Tent(), outputs=outputs)  # type: ignore[arg-type]
        quiet(callbacks=[callback]).predict(module, loader(8))
        found.append(callback.summary.distance_source)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("reliability", [None, 0.6])
@pytest.mark.parametrize("balance", [0.0, 0.3])
def test_entropy_equals_the_reference_and_asks_for_no_second_pass(
    reliability: float | None, balance: float
) -> None:
    p0 = predictions(40, 3)

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError

    found = Entropy(reliability, balance)(p0, refuse)
    expected = entropy_objective(p0, reliability, balance)
    torch.testing.assert_close(found.loss(), expected, rtol=0, atol=1e-12)
