"""FeatureInjection: added to, scaling and shifting features of every layout."""

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from helpers.conditionings import CLASSES, assert_samples_as_alone, attached, embedded, priors
from helpers.modules import same
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning.conditioning import (
    FeatureInjection,
    InputConcat,
)
from it3_lightning.conditioning.layout import width
from it3_lightning.priors import ClassPrior, MaskPrior

torch.manual_seed(0)  # for the layers and inputs below


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


class Named(NamedTuple):
    """A layer's output with names."""

    features: Tensor
    other: Tensor


class Wrapped(nn.Module):
    """Puts a layer's output first in a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Named:
        return Named(self.layer(x), x)


class Attention(nn.MultiheadAttention):
    """Attends to itself."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)


class Permuted(nn.Module):
    """Ends like a Swin block: a linear layer over channels that come last, in four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.linear(x.movedim(1, -1))
        return features


class Transposed(nn.Module):
    """Swaps two dimensions before and after a layer."""

    def __init__(self, layer: nn.Module, first: int, second: int, *, back: bool = True) -> None:
        super().__init__()
        self.layer, self.axes, self.back = layer, (first, second), back

    def forward(self, x: Tensor) -> Tensor:
        output = first(self.layer(x.transpose(*self.axes)))
        return output.transpose(*self.axes) if self.back else output


# layer, inputs, dimensions of batch and channels in the features
LAYERS: dict[str, tuple[nn.Module, Tensor, tuple[int, int]]] = {
    "linear": (nn.Linear(4, 8), torch.randn(5, 4), (0, 1)),
    "tokens": (nn.Linear(4, 8), torch.randn(5, 7, 4), (0, 2)),
    "tokens, as many as channels": (nn.Linear(4, 8), torch.randn(5, 8, 4), (0, 2)),
    "conv1d": (nn.Conv1d(4, 8, 1), torch.randn(5, 4, 7), (0, 1)),
    "conv1d, as long as wide": (nn.Conv1d(4, 8, 1), torch.randn(5, 4, 8), (0, 1)),
    "block of conv1d, as long as wide": (
        nn.Sequential(nn.Conv1d(4, 8, 1), nn.ReLU()),
        torch.randn(5, 4, 8),
        (0, 1),
    ),
    "conv2d": (nn.Conv2d(4, 8, 3), torch.randn(5, 4, 6, 6), (0, 1)),
    "conv2d, as large as wide": (nn.Conv2d(4, 8, 1), torch.randn(5, 4, 8, 8), (0, 1)),
    "channels last, as large as wide": (Permuted(), torch.randn(5, 4, 8, 8), (0, 3)),
    "group norm": (nn.GroupNorm(2, 4), torch.randn(5, 4, 6, 6), (0, 1)),
    "layer norm over maps": (nn.LayerNorm([4, 6, 6]), torch.randn(5, 4, 6, 6), (0, 1)),
    "conv3d": (nn.Conv3d(4, 8, 1), torch.randn(5, 4, 2, 3, 4), (0, 1)),
    "lstm": (nn.LSTM(4, 8, batch_first=True), torch.randn(5, 7, 4), (0, 2)),
    "lstm, both directions": (
        nn.LSTM(4, 8, batch_first=True, bidirectional=True),
        torch.randn(5, 7, 4),
        (0, 2),
    ),
    "lstm, sequence first": (nn.LSTM(4, 8), torch.randn(7, 5, 4), (1, 2)),
    "lstm, sequence first, as long as the batch": (nn.LSTM(4, 8), torch.randn(5, 5, 4), (1, 2)),
    "attention": (Attention(4, 2, batch_first=True), torch.randn(5, 7, 4), (0, 2)),
    "attention, sequence first": (Attention(4, 2), torch.randn(7, 5, 4), (1, 2)),
    "named tuple": (Wrapped(), torch.randn(5, 4), (0, 1)),
    "lstm, sequence first, as many samples as channels": (
        nn.LSTM(4, 5),
        torch.randn(7, 5, 4),
        (1, 2),
    ),
    "lstm, sequence first inside": (
        Transposed(nn.LSTM(4, 8), 0, 1),
        torch.randn(5, 7, 4),
        (0, 2),
    ),
    "tokens, sequence first": (nn.Linear(4, 8), torch.randn(7, 5, 4), (1, 2)),
    "patches, as many as channels": (
        nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.Flatten(2), Transposed(nn.LayerNorm(8), 1, 2, back=False)
        ),
        torch.randn(5, 4, 2, 4),
        (0, 2),
    ),
    "convolution and linear layer, as large as wide": (
        nn.Sequential(nn.Conv2d(4, 8, 1), Transposed(nn.Linear(8, 8), 1, 3)),
        torch.randn(5, 4, 8, 8),
        (0, 1),
    ),
    "transformer": (
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        torch.randn(5, 7, 4),
        (0, 2),
    ),
}


def first(output: Any) -> Tensor:
    features: Tensor = output[0] if isinstance(output, tuple) else output
    return features


def laid_out(rows: Tensor, features: Tensor, axes: tuple[int, int]) -> Tensor:
    """Repeat rows `(B, C)` at all positions of the features, by an explicit loop over samples."""
    full = torch.zeros_like(features)
    for index, row in enumerate(rows):
        sample = full.select(axes[0], index)
        axis = axes[1] - (axes[0] < axes[1])
        shape = [1] * sample.ndim
        shape[axis] = len(row)
        sample.copy_(row.reshape(shape).expand_as(sample))
    return full


@pytest.mark.parametrize("layer", LAYERS)
def test_injection_adds_to_every_kind_of_features(layer: str) -> None:
    module, x, axes = LAYERS[layer]
    network = nn.Sequential(copy.deepcopy(module)).eval()
    plain = network(x)
    injection = attached(FeatureInjection("0"), network)
    prior = priors(5)
    with injection.given(prior):
        conditioned = network(x)
    expected = first(plain) + laid_out(embedded(injection, "0", prior), first(plain), axes)
    torch.testing.assert_close(first(conditioned), expected)
    if isinstance(plain, tuple):
        assert type(conditioned) is type(plain)
        torch.testing.assert_close(conditioned[1], plain[1])


@pytest.mark.parametrize("layer", LAYERS)
def test_film_scales_and_shifts_every_kind_of_features(layer: str) -> None:
    module, x, axes = LAYERS[layer]
    network = nn.Sequential(copy.deepcopy(module)).eval()
    plain = first(network(x))
    injection = attached(FeatureInjection("0", mode="film"), network)
    prior = priors(5)
    with injection.given(prior):
        conditioned = first(network(x))
    scale, shift = embedded(injection, "0", prior).chunk(2, dim=1)
    expected = (1 + laid_out(scale, plain, axes)) * plain + laid_out(shift, plain, axes)
    torch.testing.assert_close(conditioned, expected)


@pytest.mark.parametrize("mode", ["add", "film"])
@pytest.mark.parametrize("layer", LAYERS)
def test_neutral_pass_is_the_plain_network_bit_for_bit(layer: str, mode: Any) -> None:
    module, x, _ = LAYERS[layer]
    network = nn.Sequential(copy.deepcopy(module)).eval()
    plain = first(network(x))
    injection = attached(FeatureInjection("0", mode=mode), network)
    with injection.given(None):
        neutral = first(network(x))
    assert same([(first(network(x)), plain), (neutral, plain)])


@pytest.mark.parametrize("mode", ["add", "film"])
@pytest.mark.parametrize("layer", LAYERS)
def test_untrained_injection_changes_nothing(layer: str, mode: Any) -> None:
    module, x, _ = LAYERS[layer]
    network = nn.Sequential(copy.deepcopy(module)).eval()
    plain = first(network(x))
    injection = FeatureInjection("0", mode=mode)
    injection.attach(network, ClassPrior(CLASSES))
    with injection.given(priors(5)):
        assert torch.equal(first(network(x)), plain)


@pytest.mark.parametrize("mode", ["add", "film"])
@pytest.mark.parametrize("layer", LAYERS)
def test_absent_samples_see_the_neutral_prior(layer: str, mode: Any) -> None:
    module, x, (batch, _) = LAYERS[layer]
    network = nn.Sequential(copy.deepcopy(module)).eval()
    injection = attached(FeatureInjection("0", mode=mode), network)
    present = torch.tensor([True, False, False, True, False])
    prior = priors(5)
    with injection.given(prior, present):
        mixed = first(network(x))
    with injection.given(prior):
        given = first(network(x))
    neutral = first(network(x))
    for index, sees in enumerate(present.tolist()):
        expected = given if sees else neutral
        assert torch.equal(mixed.select(batch, index), expected.select(batch, index))


def test_several_layers_each_have_their_mode() -> None:
    network = nn.Sequential(OrderedDict(a=nn.Linear(4, 8), b=nn.ReLU(), c=nn.Linear(8, 6)))
    x, prior = torch.randn(5, 4), priors(5)
    injection = attached(FeatureInjection(["a", "c"], mode=["add", "film"]), network)
    with injection.given(prior):
        found = network(x)
    weights = dict(network.named_parameters())
    hidden = F.linear(x, weights["a.weight"], weights["a.bias"]) + embedded(injection, "a", prior)
    features = F.linear(hidden.relu(), weights["c.weight"], weights["c.bias"])
    scale, shift = embedded(injection, "c", prior).chunk(2, dim=1)
    torch.testing.assert_close(found, (1 + scale) * features + shift)


def test_layers_inside_an_encoder_take_the_prior_with_and_without_gradients() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
    ).eval()
    injection = attached(FeatureInjection("layers.0.linear1"), encoder)
    x, prior = torch.randn(5, 7, 8), priors(5)
    with injection.given(prior):
        found = encoder(x)
    with torch.no_grad(), injection.given(prior):
        torch.testing.assert_close(encoder(x), found)
    assert not torch.allclose(found, encoder(x))


def test_tokens_inside_a_sequence_first_encoder_are_not_taken_for_samples() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)  # (T, B, C)
    network = nn.Sequential(nn.Identity(), nn.Sequential(encoder))
    injection = attached(FeatureInjection("1.0.linear1"), network)
    x, prior = torch.randn(5, 5, 8), priors(5)
    assert_samples_as_alone(network, injection, x, prior)


def test_tokens_outside_a_sequence_first_block_are_batch_first() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
            self.blocks = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0))

        def forward(self, x: Tensor) -> Tensor:
            tokens: Tensor = self.blocks(self.embed(x).transpose(0, 1))
            return tokens

    network, x, prior = Vision(), torch.randn(5, 5, 4), priors(5)
    injection = attached(FeatureInjection("embed.1"), network)
    with injection.given(prior):
        together = network(x)
    for index in range(5):
        with injection.given(prior[index : index + 1]):
            alone = network(x[index : index + 1])
        torch.testing.assert_close(together[:, index : index + 1], alone)


def test_priors_of_another_neutral_are_embedded_relative_to_it() -> None:
    network, x = nn.Linear(4, 8), torch.randn(5, 4)
    injection = FeatureInjection("")
    injection.attach(network, ClassPrior(CLASSES, neutral="uniform"))
    for parameter in injection.parameters():
        nn.init.normal_(parameter)
    plain, uniform = network(x), torch.full((5, CLASSES), 1 / CLASSES)
    with injection.given(uniform):
        torch.testing.assert_close(network(x), plain)
    prior = priors(5)
    with injection.given(prior):
        found = network(x)
    by_hand = embedded(injection, "self", prior) - embedded(injection, "self", uniform)
    torch.testing.assert_close(found, plain + by_hand)
    assert not any("neutral" in name for name in injection.state_dict())  # checkpoints hold weights


def test_maps_of_priors_are_resized_to_the_features() -> None:
    network, x = nn.Sequential(nn.Conv2d(2, 8, 3, stride=2, padding=1)), torch.randn(5, 2, 8, 8)
    injection = attached(FeatureInjection("0"), network, MaskPrior(CLASSES))
    maps = torch.randn(5, CLASSES, 8, 8).softmax(1)
    with injection.given(maps):
        found = network(x)
    rows = embedded(injection, "0", maps.movedim(1, -1)).movedim(-1, 1)
    small = rows.reshape(5, 8, 4, 2, 4, 2).mean((3, 5))  # half the size: averages of four
    torch.testing.assert_close(found, network(x) + small)


def test_thin_lines_in_maps_are_not_lost_where_features_are_coarse() -> None:
    network, x = nn.Sequential(nn.Conv2d(2, 8, 1, stride=8)), torch.randn(2, 2, 32, 24)
    injection = attached(FeatureInjection("0"), network, MaskPrior(CLASSES))
    maps = torch.zeros(2, CLASSES, 32, 24)
    maps[:, 1, :, 8] = 1  # one column of 24, between those that interpolation would look at
    rows = embedded(injection, "0", maps.movedim(1, -1)).movedim(-1, 1)
    by_hand = rows.reshape(2, 8, 4, 8, 3, 8).mean((3, 5))
    with injection.given(maps):
        found = network(x)
    torch.testing.assert_close(found, network(x) + by_hand)
    assert not torch.allclose(by_hand[..., 1], by_hand[..., 0])


@pytest.mark.parametrize("layer", ["linear", "tokens", "conv1d", "lstm, sequence first"])
def test_maps_of_priors_are_averaged_where_features_have_no_positions(layer: str) -> None:
    module, x, axes = LAYERS[layer]
    network = nn.Sequential(copy.deepcopy(module))
    injection = attached(FeatureInjection("0"), network, MaskPrior(CLASSES))
    maps = torch.randn(5, CLASSES, 4, 4).softmax(1)
    with injection.given(maps):
        found = first(network(x))
    rows = embedded(injection, "0", maps.movedim(1, -1)).mean((1, 2))
    plain = first(network(x))
    torch.testing.assert_close(found, plain + laid_out(rows, plain, axes))


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_signals_of_priors_are_averaged_where_features_are_laid_out_otherwise(layer: str) -> None:
    module, x, axes = LAYERS[layer]
    network = nn.Sequential(copy.deepcopy(module))
    injection = attached(FeatureInjection("0"), network)
    signal = torch.randn(5, CLASSES, 7).softmax(1)
    with injection.given(signal):
        found = network(x)
    rows = embedded(injection, "0", signal.movedim(1, -1)).mean(1)
    torch.testing.assert_close(found, network(x) + laid_out(rows, network(x), axes))


@pytest.mark.parametrize(("layer", "axis"), [("conv1d", 1), ("tokens", 2)])
def test_signals_of_priors_follow_the_positions(layer: str, axis: int) -> None:
    module, x, _ = LAYERS[layer]
    network = nn.Sequential(copy.deepcopy(module))
    injection = attached(FeatureInjection("0"), network)
    signal = torch.randn(5, CLASSES, 7).softmax(1)
    with injection.given(signal):
        found = network(x)
    rows = embedded(injection, "0", signal.movedim(1, -1)).movedim(-1, axis)
    torch.testing.assert_close(found, network(x) + rows)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(4, 8, proj_size=3, bidirectional=True), 6),
        (nn.GRU(4, 8), 8),
        (nn.Embedding(10, 4), 4),
        (nn.LayerNorm([7, 8]), 8),
        (nn.LayerNorm([4, 6, 6]), 4),
        (nn.InstanceNorm1d(5), 5),
        (nn.ReLU(), None),
    ],
)
def test_layers_tell_their_width(layer: nn.Module, expected: int | None) -> None:
    assert width(layer) == expected


def test_the_width_may_be_given_where_no_layer_tells_it() -> None:
    network, x = nn.Sequential(nn.Flatten()), torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"width of layer '0' \(Flatten\).*channels=\.\.\."):
        FeatureInjection("0").attach(network, ClassPrior(CLASSES))
    injection = attached(FeatureInjection("0", channels=6), network)
    prior = priors(5)
    with injection.given(prior):
        torch.testing.assert_close(network(x), x.flatten(1) + embedded(injection, "0", prior))


@pytest.mark.parametrize(
    ("channels", "batch", "got"),
    [
        (5, 5, r"\(5, 8\): expected as many samples and 5 channels"),
        (None, 4, r"prior of 4 samples"),
    ],
)
def test_features_that_do_not_fit_are_refused(channels: int | None, batch: int, got: str) -> None:
    network = nn.Sequential(nn.Linear(4, 8))
    injection = attached(FeatureInjection("0", channels=channels), network)
    with pytest.raises(ValueError, match=got), injection.given(priors(batch)):
        network(torch.randn(5, 4))


def test_features_of_one_dimension_are_refused() -> None:
    network = nn.Sequential(nn.Flatten(0))
    injection = attached(FeatureInjection("0", channels=8), network)
    with pytest.raises(ValueError, match="does not fit"), injection.given(priors(8)):
        network(torch.randn(8, 1))


def test_features_that_are_no_tensor_are_refused() -> None:
    class Dictionary(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x}

    network = nn.Sequential(Dictionary())
    injection = attached(FeatureInjection("0", channels=4), network)
    with (
        pytest.raises(ValueError, match=r"layer '0' to put out a tensor.*got dict"),
        injection.given(priors(5)),
    ):
        network(torch.randn(5, 4))


def test_double_and_half_networks_keep_their_type() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        network = nn.Sequential(nn.Linear(4, 8)).to(dtype)
        injection = attached(FeatureInjection("0"), network)
        with injection.given(priors(5)):
            assert network(torch.randn(5, 4, dtype=dtype)).dtype == dtype


# Names, hooks, copies


def test_an_unknown_layer_names_the_closest() -> None:
    network = nn.Sequential(OrderedDict(layer1=nn.Linear(2, 2), head=nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Unknown layer 'layer_1'. Did you mean 'layer1'"):
        FeatureInjection("layer_1").attach(network, ClassPrior(CLASSES))


def test_shared_layers_go_by_each_of_their_names() -> None:
    shared = nn.Linear(4, 8)
    network = nn.ModuleDict({"one": shared, "two": shared})
    injection = attached(FeatureInjection("two"), network)
    x, prior = torch.randn(5, 4), priors(5)
    plain = shared(x)
    with injection.given(prior):
        torch.testing.assert_close(shared(x), plain + embedded(injection, "two", prior))


@pytest.mark.parametrize("name", ["keys", "values", "items", "pop", "update"])
def test_layers_may_be_named_like_attributes_of_a_dictionary(name: str) -> None:
    network = nn.Module()
    network.add_module("inner", nn.Sequential(OrderedDict({"ok": nn.Linear(4, 8)})))
    setattr(network, f"{name}", nn.Linear(4, 8))
    injection = attached(FeatureInjection(name), network)
    concat = attached(InputConcat(name), network)
    layer = network.get_submodule(name)
    with injection.given(priors(5)), concat.given(None):
        assert layer(torch.randn(5, 4)).shape == (5, 8)


class Skips(nn.Module):
    """Never runs one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.used(x)
        return features


@pytest.mark.parametrize("prior", [None, priors(5)])
def test_a_layer_that_never_runs_is_an_error(prior: Tensor | None) -> None:
    network = Skips()
    injection = attached(FeatureInjection(["used", "unused"]), network)
    message = r"never ran the layer\(s\) \['unused'\]"
    with pytest.raises(RuntimeError, match=message), injection.given(prior):
        network(torch.randn(5, 4))


def test_a_fused_layer_is_an_error() -> None:
    network = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    injection = attached(FeatureInjection("self_attn.out_proj"), network)
    with pytest.raises(RuntimeError, match="never ran"), injection.given(priors(5)):
        network(torch.randn(5, 7, 8))


def test_an_error_within_is_not_hidden_and_the_prior_is_taken_back() -> None:
    network, x = nn.Sequential(nn.Linear(4, 8)), torch.randn(5, 4)
    injection = attached(FeatureInjection("0"), network)
    plain = network(x)
    with pytest.raises(KeyError), injection.given(priors(5)):
        raise KeyError
    assert torch.equal(network(x), plain)


def test_given_priors_nest() -> None:
    network, x = nn.Sequential(nn.Linear(4, 8)), torch.randn(5, 4)
    injection = attached(FeatureInjection("0"), network)
    outer, inner, plain = priors(5), priors(5), network(x)
    with injection.given(outer):
        with injection.given(inner):
            torch.testing.assert_close(network(x), plain + embedded(injection, "0", inner))
        with injection.given(None):
            assert torch.equal(network(x), plain)
        torch.testing.assert_close(network(x), plain + embedded(injection, "0", outer))
