"""What methods carry from batch to batch where no weight moves, and what they see of layers."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from helpers.method_runs import adapted, adapter_of
from helpers.modules import stream, toy
from helpers.toy import IT3Net, LitNet, loader, parts, quiet, seeded
from torch import Tensor

from it3_lightning import TestTimeCallback
from it3_lightning.engine import Settings, adapt
from it3_lightning.methods import Entropy, Objective, Passes, Steps, TestTimeMethod

STREAM = stream(4)


def softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(1)


class Counts(TestTimeMethod):
    """Moves no weight; predicts how many samples it has seen, NaN where an input is above 100."""

    defaults: ClassVar[Mapping[str, Any]] = {"steps": 0, "reset": "never"}

    def __init__(self) -> None:
        self.seen = torch.zeros(())

    def loss(self, passes: Passes) -> Objective:
        return Entropy().loss(passes)

    def predict(self, passes: Passes) -> Tensor:
        self.seen = self.seen + len(passes.y0)
        bad = (passes.inputs > 100).any()
        return torch.full_like(passes.y0, torch.nan if bad else float(self.seen))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize(
    ("reset", "expected"), [("never", [6, 12, 18, 24]), ("batch", [6] * 4), (2, [6, 12, 6, 12])]
)
def test_a_state_goes_along_without_steps_and_refused_batches_are_not_in_it(
    reset: Any, expected: list[float]
) -> None:
    net, method = toy(), Counts()
    adapter = adapter_of(method, net, reset=reset)
    for x, count in zip(STREAM, expected, strict=True):
        found = adapted(adapter, net, x)
        assert found.prediction is not None
        assert set(found.prediction.flatten().tolist()) == {count}
        assert (found.backwards, found.forwards) == (0, 1)  # no weight has moved: measured once
        for bad, reason in ((x * torch.nan, "non-finite output"), (x + 200, "non-finite predic")):
            refused = adapted(adapter, net, bad)
            assert refused.reason is not None
            assert refused.reason.startswith(reason)
            assert refused.prediction is None
    adapter.restart()
    assert method.seen == 0


def test_one_batch_by_itself_leaves_no_state() -> None:
    net = toy()
    settings = Settings(objective=Counts(), steps=0, reset="never")
    for _ in range(2):
        found = adapt(
            net, STREAM[0], forward=lambda x, _: net(x), to_label=softmax, settings=settings
        )
        assert found.prediction is not None
        assert set(found.prediction.flatten().tolist()) == {6}


def test_a_state_begins_anew_with_each_dataloader_and_each_run() -> None:
    callback = TestTimeCallback(Counts())
    for module in (seeded(LitNet()), seeded(IT3Net(**parts()))):
        for _ in range(2):
            found: Any = quiet(callbacks=[callback]).predict(module, [loader(8), loader(8, 2)])
            counts = [[round(float(each.exp().mean())) for each in part] for part in found]
            assert counts == [[4, 8], [2, 4, 6, 8]]


class Looks(TestTimeMethod):
    """Notes what enters and leaves layers, in this pass and after a step."""

    layers = ("dense", "head")

    def __init__(self) -> None:
        self.found: list[list[Tensor]] = []

    def loss(self, passes: Passes) -> Objective:
        return Entropy().loss(passes)

    def step(self, passes: Passes, state: Steps) -> Objective:
        objective = super().step(passes, state)
        assert list(passes.layers) == ["dense", "head"]
        for each in (passes.again(), passes):
            given = each.features("head", entering=True), each.features("dense")
            self.found.append([*given, each.features("head"), each.outputs])
        return objective


def test_features_enter_and_leave_layers_in_the_pass_that_they_are_asked_of() -> None:
    net, own, x, method = toy(), toy(), STREAM[0], Looks()
    adapted(adapter_of(method, net, optimizer="sgd", lr=0.05), net, x)
    p = own(x).softmax(1)
    weights, loss = [*own.parameters()], -(p * p.log()).sum(1).mean()
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    with torch.no_grad():
        for found, rate in zip(method.found, (0.05, -0.05), strict=True):
            for w, g in zip(weights, gradients, strict=True):
                w.sub_(0 if g is None else rate * g)
            dense = own.dense(own.bn(own.conv(x)).relu().flatten(1))
            for ours, theirs in zip(found, (dense.relu(), dense, own(x), own(x)), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
