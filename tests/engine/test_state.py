"""State: what a batch that fails leaves of the weights, the optimizer, the anchor, the method."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.adapters import PUBLISHED, batch_adapter
from helpers.modules import images, same, stream, toy
from helpers.reference import forward_predict
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, BatchAdapter
from it3_lightning.methods import Objective, Passes, TestTimeMethod
from it3_lightning.methods.base import Steps


class Falters(TestTimeMethod):
    """Weighs each loss by the number of steps so far; some of the steps fail.

    Args:
        fails: numbers of these steps, in the order in which they are tried.
        error: that they raise; ``None``: their loss is not finite.
    """

    needs_prior = True

    def __init__(self, fails: list[int], error: BaseException | None = None) -> None:
        self.fails, self.error = fails, error
        self.taken, self.tried = 0, 0

    def loss(self, passes: Passes) -> Objective:
        return PUBLISHED(passes.y0, passes.second)

    def step(self, passes: Passes, state: Steps) -> Objective:
        objective, self.tried = self.loss(passes), self.tried + 1
        fails = self.tried in self.fails
        if fails and self.error is not None:
            raise self.error
        state.step(objective.loss() * (torch.nan if fails else 1 + self.taken))
        self.taken += 1
        return objective

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = state.get("taken", 0)


Found = tuple[Adaptation, list[Tensor]]


def adapted(by: BatchAdapter, net: nn.Module, x: Tensor) -> Found:
    """Adapt to a batch; return what came of it and the weights within."""
    with by.adapted(x) as adaptation:
        return adaptation, [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("anchor", "dtype"),
    [
        ("frozen", torch.float64),
        ("ema", torch.float64),
        ("ema", torch.bfloat16),
        ("live", torch.float64),
    ],
)
@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_a_batch_whose_later_step_fails_is_as_if_it_had_not_been(
    optimizer: str, anchor: str, dtype: torch.dtype, bad: int, error: BaseException | None
) -> None:
    def run(method: Falters, batches: list[Tensor]) -> list[Found | None]:
        net, found = toy().to(dtype), list[Found | None]()
        given: dict[str, Any] = {"optimizer": optimizer, "anchor": anchor, "ema_decay": 0.5}
        by = batch_adapter(net, objective=method, steps=3, lr=0.1, reset="never", **given)
        source = [p.detach().clone() for p in net.parameters()]
        for x in batches:
            try:
                found.append(adapted(by, net, x))
            except KeyboardInterrupt:
                found.append(None)
            assert same(zip(net.parameters(), source, strict=True))
        return found

    batches = [x.to(dtype) for x in stream(4)]
    last = 3 * bad + 3  # step of the bad batch
    found = run(Falters([last], error), batches)
    expected = run(Falters([]), batches[:bad] + batches[bad + 1 :])
    failed = found.pop(bad)
    if error is None:
        assert failed is not None
        assert (failed[0].reason, failed[0].backwards) == ("non-finite loss", 0)
        source = forward_predict(toy().to(dtype), batches[bad], None)
        assert same([(failed[0].outputs, source)])
    for good, alone in zip(found, expected, strict=True):
        assert good is not None
        assert alone is not None
        assert same(zip(good[1], alone[1], strict=True))
        pairs = [(good[0].outputs, alone[0].outputs)]
        pairs += [(good[0].distance_adapted, alone[0].distance_adapted)]
        assert same(pairs)


class StartsOver(Falters):
    """Goes back to the source in the middle of each step, as methods do that have collapsed."""

    def step(self, passes: Passes, state: Any) -> Objective:
        state.step(self.loss(passes).loss())
        state.reset()
        assert same((state.weights[name], state.source[name]) for name in state.source)
        return super().step(passes.again(), state)


@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
def test_a_method_that_goes_back_to_the_source_begins_anew(anchor: str) -> None:
    def run(method: Falters) -> list[Found]:
        net = toy()
        given: dict[str, Any] = {"optimizer": "adam", "anchor": anchor, "ema_decay": 0.5}
        by = batch_adapter(net, objective=method, steps=1, lr=0.1, reset="never", **given)
        return [adapted(by, net, images())]

    ((found, weights),), ((expected, theirs),) = run(StartsOver([])), run(Falters([]))
    assert found.backwards == 2
    assert same(zip(weights, theirs, strict=True))
    assert same([(found.distance_adapted, expected.distance_adapted)])


class GivesUp(Falters):
    """Goes back to the source after its first step."""

    def step(self, passes: Passes, state: Any) -> Objective:
        objective = super().step(passes, state)
        if self.taken == 1:
            state.reset()
        return objective


@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
def test_a_batch_after_which_the_source_is_back_leaves_nothing_to_the_next(anchor: str) -> None:
    net, (first, second) = toy(), stream(2)
    given: dict[str, Any] = {"anchor": anchor, "ema_decay": 0.5, "reset": "never", "lr": 0.1}
    by = batch_adapter(net, objective=GivesUp([]), **given)
    _, back = adapted(by, net, first)
    assert same(zip(back, net.parameters(), strict=True))
    found, weights = adapted(by, net, second)
    method = Falters([])
    method.taken = 1  # it weighs the loss by its steps
    expected, theirs = adapted(batch_adapter(net, objective=method, **given), net, second)
    assert same(zip(weights, theirs, strict=True))
    assert found.forwards == expected.forwards  # the source is measured by the first pass
    assert same([(found.distance_source, expected.distance_source)])


class Shakes(Falters):
    """Notes what comes of passes before, on, and after weights that are moved for a while."""

    def step(self, passes: Passes, state: Any) -> Objective:
        changes = {name: 0.25 * torch.ones_like(w) for name, w in state.weights.items()}
        self.seen = [passes.outputs.detach().clone()]
        with state.moved_by(changes):
            self.seen.append(passes.again().outputs.detach().clone())
        self.seen.append(passes.again().outputs.detach().clone())
        return super().step(passes, state)


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_are_moved_for_a_while_are_cast_anew(steps: int) -> None:
    net, x = toy().float(), images().float()
    moved = {name: p.detach() + 0.25 for name, p in net.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = net(x), torch.func.functional_call(net, moved, (x,))
    by = batch_adapter(net, objective=Shakes([]), steps=steps, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        adapted(by, net, x)
    method: Any = by._method
    before, within, after = method.seen
    assert same([(before, after)])
    assert not torch.equal(before, within)
    if steps == 1:
        assert same([(before, expected[0]), (within, expected[1])])


@pytest.mark.parametrize("reset", ["batch", 2])
def test_a_reset_takes_the_state_of_the_method_back(reset: Any) -> None:
    net, taken = toy(), []
    by = batch_adapter(net, objective=Falters([]), steps=2, reset=reset)
    for x in stream(4):
        adapted(by, net, x)
        taken.append(by._method.state_dict()["taken"])  # that of the adapter's own method
    assert taken == ([2, 2, 2, 2] if reset == "batch" else [2, 4, 2, 4])


@pytest.mark.parametrize("steps", [1, 2])
def test_parameters_without_influence_are_refused_where_others_have_some(steps: int) -> None:
    net, outside = toy(), nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        return forward_predict(net, x, prior) * outside

    by = batch_adapter(net, forward, steps=steps, parameters=["embed.*"], anchor="frozen")
    with pytest.raises(ValueError, match=r"influences the neutral prediction: embed.weight"):
        adapted(by, net, images())


def test_a_step_too_small_to_be_seen_is_no_matter_in_full_precision() -> None:
    net = toy().float()
    by = batch_adapter(net, optimizer="sgd", lr=1e-30)
    found, weights = adapted(by, net, images().float())
    assert found.reason is None
    assert same(zip(weights, net.parameters(), strict=True))


def test_gradients_of_training_are_away_in_passes_and_back_afterwards() -> None:
    net, seen = toy(), list[Tensor | None]()
    gradients = [torch.ones_like(parameter) for parameter in net.parameters()]
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        seen.extend(parameter.grad for parameter in net.parameters())
        return forward_predict(net, x, prior)

    adapted(batch_adapter(net, forward, parameters=["head.*"]), net, images())
    assert set(seen) == {None}
    assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
