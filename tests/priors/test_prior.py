"""Priors: label space from targets and outputs, the neutral prior, perturbation, refusals."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from it3_lightning.priors import ClassPrior, MaskPrior, Prior, ValuePrior


def generator_state() -> Tensor:
    torch.manual_seed(3)
    return torch.get_rng_state()


# Targets


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_class_indices_become_one_hot_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target = torch.tensor([2, 0, 1], dtype=dtype).reshape(shape)
    expected = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    assert torch.equal(ClassPrior(3).from_target(target), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_rows_of_classes_are_taken_as_probabilities(dtype: torch.dtype) -> None:
    rows = torch.eye(3, dtype=dtype)
    prior = ClassPrior(3).from_target(rows)
    assert prior.is_floating_point()
    assert torch.equal(prior, rows.to(prior.dtype))


def test_floating_targets_of_two_classes_are_probabilities_of_the_second() -> None:
    soft = torch.tensor([1.0, 0.0, 0.9])
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.1, 0.9]])
    for target in (soft, soft[:, None]):
        torch.testing.assert_close(ClassPrior(2).from_target(target), expected)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 3]), r"indices in 0..2, got 0 to 3"),
        (torch.tensor([-100, 1]), r"indices in 0..2, got -100 to 1"),
        (torch.tensor([0.5, 1.0]), "got fractions in a target of shape"),
        (torch.zeros(2, 4, 4, dtype=torch.long), "MaskPrior takes maps"),
        (torch.tensor([-100, 1]), "or ignore_index to the label that the loss ignores"),
        (
            torch.tensor([[1.0, 1.0, 0.0]]),
            r"1, got .* sums from 2 to 2. Labels that are i",
        ),
        (torch.tensor([[1, 0, 1]]), "multi-label"),
        (torch.tensor([[0.0, 0.0, 0.0]]), "add up to 1"),
        (torch.tensor([[3.0, -1.0, -1.0]]), "got values from -1 to 3"),
        (torch.zeros(2, 5), r"shape \(B,\) or \(B, 3\), got \(2, 5\)"),
    ],
)
def test_class_prior_refuses_other_targets(target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassPrior(3).from_target(target)


def test_ignored_labels_say_nothing_and_the_others_what_they_say_alone() -> None:
    rows = ClassPrior(4, ignore_index=-100).from_target(torch.tensor([-100, 2]))
    assert rows.tolist() == [[0.25] * 4, [0.0, 0.0, 1.0, 0.0]]
    pair = ClassPrior(2, ignore_index=-1).from_target(torch.tensor([-1.0, 1.0]))
    assert pair.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    target = torch.tensor([[[0, 255], [1, 255]]])
    for classes in (1, 2, 3):
        maps = MaskPrior(classes, ignore_index=255).from_target(target)
        plain = MaskPrior(classes).from_target(target.clamp(max=1))
        assert torch.equal(maps[..., 0], plain[..., 0])
        assert set(maps[..., 1].flatten().tolist()) == {torch.tensor(1 / max(2, classes)).item()}
    with pytest.raises(ValueError, match="got -1 to 2"):
        ClassPrior(3, ignore_index=-100).from_target(torch.tensor([-100, -1, 2]))


def test_an_empty_batch_has_empty_priors() -> None:
    assert ClassPrior(3).from_target(torch.zeros(0, dtype=torch.long)).shape == (0, 3)
    assert MaskPrior().from_target(torch.zeros(0, 2, 2)).shape == (0, 1, 2, 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 1, 2, 2)])
def test_binary_masks_become_one_channel(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mask = torch.tensor([0, 1, 1, 0]).to(dtype).reshape(shape)
    prior = MaskPrior().from_target(mask)
    assert prior.shape == (1, 1, 2, 2)
    assert prior.flatten().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 1, 2, 2)])
def test_maps_of_classes_become_one_channel_a_class(shape: tuple[int, ...]) -> None:
    target = torch.tensor([0, 1, 2, 1]).reshape(shape)
    prior = MaskPrior(3).from_target(target)
    assert prior.shape == (1, 3, 2, 2)
    assert torch.equal(prior.argmax(1).flatten(), target.flatten())
    assert torch.equal(MaskPrior(3).from_target(prior), prior)


def test_binary_masks_of_two_classes_are_background_and_foreground() -> None:
    mask = torch.tensor([[[0, 1], [1, 1]]])
    maps = MaskPrior(2).from_target(mask)
    assert torch.equal(maps, torch.stack([1 - mask, mask], dim=1).float())
    soft = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    assert torch.equal(MaskPrior(2).from_target(soft), soft)


def test_masks_may_be_one_pixel_high() -> None:
    assert MaskPrior().from_target(torch.zeros(2, 1, 4)).shape == (2, 1, 1, 4)


@pytest.mark.parametrize(
    ("prior", "target", "message"),
    [
        (MaskPrior(), torch.full((1, 2, 2), 255), r"in 0..1, got 255 to 255. Give a binary mask"),
        (MaskPrior(3), torch.full((1, 2, 2), 255), r"in 0..2, got 255 to 255"),
        (MaskPrior(3), torch.full((1, 2, 2), 255), "or ignore_index to the label that the loss"),
        (MaskPrior(), torch.full((1, 2, 2), float("nan")), "in 0..1, got nan"),
        (MaskPrior(), torch.full((1, 2, 2), 2), "in 0..1, got 2 to 2"),
        (MaskPrior(3), torch.ones(1, 3, 2, 2), "add up to 1"),
        (ClassPrior(2), torch.tensor([-1.0, 1.0]), "in 0..1, got -1 to 1"),
        (MaskPrior(3), torch.zeros(1, 2), r"\(B, H, W\) or \(B, 3, H, W\), got \(1, 2\)"),
        (MaskPrior(3), torch.zeros(1, 2, 2, 2), r"got \(1, 2, 2, 2\)"),
    ],
)
def test_mask_prior_refuses_other_targets(prior: Prior, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prior.from_target(target)


def test_values_are_scaled_by_the_training_targets() -> None:
    prior = ValuePrior(2, mean=[1.0, 10.0], std=[2.0, 5.0])
    values = torch.tensor([[3.0, 0.0], [1.0, 15.0]])
    expected = torch.tensor([[1.0, -2.0], [0.0, 1.0]])
    assert torch.equal(prior.from_target(values), expected)
    assert torch.equal(prior.from_output(values), expected)
    assert torch.equal(prior.from_target(values.long()), expected)
    assert prior.from_output(values.double()).dtype == torch.float64


def test_statistics_may_be_whole_numbers() -> None:
    prior = ValuePrior(mean=1, std=2)
    assert prior.from_target(torch.tensor([2, 4])).flatten().tolist() == [0.5, 1.5]
    assert prior.mean.dtype == torch.float32


def test_a_batch_without_finite_targets_tells_nothing() -> None:
    prior = ValuePrior(2)
    prior.measure(torch.full((3, 2), torch.nan))
    assert not prior.fitted
    prior.measure(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    prior.measure(torch.full((3, 2), torch.inf))
    assert (prior.mean.tolist(), prior.std.tolist()) == ([2.0, 3.0], [1.0, 1.0])


def test_value_prior_measures_mean_and_spread_over_all_batches() -> None:
    prior, targets = ValuePrior(), [torch.tensor([1.0, 2.0]), torch.tensor([[6.0]])]
    assert not prior.fitted
    prior.fit(iter(targets))
    assert prior.fitted
    assert prior.mean.item() == 3.0
    assert prior.std.item() == pytest.approx((14 / 3) ** 0.5)  # of 4, 1, 9


def test_constant_targets_do_not_divide_by_zero() -> None:
    prior = ValuePrior()
    prior.fit([torch.full((4,), 7.0)])
    assert prior.from_target(torch.full((1,), 7.0)).tolist() == [[0.0]]


def test_large_targets_that_are_all_the_same_have_a_spread_of_one() -> None:
    prior = ValuePrior()
    prior.fit([torch.full((count,), 1e9 / 7, dtype=torch.float64) for count in (3, 7)])
    assert prior.std.item() == 1.0


def test_values_are_measured_anew_and_no_more_afterwards() -> None:
    prior = ValuePrior()
    prior.settle()  # of nothing
    assert prior.measuring
    prior.measure(torch.tensor([7.0]))
    for targets in ([torch.tensor([1.0, 3.0])], [torch.tensor([10.0, 20.0])]):
        prior.fit(targets)
        other = ValuePrior()
        other.load_state_dict(prior.state_dict())
        assert not prior.measuring
        assert not other.measuring
        mean, std = targets[0].mean().item(), targets[0].std(correction=0).item()
        assert (prior.mean.item(), prior.std.item()) == (mean, std)


@pytest.mark.parametrize("settled", [True, False])
def test_a_state_goes_on_measuring_unless_it_was_settled(settled: bool) -> None:
    prior, other = ValuePrior(), ValuePrior()
    prior.measure(torch.tensor([1.0]))
    if settled:
        prior.settle()
    other.load_state_dict(prior.state_dict())
    assert other.measuring != settled
    if not settled:
        other.measure(torch.tensor([3.0]))
        assert other.mean.item() == 2.0


RESUMED = {
    "all alike": [torch.full((2, 2), 7.0), torch.full((3, 2), 7.0)],
    "alike so far": [torch.full((2, 2), 7.0), torch.tensor([[9.0, 7.0]])],
    "a standard deviation of 1": [torch.tensor([[0.0, 2.0], [2.0, 0.0]]), torch.ones(4, 2)],
    "large": [torch.full((n, 2), 1e9 / 7, dtype=torch.float64) for n in (3, 7)],
    "none finite so far": [torch.full((2, 2), torch.nan), torch.tensor([[1.0, 4.0], [3.0, 4.0]])],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", RESUMED.values(), ids=RESUMED)
def test_a_resumed_prior_measures_what_one_that_goes_on_does(
    targets: list[Tensor], dtype: torch.dtype
) -> None:
    """The spread that stands for none is not taken for one that was measured."""
    prior, through = ValuePrior(2).to(dtype), ValuePrior(2).to(dtype)
    for each in targets:
        resumed = ValuePrior(2).to(dtype)
        resumed.load_state_dict(prior.state_dict())
        resumed.measure(each)
        through.measure(each)
        prior = resumed
    values = torch.cat(targets).double()
    values = values[values.isfinite().all(1)]
    spread = values.std(0, correction=0)
    spread = torch.where((values == values[0]).all(0), 1.0, spread)
    for one in (prior, through):
        torch.testing.assert_close(one.mean, values.mean(0).to(dtype))
        torch.testing.assert_close(one.std, spread.to(dtype))


def test_moments_outlive_a_change_of_type() -> None:
    prior = ValuePrior()
    prior.measure(torch.tensor([1000.0, 1001.0]))
    prior.half().float().measure(torch.tensor([1003.0]))
    expected = torch.tensor([1000.0, 1001.0, 1003.0])
    torch.testing.assert_close(prior.mean, expected.mean()[None])
    torch.testing.assert_close(prior.std, expected.std(correction=0)[None])


@pytest.mark.parametrize(("mean", "measuring"), [(2.0, False), (float("nan"), True)])
def test_a_state_of_version_0_1_0_has_no_count(mean: float, measuring: bool) -> None:
    prior = ValuePrior()
    prior.load_state_dict({"mean": torch.tensor([mean]), "std": torch.tensor([3.0])})
    assert prior.measuring == measuring
    assert prior.fitted != measuring
    if measuring:
        prior.measure(torch.tensor([1.0, 3.0]))
        assert prior.mean.item() == 2.0


class Centred(ValuePrior):
    """A prior of one's own: knows the mean of the targets from :meth:`fit` alone."""

    fitted = False
    measuring = Prior.measuring
    measure = Prior.measure

    def fit(self, targets: Iterable[Tensor]) -> None:
        self.mean.copy_(torch.cat(list(targets)).mean())
        self.fitted = True


def test_a_prior_of_ones_own_is_fitted_to_the_first_batch() -> None:
    prior = Centred(mean=0.0, std=1.0)
    assert prior.measuring
    prior.measure(torch.tensor([1.0, 3.0]))
    assert not prior.measuring
    assert prior.mean.item() == 2.0


def test_mean_and_spread_travel_in_the_state() -> None:
    prior, other = ValuePrior(2, mean=[1.0, 2.0], std=3.0), ValuePrior(2)
    other.load_state_dict(prior.state_dict())
    assert other.fitted
    assert other.mean.tolist() == [1.0, 2.0]
    assert other.std.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mean": 1.0}, "both mean and std or neither"),
        ({"mean": [1.0, 2.0, 3.0], "std": 1.0}, r"mean to be a number or 2 of them, got \[1.0"),
        ({"mean": [[1.0, 2.0]], "std": 1.0}, r"mean to be a number or 2 of them, got \[\[1.0"),
        ({"mean": 0.0, "std": [1.0, 0.0]}, r"std > 0, got \[1.0, 0.0\]"),
        ({"noise": -1.0}, "noise >= 0 standard deviations, got -1.0"),
        ({"neutral": "nothing"}, "none, zeros, uniform or constant, got 'nothing'"),
    ],
)
def test_value_prior_refuses_settings(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValuePrior(2, **args)


def test_value_prior_refuses_another_number_of_values() -> None:
    with pytest.raises(ValueError, match=r"ValuePrior\(size=2\) expected .* got \(4,\)"):
        ValuePrior(2, mean=0.0, std=1.0).from_output(torch.zeros(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassPrior(1), "at least 2 classes, got 1"),
        (lambda: ClassPrior(0), "at least 1 prior channel, got 0"),
        (lambda: MaskPrior(0), "at least 1 prior channel, got 0"),
        (lambda: ClassPrior(3, outputs="scores"), "'logits' or 'probabilities', got 'scores'"),  # type: ignore[arg-type]
        (lambda: MaskPrior(3, outputs="scores"), "'logits' or 'probabilities', got 'scores'"),  # type: ignore[arg-type]
    ],
)
def test_priors_refuse_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Outputs


def test_logits_become_probabilities_differentiably() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ClassPrior(3).from_output, logits)
    exps = [1.0, torch.e, 1 / torch.e]
    expected = torch.tensor([[value / sum(exps) for value in exps]], dtype=torch.float64)
    torch.testing.assert_close(ClassPrior(3).from_output(logits), expected, check_dtype=True)


def test_probabilities_stay_as_they_are() -> None:
    rows = torch.tensor([[0.2, 0.8]])
    assert torch.equal(ClassPrior(2, outputs="probabilities").from_output(rows), rows)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_a_single_logit_is_that_of_class_one(shape: tuple[int, ...]) -> None:
    logits = torch.tensor([0.0, 2.0]).reshape(shape)
    one = 1 / (1 + torch.exp(torch.tensor(-2.0)))
    expected = torch.tensor([[0.5, 0.5], [1 - one, one]])
    torch.testing.assert_close(ClassPrior(2).from_output(logits), expected)


def test_masks_from_logits() -> None:
    logits = torch.randn(2, 1, 3, 3)
    expected = 1 / (1 + (-logits).exp())
    torch.testing.assert_close(MaskPrior().from_output(logits), expected)
    torch.testing.assert_close(MaskPrior().from_output(logits[:, 0]), expected)
    classes = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(
        MaskPrior(4).from_output(classes), classes.exp() / classes.exp().sum(1, keepdim=True)
    )
    pair = classes[:, :2]
    expected = pair.exp() / pair.exp().sum(1, keepdim=True)
    torch.testing.assert_close(MaskPrior(2).from_output(pair), expected)


@pytest.mark.parametrize(
    ("prior", "output"),
    [
        (ClassPrior(3), torch.zeros(2, 4)),
        (ClassPrior(3), torch.zeros(2)),
        (MaskPrior(), torch.zeros(2, 2, 4, 4)),
        (MaskPrior(3), torch.zeros(2, 4, 4, 4)),
        (MaskPrior(3), torch.zeros(2, 4, 4)),
        (MaskPrior(3), torch.zeros(2, 3)),
    ],
)
def test_outputs_of_another_width_are_refused(prior: Prior, output: Tensor) -> None:
    with pytest.raises(ValueError, match="as many classes as the network has outputs"):
        prior.from_output(output)


# Neutral


@pytest.mark.parametrize(
    ("neutral", "expected"),
    [
        ("none", [0.0, 0.0]),
        ("zeros", [0.0, 0.0]),
        ("uniform", [0.5, 0.5]),
        ("constant", [-7.0, -7.0]),
    ],
)
def test_neutral_priors(neutral: Any, expected: list[float]) -> None:
    like = torch.zeros(1, dtype=torch.float64)
    prior = ClassPrior(2, neutral=neutral, neutral_value=-7.0)
    assert prior.neutral_is_zero == (expected == [0.0, 0.0])
    rows = prior.neutral_input(3, like)
    assert rows.dtype == torch.float64
    assert rows.tolist() == [expected] * 3
    maps = MaskPrior(2, neutral=neutral, neutral_value=-7.0).neutral_input(3, like)
    assert maps[:, :, 0, 0].tolist() == [[*expected, 0.0]] * 3  # the flag: nothing is given


def test_presence_flag_tells_a_value_from_unknown() -> None:
    prior = ValuePrior(2, mean=0.0, std=1.0)
    given, neutral = torch.zeros(1, 2), prior.neutral_input(1, torch.zeros(1))
    assert prior.as_input(given).tolist() == [[0.0, 0.0, 1.0]]
    assert neutral.tolist() == [[0.0, 0.0, 0.0]]
    assert prior.input_channels == 3
    assert ClassPrior(3).as_input(given) is given
    assert ClassPrior(3).input_channels == 3
    assert MaskPrior().as_input(torch.zeros(1, 1, 2, 2)).shape == (1, 2, 2, 2)


# Perturbation


def test_perturbed_labels_mix_in_a_random_class() -> None:
    generator_state()
    prior, labels = ClassPrior(4), torch.arange(4).repeat(500)
    rows = prior.perturb(prior.from_target(labels))
    torch.testing.assert_close(rows.sum(1), torch.ones(2000))
    assert rows.min() >= 0
    assert int((rows > 0).sum(1).max()) == 2
    own = rows.gather(1, labels[:, None])[:, 0]
    # E[r] + E[1 - r] / 4, and where the class was another, r is uniform
    assert own.mean().item() == pytest.approx(0.5 + 0.5 / 4, abs=0.02)
    mixed = own[own < 1]
    assert mixed.mean().item() == pytest.approx(0.5, abs=0.03)
    assert mixed.std().item() == pytest.approx(12**-0.5, abs=0.02)


def test_perturbed_values_have_noise_of_random_size() -> None:
    generator_state()
    noise = ValuePrior(mean=0.0, std=1.0, noise=2.0).perturb(torch.zeros(20000, 1))
    # variance E[s^2] = 4 / 3 for s ~ U(0, 2), and heavier tails than a normal
    assert noise.square().mean().item() == pytest.approx(4 / 3, rel=0.05)
    kurtosis = noise.pow(4).mean() / noise.square().mean() ** 2
    assert kurtosis.item() == pytest.approx(3 * (16 / 5) / (16 / 9), rel=0.15)


def test_perturbed_masks_mix_two_images() -> None:
    generator_state()
    maps = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    mixed = MaskPrior().perturb(maps)
    assert torch.equal(mixed, mixed[:, :, :1, :1].expand_as(mixed))  # one share an image
    generator_state()
    other = maps[torch.randperm(3)]
    share = torch.rand(3, 1, 1, 1)
    torch.testing.assert_close(mixed, share * maps + (1 - share) * other)


def test_a_mask_alone_in_its_batch_is_mixed_with_its_mirror_image() -> None:
    generator_state()
    mask = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    mixed = MaskPrior().perturb(mask)
    generator_state()
    torch.randperm(1)
    share = torch.rand(1).item()
    torch.testing.assert_close(mixed.flatten(), torch.tensor([share, 0.0, 0.0, 1 - share]))


@pytest.mark.parametrize(
    ("prior", "rows"),
    [
        (ClassPrior(3), torch.eye(3)),
        (ValuePrior(mean=0.0, std=1.0), torch.zeros(3, 1)),
        (MaskPrior(), torch.zeros(3, 1, 2, 2)),
    ],
)
def test_perturbation_is_seeded_and_leaves_its_argument_alone(prior: Prior, rows: Tensor) -> None:
    before = rows.clone()
    generator_state()
    first = prior.perturb(rows)
    generator_state()
    assert torch.equal(prior.perturb(rows), first)
    assert torch.equal(rows, before)
    assert first.shape == rows.shape
    for dtype in (torch.float32, torch.bfloat16):
        assert prior.perturb(rows.to(dtype)).dtype == dtype


def test_values_may_be_perturbed_by_nothing() -> None:
    rows = torch.randn(3, 1)
    assert torch.equal(ValuePrior(mean=0.0, std=1.0, noise=0.0).perturb(rows), rows)


@pytest.mark.parametrize(
    "prior",
    [
        ClassPrior(3, outputs="probabilities", neutral="uniform", ignore_index=-100),
        ClassPrior(3, context="batch"),
        ClassPrior(3, context="stream", frequencies="em", window=7),
        ValuePrior(2, noise=0.5, neutral="constant", neutral_value=-50.0),
        MaskPrior(4, outputs="probabilities", neutral="none"),
    ],
)
def test_init_args_make_an_equal_prior(prior: Prior) -> None:
    again = type(prior)(**prior.init_args())
    assert again.init_args() == prior.init_args()
    like = torch.zeros(1)
    assert torch.equal(again.neutral_input(2, like), prior.neutral_input(2, like))
    assert copy.deepcopy(prior).init_args() == prior.init_args()


# The mean of two outputs


@pytest.mark.parametrize(
    ("prior", "shape"),
    [
        (ClassPrior(3), (4, 3)),
        (ClassPrior(3, outputs="probabilities"), (4, 3)),
        (ClassPrior(2), (4,)),
        (ClassPrior(2), (4, 1)),
        (ValuePrior(2, mean=1.0, std=3.0), (4, 2)),
        (ValuePrior(mean=1.0, std=3.0), (4,)),
        (MaskPrior(), (4, 1, 2, 2)),
        (MaskPrior(), (4, 2, 2)),
        (MaskPrior(2), (4, 1, 2, 2)),
        (MaskPrior(3), (4, 3, 2, 2)),
        (MaskPrior(outputs="probabilities"), (4, 1, 2, 2)),
    ],
)
def test_mean_output_means_the_mean_in_label_space(prior: Prior, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first, second = (5 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    if getattr(prior, "outputs", "") == "probabilities":
        first, second = (x.softmax(1) if x.ndim == 2 else x.sigmoid() for x in (first, second))
    mean = prior.mean_output(first, second)
    assert mean.shape == first.shape
    expected = (prior.from_output(first) + prior.from_output(second)) / 2
    torch.testing.assert_close(prior.from_output(mean), expected)


def test_the_mean_of_logits_is_the_logarithm_of_mean_probabilities() -> None:
    mean = ClassPrior(3).mean_output(torch.randn(4, 3), torch.randn(4, 3))
    torch.testing.assert_close(mean.exp().sum(1), torch.ones(4))


def test_mean_of_extreme_logits_is_finite() -> None:
    first, second = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    torch.testing.assert_close(
        ClassPrior(2).mean_output(first, second).softmax(1), torch.tensor([[0.5, 0.5]])
    )
    one = ClassPrior(2).mean_output(torch.tensor([1000.0]), torch.tensor([-1000.0]))
    torch.testing.assert_close(one, torch.tensor([0.0]))


def test_a_prior_of_ones_own_is_asked_for_its_mean() -> None:
    class Own(ValuePrior):
        mean_output = Prior.mean_output

    with pytest.raises(NotImplementedError, match="Own to define mean_output"):
        Own().mean_output(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("prior", [ClassPrior(10), MaskPrior(10)])
def test_random_weights_leave_one_class_in_a_batch_a_few_or_all(prior: Prior) -> None:
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(13)
    shape = (-1,) if isinstance(prior, ClassPrior) else (-1, 1, 1)
    given = prior.from_target(labels.reshape(shape).expand(-1, *[2] * (len(shape) - 1)))
    shares = []
    for _ in range(200):
        weights = prior.weights(given)
        assert weights.shape == (130,)
        assert torch.equal(weights[:10], weights[-10:])
        shares.append((weights[:10] / weights[:10].sum()).sort().values)
    most, three = torch.stack(shares)[:, -1], torch.stack(shares)[:, -3:].sum(1)
    assert (most > 0.9).float().mean().item() == pytest.approx(0.18, abs=0.1)
    assert ((three > 0.9) & (most < 0.9)).float().mean().item() == pytest.approx(0.25, abs=0.1)
    assert (most < 0.2).float().mean().item() == pytest.approx(0.19, abs=0.1)


def test_random_weights_of_binary_masks_are_those_of_two_classes() -> None:
    torch.manual_seed(0)
    masks = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    low, mean, high = MaskPrior().weights(masks).tolist()
    assert mean == pytest.approx((low + high) / 2, abs=1e-5)
    assert low + high == pytest.approx(1.0, abs=1e-4)
    assert low != pytest.approx(high, abs=0.01)


def test_random_weights_of_values_tilt_them_to_either_side() -> None:
    torch.manual_seed(0)
    prior = ValuePrior(mean=0.0, std=1.0)
    values = torch.randn(20000, 1)
    means = []
    for _ in range(50):
        state = torch.get_rng_state()
        tilt = torch.randn(1).item()
        torch.set_rng_state(state)
        weights = prior.weights(values)
        found = float(weights @ values[:, 0])
        assert found == pytest.approx(tilt, abs=0.1 + 0.15 * tilt**2)
        means.append(found)
    assert min(means) < -0.5
    assert max(means) > 0.5
    odd = torch.tensor([[torch.nan], [0.0], [torch.inf], [1e30]])
    assert prior.weights(odd).isfinite().all()


def test_a_prior_of_ones_own_is_asked_for_weights() -> None:
    class Own(ClassPrior):
        weights = Prior.weights

    with pytest.raises(NotImplementedError, match="Own to define weights"):
        Own(2).weights(torch.eye(2))
