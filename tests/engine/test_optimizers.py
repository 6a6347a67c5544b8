"""The step as long as the distance asks for, against plain torch: batches, samples, streams."""

import copy
from typing import Any, TypeVar

import pytest
import torch
from helpers.modules import Conditioned, drawn, images, takes_prior, toy
from helpers.reference import softmax_label
from torch import Tensor, nn

from it3_lightning import IT3TestTimeCallback
from it3_lightning.engine import Adaptation, BatchAdapter, SampleAdapter, Settings
from it3_lightning.methods import Idempotence, Objective, SecondPass

Net = TypeVar("Net", bound=nn.Module)


class Scaled:
    """The squared distance in other units."""

    needs_batch = False

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, y0: Tensor, second: SecondPass) -> Objective:
        measure = self.factor * (y0 - second(y0)).square().sum(1)
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))


def settings(**given: Any) -> Settings:
    published = {"objective": Idempotence("l2", None), "optimizer": "polyak", "lr": 0.5}
    return Settings(**{**published, **given})


def adapted(net: nn.Module, x: Tensor, **given: Any) -> Adaptation:
    kind: Any = SampleAdapter if given.get("scope") == "sample" else BatchAdapter
    made = kind(net, takes_prior(net), softmax_label, settings(**given))
    with made.adapted(x) as adaptation:
        found: Adaptation = adaptation
        return found


def by_hand(source: Net, x: Tensor, *, share: float = 0.5, steps: int = 1) -> Net:
    """The formula, on copies."""
    net, anchor = copy.deepcopy(source), copy.deepcopy(source).requires_grad_(False)
    for _ in range(steps):
        y0 = softmax_label(net(x, None))
        loss = (y0 - softmax_label(anchor(x, y0))).square().sum(1).mean()
        net.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        moving = [p for p in net.parameters() if p.grad is not None]
        square = sum(float(p.grad.square().sum()) for p in moving if p.grad is not None)
        norm = sum(float(p.detach().square().sum()) for p in net.parameters()) ** 0.5
        scale = min(share * loss.item() / square, 0.001 * norm / square**0.5)
        for parameter in moving:
            assert parameter.grad is not None
            parameter.data -= scale * parameter.grad
    return net


class Views(nn.Module):
    """Weights that enter as views of one sum, so that their gradients share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8, bias=False)
        self.one, self.other = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        added = self.one.view(1, 8) + self.other.view(1, 8)
        features: Tensor = self.layer(x.flatten(1)) + added
        return features.tanh()


def test_gradients_that_share_memory_move_each_weight_by_its_own() -> None:
    net, x = drawn(Conditioned(Views())), images()
    expected, adaptation = by_hand(net, x), adapted(net, x)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(adaptation.weights[name], parameter.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_of_a_network_in_half_precision_are_vectorised(dtype: torch.dtype) -> None:
    net, x = toy().to(dtype), images().to(dtype)
    found = adapted(net, x, scope="sample", backend="vectorised")  # a warning would be an error
    expected = adapted(net, x, scope="sample", backend="loop")
    assert found.outputs is not None
    assert found.outputs.dtype == dtype
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=0, atol=0.05)


@pytest.mark.parametrize("share", [0.01, 0.5])  # the longer one is cut off
@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_is_that_of_the_formula(share: float, steps: int) -> None:
    net, x = toy(), images()
    expected = by_hand(net, x, share=share, steps=steps)
    adaptation = adapted(net, x, lr=share, steps=steps)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(adaptation.weights[name], parameter.detach(), rtol=0, atol=1e-12)
    assert adaptation.distance_source is not None
    assert adaptation.distance_adapted is not None
    assert adaptation.distance_adapted.mean() < adaptation.distance_source.mean()


def test_a_short_step_takes_its_share_of_the_distance_away() -> None:
    adaptation = adapted(toy(), images(), lr=0.01)
    assert adaptation.distance_source is not None
    assert adaptation.distance_adapted is not None
    left = adaptation.distance_adapted.mean() / adaptation.distance_source.mean()
    assert 1 - left.item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_the_units_of_the_distance_do_not_matter(scope: str) -> None:
    net, x = toy(), images()
    one, other = (adapted(net, x, scope=scope, objective=Scaled(f)) for f in (1.0, 1e4))
    torch.testing.assert_close(one.outputs, other.outputs, rtol=0, atol=1e-10)
    assert one.outputs is not None
    assert one.source_outputs is not None
    assert (one.outputs - one.source_outputs).abs().max() > 1e-3


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_no_distance_is_no_step(scope: str) -> None:
    adaptation = adapted(toy(), images(), scope=scope, objective=Scaled(0.0))
    assert adaptation.outputs is not None
    assert adaptation.source_outputs is not None
    torch.testing.assert_close(adaptation.outputs, adaptation.source_outputs, rtol=0, atol=1e-15)
    assert not adaptation.skipped.any()


@pytest.mark.parametrize("backend", ["vectorised", "loop"])
@pytest.mark.parametrize("steps", [1, 3])
def test_each_sample_has_the_step_it_has_alone(backend: str, steps: int) -> None:
    net, x = toy(), images()
    alone = [by_hand(net, one[None], steps=steps)(one[None], None).detach() for one in x]
    adaptation = adapted(net, x, scope="sample", backend=backend, steps=steps)
    torch.testing.assert_close(adaptation.outputs, torch.cat(alone), rtol=0, atol=1e-9)


def test_weights_are_carried_along_a_stream() -> None:
    net, batches = toy(), [images(seed=0), images(seed=1)]
    made = BatchAdapter(net, takes_prior(net), softmax_label, settings(reset="never"))
    found = []
    for x in batches:
        with made.adapted(x) as adaptation:
            found.append(adaptation.weights["conv.weight"].clone())
    assert not torch.equal(found[0], found[1])
    expected = by_hand(net, batches[0]).get_parameter("conv.weight").detach()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "moves"),
    [
        ({}, ("polyak", 0.5)),
        ({"lr": 1e-3}, ("adam", 1e-3)),
        ({"optimizer": "polyak", "lr": 1.0}, ("polyak", 1.0)),
        ({"optimizer": "sgd"}, ("sgd", 1e-4)),
        ({"grad_clip": 1.0}, ("adam", 1e-4)),
        ({"objective": Idempotence("js", balance=0.3)}, ("adam", 1e-4)),
    ],
)
def test_it_is_the_default_where_no_learning_rate_is_given(
    given: dict[str, Any], moves: tuple[str, float]
) -> None:
    assert Settings(**given).moves == moves
    assert IT3TestTimeCallback(**given).settings.moves == moves


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 1e-4}, r"share of the distance in \[0.01, 2\], .* got 0.0001"),
        ({"lr": 1e-3}, "share of the distance in .* got 0.001"),
        ({"grad_clip": 1.0}, "Leave out grad_clip"),
        ({"objective": Idempotence("js", balance=0.3)}, "cannot fall below 0"),
    ],
)
def test_what_does_not_go_with_it_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**given)
