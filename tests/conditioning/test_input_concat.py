"""InputConcat: the first layer widened by the prior, and the plain layer without it."""

from typing import Any

import pytest
import torch
from helpers.conditionings import CLASSES, assert_samples_as_alone, attached, priors
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning.conditioning import (
    InputConcat,
)
from it3_lightning.priors import ClassPrior, MaskPrior

torch.manual_seed(0)  # for the inputs below


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


GEOMETRIES: dict[str, tuple[Any, Tensor]] = {
    "conv2d": (
        lambda c: nn.Conv2d(c, 8, 3, stride=2, padding=1, dilation=2),
        torch.randn(5, 4, 9, 9),
    ),
    "conv2d, same": (lambda c: nn.Conv2d(c, 8, 3, padding="same"), torch.randn(5, 4, 6, 6)),
    "conv2d, reflected": (
        lambda c: nn.Conv2d(c, 8, 3, padding=1, padding_mode="reflect", bias=False),
        torch.randn(5, 4, 6, 6),
    ),
    "conv1d": (lambda c: nn.Conv1d(c, 8, 5, stride=3, padding=2), torch.randn(5, 4, 12)),
    "conv3d": (lambda c: nn.Conv3d(c, 8, 2), torch.randn(5, 4, 3, 3, 3)),
    "linear": (lambda c: nn.Linear(c, 8), torch.randn(5, 4)),
    "linear on tokens": (lambda c: nn.Linear(c, 8), torch.randn(5, 7, 4)),
}


NEUTRALS: list[Any] = ["zeros", "uniform", "constant"]


def concatenated(x: Tensor, prior: Tensor, linear: bool) -> Tensor:
    """Append a prior `(B, C)` to the channels of every position."""
    channel = x.ndim - 1 if linear else 1
    shape = [x.shape[0], *[1] * (x.ndim - 1)]
    shape[channel] = prior.shape[1]
    size = list(x.shape)
    size[channel] = prior.shape[1]
    return torch.cat([x, prior.reshape(shape).expand(size)], dim=channel)


@pytest.mark.parametrize("neutral", NEUTRALS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_concat_equals_a_widened_layer(geometry: str, neutral: Any) -> None:
    make, x = GEOMETRIES[geometry]
    layer, widened = make(4), make(4 + CLASSES)
    concat = attached(InputConcat("0"), nn.Sequential(layer), ClassPrior(CLASSES, neutral=neutral))
    extra = concat.get_parameter("extra.0.weight")
    widened.weight.data = torch.cat([layer.weight, extra], dim=1)
    if layer.bias is not None:
        widened.bias.data = layer.bias.data
    linear, prior = isinstance(layer, nn.Linear), priors(5)
    fill = {"zeros": 0.0, "uniform": 1 / CLASSES, "constant": -1.0}[neutral]
    unknown = torch.full((5, CLASSES), fill)
    present = torch.tensor([True, False, True, False, True])
    mixed = torch.where(present[:, None], prior, unknown)
    for given, mask, expected in (
        (prior, None, prior),
        (None, None, unknown),
        (prior, present, mixed),
    ):
        with concat.given(given, mask):
            found = layer(x)
        torch.testing.assert_close(found, widened(concatenated(x, expected, linear)))
    torch.testing.assert_close(layer(x), widened(concatenated(x, unknown, linear)))


def test_concat_of_a_zero_neutral_is_the_plain_layer_bit_for_bit() -> None:
    layer, x = nn.Conv2d(4, 8, 3), torch.randn(5, 4, 6, 6)
    plain = layer(x)
    concat = attached(InputConcat("0"), nn.Sequential(layer))
    with concat.given(None):
        assert torch.equal(layer(x), plain)


def test_untrained_concat_changes_nothing() -> None:
    layer, x = nn.Conv2d(4, 8, 3), torch.randn(5, 4, 6, 6)
    plain, concat = layer(x), InputConcat("0")
    concat.attach(nn.Sequential(layer), ClassPrior(CLASSES))
    with concat.given(priors(5)):
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("size", [6, 3])
def test_concat_lays_masks_over_the_image(size: int) -> None:
    layer, x = nn.Conv2d(4, 8, 3, padding=1), torch.randn(5, 4, 6, 6)
    prior = MaskPrior()
    concat = attached(InputConcat("0"), nn.Sequential(layer), prior)
    mask = torch.rand(5, 1, size, size)
    full = F.interpolate(mask, (6, 6), mode="bilinear")
    weight = torch.cat([layer.weight, concat.get_parameter("extra.0.weight")], dim=1)
    present = torch.tensor([True, False, True, True, False])
    flag = torch.ones(5, 1, 6, 6)
    for seen, mask_of_samples in ((torch.ones(5, dtype=torch.bool), None), (present, present)):
        with concat.given(mask, mask_of_samples):
            found = layer(x)
        channels = torch.cat([full, flag], dim=1) * seen[:, None, None, None]
        expected = F.conv2d(torch.cat([x, channels], dim=1), weight, layer.bias, padding=1)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("length", [1, 6, 3])
def test_concat_lays_signals_over_the_positions(length: int) -> None:
    layer, x = nn.Conv1d(4, 8, 3, padding=1), torch.randn(5, 4, 6)
    concat = attached(InputConcat("0"), nn.Sequential(layer))
    signal = torch.rand(5, CLASSES, length)
    weight = torch.cat([layer.weight, concat.get_parameter("extra.0.weight")], dim=1)
    full = F.interpolate(signal, 6, mode="linear")
    with concat.given(signal):
        found = layer(x)
    expected = F.conv1d(torch.cat([x, full], dim=1), weight, layer.bias, padding=1)
    torch.testing.assert_close(found, expected)


def test_concat_lays_signals_over_tokens() -> None:
    layer, x = nn.Linear(4, 8), torch.randn(5, 7, 4)
    concat = attached(InputConcat("0"), nn.Sequential(layer))
    signal = torch.rand(5, CLASSES, 7)
    with concat.given(signal):
        found = layer(x)
    term = F.linear(signal.transpose(1, 2), concat.get_parameter("extra.0.weight"))
    torch.testing.assert_close(found, layer(x) + term)


def test_concat_on_a_sequence_first_layer_keeps_samples_apart() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Linear(4, 8), nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.rest(self.first(x))[0]
            return output

    network, x, prior = Recurrent(), torch.randn(5, 5, 4), priors(5)  # as long as the batch
    concat = attached(InputConcat("first"), network)
    assert_samples_as_alone(network, concat, x, prior)


def test_concat_takes_inputs_by_keyword() -> None:
    layer, x, prior = nn.Conv2d(4, 8, 3), torch.randn(5, 4, 6, 6), priors(5)
    concat = attached(InputConcat("0"), nn.Sequential(layer))
    with concat.given(prior):
        assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("layer", [nn.LSTM(4, 8), nn.Conv2d(4, 8, 3, groups=2), nn.ReLU()])
def test_concat_refuses_other_layers(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"at '0', got {type(layer).__name__}"):
        InputConcat("0").attach(nn.Sequential(layer), ClassPrior(CLASSES))
