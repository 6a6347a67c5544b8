"""Independent labels: label space, what the network sees, distances, perturbation, refusals."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from it3_lightning import ClassPrior, FeatureInjection, ForwardArgument, LabelsPrior, MaskPrior
from it3_lightning.methods import Entropy, Idempotence
from it3_lightning.methods.terms import get_distance
from it3_lightning.priors import Prior


def both(present: Tensor) -> Tensor:
    return torch.stack([1 - present, present], dim=1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_labels_of_any_type_are_probabilities_of_absence_and_presence(dtype: torch.dtype) -> None:
    target = torch.tensor([[1, 0, 1], [0, 0, 0]]).to(dtype)
    prior = LabelsPrior(3).from_target(target)
    assert torch.equal(prior, both(target.to(prior.dtype)))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([[1, 0, 2]]), r"in 0..1, got 0 to 2. Give labels of 0 and 1"),
        (torch.tensor([[0.5, -0.5, 1.0]]), "got -0.5 to 1. Give labels"),
        (torch.tensor([[-1, 0, 1]]), "or set ignore_index to the value"),
        (torch.tensor([0, 1]), r"a target of shape \(B, 3\), got \(2,\). .* ClassPrior takes"),
        (torch.zeros(2, 4), r"a target of shape \(B, 3\), got \(2, 4\)"),
    ],
)
def test_labels_prior_refuses_other_targets(target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelsPrior(3).from_target(target)
    with pytest.raises(ValueError, match=r"an output of shape \(B, 3\), got \(2, 5\)"):
        LabelsPrior(3).from_output(torch.zeros(2, 5))


@pytest.mark.parametrize(
    "target",
    [torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1, 0, 1]]), torch.tensor([[1.5, -0.5, 0.0]])],
)
def test_what_is_no_distribution_over_classes_is_sent_to_the_labels_prior(target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"LabelsPrior\(3\) takes them\."):
        ClassPrior(3).from_target(target)


@pytest.mark.parametrize(
    ("prior", "outputs"),
    [
        (ClassPrior(3, outputs="probabilities"), torch.tensor([[2.0, -1.0, 0.0]])),
        (ClassPrior(3, outputs="probabilities"), torch.tensor([[0.9, 0.8, 0.1]])),
        (ClassPrior(2, outputs="probabilities"), torch.tensor([1.2, 0.3])),
        (LabelsPrior(3, outputs="probabilities"), torch.tensor([[0.5, -1.0, 0.0]])),
        (MaskPrior(1, outputs="probabilities"), torch.full((1, 1, 2, 2), 1.5)),
        (MaskPrior(3, outputs="probabilities"), torch.ones(1, 3, 2, 2)),
    ],
)
def test_outputs_that_are_no_probabilities_are_told(prior: Prior, outputs: Tensor) -> None:
    with pytest.raises(ValueError, match="Scores before a softmax or a sigmoid are outputs='logi"):
        prior.check_output(prior.from_output(outputs))
    args = {**prior.init_args(), "outputs": "logits"}
    logits = type(prior)(**args)
    logits.check_output(logits.from_output(outputs))


@pytest.mark.parametrize(
    ("neutral", "expected"),
    [("zeros", 0.0), ("none", 0.0), ("uniform", 0.5), ("constant", -7.0)],
)
def test_the_network_sees_presences_and_a_flag(neutral: Any, expected: float) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, prior: Tensor | None = None) -> Any:
            return prior

    prior = LabelsPrior(3, neutral=neutral, neutral_value=-7.0)
    net, argument = Net(), ForwardArgument()
    argument.attach(net, prior)
    labels, x = torch.tensor([[1.0, 0.0, 0.25]]), torch.zeros(1, 4)
    with argument.given(both(labels)):
        assert net(x).tolist() == [[1.0, 0.0, 0.25, 1.0]]
    assert prior.neutral_input(1, x).tolist() == [[expected] * 3 + [0.0]]


def test_labels_that_are_no_prior_yet_are_not_shown() -> None:
    prior = LabelsPrior(3)
    for labels in (torch.ones(2, 3), torch.ones(2, 3, 3), torch.ones(2, 2, 4)):
        with pytest.raises(ValueError, match=r"shape \(B, 2, 3\), .* Make it by from_target"):
            prior.joined(labels)


@pytest.mark.parametrize("neutral", ["zeros", "uniform"])
def test_an_embedder_takes_one_number_for_each_label(neutral: Any) -> None:
    layer, injection = nn.Linear(4, 5), FeatureInjection("0", hidden=6)
    injection.attach(nn.Sequential(layer), LabelsPrior(3, neutral=neutral))
    embedder: Any = injection.embedders["0"]
    nn.init.normal_(embedder.last.weight)
    present, x = torch.rand(2, 3), torch.randn(2, 4)
    expected = embedder.last(embedder.first(present).relu())
    if neutral == "uniform":
        expected = expected - embedder.last(embedder.first(torch.full((3,), 0.5)).relu())
    with injection.given(both(present)):
        torch.testing.assert_close(layer(x), layer.forward(x) + expected)


def test_distances_are_those_of_two_classes_averaged_over_the_labels() -> None:
    p, q = torch.rand(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).mean(1)

    expected = {
        "l2": 2 * (p - q).square().mean(1),
        "l1": 2 * (p - q).abs().mean(1),
        "kl": kl(p, q),
        "js": (kl(p, m) + kl(q, m)) / 2,
        "cross_entropy": -(q * p.log() + (1 - q) * (1 - p).log()).mean(1),
    }
    for name, values in expected.items():
        found = get_distance(name)(both(p), both(q))  # type: ignore[arg-type]
        torch.testing.assert_close(found, values)


def test_reliable_are_samples_whose_labels_are_mostly_clear() -> None:
    first = torch.tensor([[0.9, 0.1, 0.95], [0.5, 0.6, 0.4], [0.9, 0.1, 0.9]])
    second = torch.tensor([[0.8, 0.2, 0.90], [0.5, 0.6, 0.4], [0.1, 0.9, 0.1]])
    found = Idempotence()(both(first), lambda _: both(second)).reliable
    assert found.tolist() == [True, False, False]
    entropy = Entropy(reliability=None)
    p = first.double()
    expected = -(p * p.log() + (1 - p) * (1 - p).log()).mean(1)
    measure = entropy(both(p), lambda prior: prior).measure
    torch.testing.assert_close(measure, expected)


def test_perturbed_labels_are_mixed_with_those_of_another_sample() -> None:
    prior, rows = LabelsPrior(4), both((torch.rand(5, 4) < 0.5).float())
    torch.manual_seed(3)
    mixed = prior.perturb(rows)
    torch.manual_seed(3)
    drawn, share = torch.randperm(5), torch.rand(5, 1, 1)
    others = [rows[d] if d != i else rows[i].flip(1) for i, d in enumerate(drawn.tolist())]
    torch.testing.assert_close(mixed, share * rows + (1 - share) * torch.stack(others))
    torch.testing.assert_close(mixed.sum(1), torch.ones(5, 4))


def test_random_weights_make_some_labels_frequent() -> None:
    torch.manual_seed(0)
    rows = both(torch.eye(4)[torch.arange(4).repeat(3)])
    weights = LabelsPrior(4).weights(rows)
    assert weights.shape == (12,)
    torch.testing.assert_close(weights[:4], weights[4:8])
    assert weights[:4].max() > 2 * weights[:4].min()


def test_extreme_logits_come_back_finite() -> None:
    prior, logits = LabelsPrior(2), torch.tensor([[200.0, -200.0]])
    again = prior.to_output(prior.from_output(logits), logits)
    assert again.isfinite().all()
    assert again.sign().tolist() == [[1.0, -1.0]]


def test_probabilities_stay_what_they_are_and_their_mean_is_a_mean() -> None:
    prior, first, second = LabelsPrior(3, outputs="probabilities"), *torch.rand(2, 4, 3)
    labels = prior.from_output(first)
    assert torch.equal(labels[:, 1], first)
    assert torch.equal(prior.to_output(labels, second), first)
    assert torch.equal(prior.mean_output(first, second), (first + second) / 2)


def test_settings_and_types() -> None:
    with pytest.raises(ValueError, match="'logits' or 'probabilities', got 'scores'"):
        LabelsPrior(3, outputs=cast(Any, "scores"))
    rows = both(torch.eye(3)).bfloat16()
    assert LabelsPrior(3).perturb(rows).dtype == torch.bfloat16
    logits = torch.randn(2, 3).bfloat16()
    labels = LabelsPrior(3).from_output(logits)
    assert labels.dtype == torch.float32
    assert LabelsPrior(3).to_output(labels, logits).dtype == torch.bfloat16


def test_known_are_samples_with_some_label() -> None:
    prior = LabelsPrior(2, ignore_index=-1)
    found = prior.known(torch.tensor([[1, -1], [-1, -1], [0, 1]]))
    assert found is not None
    assert found.tolist() == [True, False, True]
    assert prior.known(torch.tensor([[1, -1], [0, 1]])) is None
