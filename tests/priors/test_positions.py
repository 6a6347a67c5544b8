"""Series and maps: layouts, statistics of channels, noise, and layers that keep the positions."""

from typing import Any, cast

import pytest
import torch
from helpers.conditionings import attached, embedded
from helpers.prior_cases import CASES, module
from helpers.toy import quiet
from torch import Tensor, nn

from it3_lightning import ClassPrior, FeatureInjection, InputConcat, MaskPrior, ValuePrior
from it3_lightning.priors import Prior

TOKENS = torch.tensor([[0, 2, 1], [1, 1, 0]])


@pytest.mark.parametrize("layout", ["BTC", "BCT"])
def test_classes_of_tokens_lie_where_the_layout_says_even_where_sizes_agree(layout: Any) -> None:
    prior, logits = ClassPrior(3, layout=layout), torch.randn(2, 3, 3)
    by_hand = logits.softmax(2).transpose(1, 2) if layout == "BTC" else logits.softmax(1)
    torch.testing.assert_close(prior.from_output(logits), by_hand)
    rows = nn.functional.one_hot(TOKENS, 3).transpose(1, 2).float()
    assert torch.equal(prior.from_target(TOKENS), rows)
    soft = rows.transpose(1, 2) if layout == "BTC" else rows
    assert torch.equal(prior.from_target(soft), rows)
    assert prior.known(soft) is None


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (
            lambda: ClassPrior(3, layout=cast(Any, "CBT")),
            None,
            "layout 'BC', 'BTC' or 'BCT'.*got 'CBT'",
        ),
        (
            lambda: ClassPrior(3, layout="BTC", context="batch"),
            None,
            "'BC' with a context, got 'BTC' and context='batch'",
        ),
        (
            lambda: ValuePrior(2, layout=cast(Any, "BTHW")),
            None,
            "BC, BTC, BCT, BCHW, BHWC, got 'BTHW'",
        ),
        (lambda: ClassPrior(5), torch.zeros(2, 4), r"need layout='BTC' or 'BCT'"),
        (
            lambda: ClassPrior(5, layout="BTC"),
            torch.zeros(2, 5, 4),
            r"outputs \(B, T, 5\), got \(2, 5, 4\)",
        ),
        (lambda: ClassPrior(5, layout="BCT"), torch.zeros(2), r"\(B, 5, T\), got \(2,\)"),
        (
            lambda: ValuePrior(2, layout="BTC"),
            torch.zeros(2, 5, 3),
            r"shape \(B, T, 2\), got \(2, 5, 3\). Set size",
        ),
        (lambda: ValuePrior(2, layout="BCHW"), torch.zeros(2, 4, 4), r"\(B, 2, H, W\), got \(2, 4"),
        (lambda: ValuePrior(layout="BHWC"), torch.zeros(2), r"\(B, H, W, 1\), got \(2,\)"),
        (lambda: ValuePrior(3), torch.zeros(2, 6), "series and maps, .* 'BTC' or 'BCHW'"),
    ],
)
def test_other_layouts_and_shapes_are_refused(make: Any, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().from_target(values)


LAYOUTS = {"BC": (6,), "BTC": (5, 2), "BCT": (2, 5), "BCHW": (2, 3, 4), "BHWC": (3, 4, 2)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_share_the_statistics_of_their_channel(layout: Any) -> None:
    size = 6 if layout == "BC" else 2
    shapes = LAYOUTS[layout]
    axis = layout.index("C")
    targets = 3 + 5 * torch.randn(8, *shapes, dtype=torch.float64)
    missing = torch.rand(8, *[n for i, n in enumerate(shapes) if i != axis - 1]) < 0.2
    missing[0] = True
    targets = torch.where(missing.unsqueeze(axis), torch.nan, targets)
    prior = ValuePrior(size, layout=layout)
    for batch in torch.split(targets.float(), [3, 5]):
        prior.measure(batch)
    prior.settle()
    channels = targets.unbind(axis)
    kept = [c[c.isfinite()] for c in channels]
    torch.testing.assert_close(prior.mean, torch.stack([c.mean() for c in kept]).float())
    spread = torch.stack([c.std(correction=0) for c in kept]).float()
    torch.testing.assert_close(prior.std, spread)
    scaled = prior.from_target(targets.float())
    for index, channel in enumerate(channels):
        expected = ((channel - kept[index].mean()) / kept[index].std(correction=0)).nan_to_num(0.0)
        torch.testing.assert_close(scaled[:, index], expected.float())
    known = prior.known(targets)
    assert known is not None
    assert torch.equal(known, ~missing)


@pytest.mark.parametrize("layout", ["BTC", "BCT", "BCHW", "BHWC"])
def test_the_dimension_of_one_channel_may_be_missing(layout: Any) -> None:
    prior = ValuePrior(layout=layout, mean=1.0, std=2.0)
    full = torch.randn([1 if d == "C" else 4 for d in layout])
    bare = full.squeeze(layout.index("C"))
    assert torch.equal(prior.from_target(bare), prior.from_target(full))
    assert prior.from_target(bare).shape[:2] == (4, 1)
    assert prior.to_output(prior.from_output(bare), bare).shape == bare.shape


def test_as_one_vector_every_value_has_statistics_of_its_own() -> None:
    prior, targets = ValuePrior(6), torch.randn(9, 3, 2) * torch.arange(1, 7).reshape(3, 2)
    prior.fit([targets])
    torch.testing.assert_close(prior.mean, targets.mean(0).flatten())
    torch.testing.assert_close(prior.std, targets.std(0, correction=0).flatten())
    assert prior.from_target(targets).shape == (9, 6)


def test_noise_of_positions_has_an_offset_in_common() -> None:
    torch.manual_seed(0)
    noise = ValuePrior(layout="BTC", mean=0.0, std=1.0, noise=2.0).perturb(torch.zeros(4000, 1, 30))
    # variance 4 / 3, as of single values; half of it common to all positions
    assert noise.square().mean().item() == pytest.approx(4 / 3, rel=0.05)
    common = noise.mean(2).square().mean().item()
    assert common == pytest.approx(2 / 3 * (1 + 1 / 30), rel=0.1)


def test_tokens_are_mixed_with_random_classes_by_one_share_of_each_sample() -> None:
    torch.manual_seed(0)
    prior, labels = ClassPrior(4, layout="BTC"), torch.arange(4).repeat(25)[None].expand(50, 100)
    rows = prior.perturb(prior.from_target(labels))
    torch.testing.assert_close(rows.sum(1), torch.ones(50, 100))
    own = rows.gather(1, labels[:, None])[:, 0]
    for sample in own:
        mixed = sample[sample < 1]
        assert mixed.numel() > 50
        assert torch.equal(mixed, mixed[:1].expand_as(mixed))


# Layers


class Summed(nn.Module):
    """A layer of tokens, and one of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mean = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.mean(self.tokens(x).mean(1))
        return mean


@pytest.mark.parametrize(
    "prior", [ClassPrior(3, layout="BTC"), ValuePrior(3, layout="BTC", mean=0.0, std=1.0)]
)
@pytest.mark.parametrize("kind", [FeatureInjection, InputConcat])
def test_a_prior_of_a_series_enters_at_its_steps_or_is_refused(kind: Any, prior: Prior) -> None:
    network, x, given = Summed(), torch.randn(2, 5, 4), torch.randn(2, 3, 5)
    conditioning = attached(kind("tokens"), network, prior)
    with conditioning.given(given):
        found = network.tokens(x)
    added = found - network.tokens.forward(x)
    for step in range(5):
        if kind is FeatureInjection:
            expected = embedded(conditioning, "tokens", given[:, :, step])
        else:
            rows = prior.as_input(given[:, :, step])
            expected = rows @ conditioning.extra["tokens"].weight.T  # type: ignore[index, union-attr]
        torch.testing.assert_close(added[:, step], expected, rtol=1e-4, atol=1e-5)
    other, network = kind("mean"), Summed()
    other.attach(network, prior)
    with (
        pytest.raises(ValueError, match=r"prior of a series .*\(5,\) does not fit layer 'mean'"),
        other.given(given),
    ):
        network(x)
    with other.given(None):
        network(x)


def test_a_map_of_values_is_refused_by_a_layer_of_series_and_one_of_classes_averaged() -> None:
    x, maps = torch.randn(2, 4, 7), torch.rand(2, 3, 4, 4)
    layer = nn.Conv1d(4, 8, 1)
    values = ValuePrior(3, layout="BCHW", mean=0.0, std=1.0)
    for kind in (FeatureInjection, InputConcat):
        network = nn.Sequential(nn.Conv1d(4, 8, 1))
        refusing = attached(kind("0"), network, values)
        with (
            pytest.raises(
                ValueError, match=r"prior of a map with positions \(4, 4\) does not fit layer '0'"
            ),
            refusing.given(maps),
        ):
            network(x)
    network = nn.Sequential(layer)
    averaging = attached(FeatureInjection("0"), network, MaskPrior(3))
    with averaging.given(maps):
        added = network(x) - layer.forward(x)
    pooled = embedded(averaging, "0", maps.movedim(1, -1)).mean((1, 2))
    torch.testing.assert_close(added, pooled[:, :, None].expand(2, 8, 7), rtol=1e-4, atol=1e-5)


def test_positions_that_a_layer_does_not_keep_are_refused_before_the_first_step() -> None:
    case, forecast = CASES["series of several values"], "a forecast as one vector"
    prior = case.prior()
    model = type(module(forecast))(
        case=forecast, prior=prior, conditioning=FeatureInjection("net.middle")
    )
    trainer = quiet()
    with pytest.raises(ValueError, match=r"'net.middle'.*ValuePrior\(size=...\) with layout='BC'"):
        trainer.fit(model, CASES[forecast].loader())
    assert trainer.global_step == 0
