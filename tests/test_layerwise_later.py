"""What later batches may bring that the first, by which a way is chosen, did not show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.modules import Conditioned, drawn, images, takes_prior, toy
from helpers.reference import softmax_label
from helpers.zoo import noise
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, SampleAdapter, Settings
from it3_lightning.engine.fast import stacked_weights as stacked
from it3_lightning.engine.fast import vmap as gradients
from it3_lightning.engine.fast import vmap as vectorised
from it3_lightning.methods import Idempotence


def adapter(net: nn.Module, **given: Any) -> SampleAdapter:
    published = {"objective": Idempotence("l2", None), "lr": 0.01, "backend": "vectorised"}
    made = Settings(**{"scope": "sample", **published, **given})
    return SampleAdapter(net, takes_prior(net), softmax_label, made)


def adapted(by: SampleAdapter, inputs: Any) -> Adaptation:
    with by.adapted(inputs) as adaptation:
        return adaptation


def assert_as_in_a_loop(
    by: SampleAdapter, net: nn.Module, inputs: Any, *, atol: float = 1e-10, **given: Any
) -> None:
    found, expected = adapted(by, inputs), adapted(adapter(net, backend="loop", **given), inputs)
    assert by.backend_selection is not None
    assert by.backend_selection.backend == "vectorised"
    torch.testing.assert_close(
        found.outputs, expected.outputs, rtol=0, atol=atol, check_dtype=False
    )
    assert expected.outputs is not None
    assert expected.source_outputs is not None
    assert (expected.outputs - expected.source_outputs).abs().max() > 1e-4


class Flat(nn.Module):
    """A layer on all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        features: Tensor = self.layer(x.flatten(1))
        return features[:, :8].tanh()


class Masked(Flat):
    """A layer whose weight is used once more, of samples that are marked."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        x = x.flatten(1)
        features = self.layer(x).tanh()
        more = F.linear(features, self.layer.weight)
        return torch.where(x[:, :1] > 5, features + more, features)[:, :8]


class Mixing(Flat):
    """Scales all samples by the largest pixel of any."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        return super().forward(x / x.abs().amax())


class Writing(Flat):
    """Writes into its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, 8)`."""
        return super().forward(x.mul_(0.5))


class TwoInputs(nn.Module):
    """A layer for each of two images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Flat(), Flat()

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """Return features `(B, 8)`."""
        features: Tensor = self.first(x[0]) + self.second(x[1])
        return features


def test_a_weight_that_is_used_beside_its_layer_is_left_to_torch_func() -> None:
    net, inputs = drawn(Conditioned(Masked())), images(5)
    by = adapter(net)
    adapted(by, inputs)
    inputs[2, 0, 0, 0] = 9.0  # the first to be marked
    assert_as_in_a_loop(by, net, inputs)


def test_one_sample_alone_tells_nothing_of_several() -> None:
    net = drawn(Conditioned(Mixing()))
    by = adapter(net)
    adapted(by, images(1))
    found = adapted(by, images(6))
    assert by.backend_selection is not None
    assert by.backend_selection.backend == "vectorised"
    alone = [adapted(adapter(net, backend="loop"), x[None]).outputs for x in images(6)]
    torch.testing.assert_close(found.outputs, torch.cat([y for y in alone if y is not None]))


def test_single_samples_are_served_layer_by_layer_and_then_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    own = gradients.Gradients._layer_by_layer

    def noted(self: Any, weights: stacked.Stacked, inputs: Tensor) -> Any:
        sizes.append(len(inputs))
        return own(self, weights, inputs)

    monkeypatch.setattr(gradients.Gradients, "_layer_by_layer", noted)
    net = toy()
    by = adapter(net)
    for size in (1, 1, 5, 5):
        assert_as_in_a_loop(by, net, images(size))
    assert set(sizes) == {1, 5}


def test_inputs_that_need_gradients_change_nothing() -> None:
    net = drawn(Conditioned(TwoInputs()))
    by, inputs = adapter(net), (images(5), images(5, seed=1))
    adapted(by, inputs)
    inputs[0].requires_grad_(True)
    assert_as_in_a_loop(by, net, inputs)
    assert inputs[0].grad is None


@pytest.mark.parametrize("large", [1, 1 << 20])
def test_a_network_that_writes_into_its_inputs_spoils_no_batch(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectorised, "_LARGE", large)
    net, inputs = drawn(Conditioned(Writing())), images(5)
    by = adapter(net)
    for _ in range(2):
        assert_as_in_a_loop(by, net, inputs)
    assert torch.equal(inputs, images(5))


def test_calls_that_are_answered_are_counted_by_the_batch() -> None:
    net = toy()
    made = Settings(scope="sample", objective=Idempotence("l2", None), backend="vectorised")
    enters: dict[str, Any] = {"dense": "output"}
    by = SampleAdapter(net, takes_prior(net), softmax_label, made, enters=enters)
    counts = [adapted(by, images(5)).cache_hits for _ in range(3)]
    assert counts[0] > 0
    assert len(set(counts)) == 1


def test_memory_for_weights_follows_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "_LARGE", 1)
    net = toy()
    by = adapter(net)
    adapted(by, images(5))
    net.float()
    assert_as_in_a_loop(by, net, images(5).float(), atol=1e-5)


def colours() -> nn.Module:
    """Make a network of two convolutions for images `(B, 3, 8, 8)`."""
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)
    )
    return drawn(Conditioned(nn.Sequential(body, nn.Flatten())))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("made", [colours, toy])
def test_weights_may_lie_with_channels_last(made: Callable[[], nn.Module], steps: int) -> None:
    net: Any = made().to(memory_format=torch.channels_last)
    inputs = noise(3, 8, 8, count=5) if made is colours else images(5)
    inputs = inputs.to(memory_format=torch.channels_last)
    assert_as_in_a_loop(adapter(net, steps=steps), net, inputs, steps=steps)
