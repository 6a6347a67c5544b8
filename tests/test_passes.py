"""The loss and the gradients of every kind of pass, against the same written out by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.by_hand import EXACT, ONE_HOT, X, Y, agree, by_hand, step_once
from helpers.reference import ToyNet
from helpers.toy import Batch, IT3Net, LitNet, doubles, parts, seeded
from helpers.toy import net as any_net
from torch import Tensor
from torch.nn import functional as F

from it3_lightning import ClassPrior, DualPass


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def net(dual: DualPass | None = None, **args: Any) -> Any:
    return any_net(dual_pass=dual, **args)


def test_loss_and_gradients_are_those_of_both_passes() -> None:
    expected = by_hand(
        net(EXACT), lambda f: F.cross_entropy(f(X, None), Y) + F.cross_entropy(f(X, ONE_HOT), Y)
    )
    agree(step_once(net(EXACT), (X, Y)), expected)
    assert expected.grads["it3_conditioning.embedders.net-dense.first.weight"].abs().max() > 0


def test_prior_is_perturbed_by_a_random_class_and_share() -> None:
    torch.manual_seed(7)
    other, share = torch.randint(3, (6,)), torch.rand(6, 1)
    prior = share * ONE_HOT + (1 - share) * F.one_hot(other, 3)
    expected = by_hand(
        net(), lambda f: F.cross_entropy(f(X, None), Y) + F.cross_entropy(f(X, prior), Y)
    )
    agree(step_once(net(DualPass()), (X, Y)), expected)


def test_label_weight_scales_the_label_pass_alone() -> None:
    dual = DualPass(label_weight=0.25, perturb_prior=False)
    expected = by_hand(
        net(), lambda f: F.cross_entropy(f(X, None), Y) + 0.25 * F.cross_entropy(f(X, ONE_HOT), Y)
    )
    agree(step_once(net(dual), (X, Y)), expected)


def test_single_pass_shows_each_sample_its_prior_or_none() -> None:
    dual = DualPass(passes="single", neutral_share=0.4, perturb_prior=False)
    torch.manual_seed(7)
    present = torch.rand(6) >= 0.4
    assert present.any()
    assert not present.all()

    def loss(f: Callable[..., Tensor]) -> Tensor:
        return F.cross_entropy(torch.where(present[:, None], f(X, ONE_HOT), f(X, None)), Y)

    agree(step_once(net(dual), (X, Y)), by_hand(net(), loss))


def test_single_pass_perturbs_the_inputs_of_those_that_see_a_prior() -> None:
    dual = DualPass(passes="single", perturb_prior=False, perturb_inputs=lambda x: 2 * x)
    torch.manual_seed(7)
    present = torch.rand(6) >= 0.5
    mixed = torch.where(present.reshape(-1, 1, 1, 1), 2 * X, X)

    def loss(f: Callable[..., Tensor]) -> Tensor:
        return F.cross_entropy(torch.where(present[:, None], f(mixed, ONE_HOT), f(mixed, None)), Y)

    agree(step_once(net(dual), (X, Y)), by_hand(net(), loss))


def test_third_pass_sees_the_own_prediction_without_a_gradient_to_it() -> None:
    dual = DualPass(third_pass=True, label_weight=0.5, perturb_prior=False)

    def loss(f: Callable[..., Tensor]) -> Tensor:
        own = f(X, None).softmax(1).detach()
        with_priors = F.cross_entropy(f(X, ONE_HOT), Y) + F.cross_entropy(f(X, own), Y)
        return F.cross_entropy(f(X, None), Y) + 0.5 * with_priors

    agree(step_once(net(dual), (X, Y)), by_hand(net(), loss))


def test_own_share_replaces_labels_by_predictions_on_the_same_inputs() -> None:
    dual = DualPass(own_share=0.5, perturb_prior=False, perturb_inputs=lambda x: x + 1)
    torch.manual_seed(7)
    chosen = (torch.rand(6) < 0.5)[:, None]

    def loss(f: Callable[..., Tensor]) -> Tensor:
        prior = torch.where(chosen, f(X + 1, None).softmax(1).detach(), ONE_HOT)
        return F.cross_entropy(f(X, None), Y) + F.cross_entropy(f(X + 1, prior), Y)

    agree(step_once(net(dual), (X, Y)), by_hand(net(), loss))


def test_post_hoc_loss_is_the_label_pass_through_a_network_in_eval_mode() -> None:
    model = net(EXACT, train="conditioning")
    twin = net(EXACT)
    twin.eval()
    with torch.no_grad():
        label = F.cross_entropy(twin.predict_with(X, ONE_HOT), Y)
    recorded = step_once(model, (X, Y))
    torch.testing.assert_close(recorded.loss, label)
    moved = {name for name, gradient in recorded.grads.items() if gradient.abs().max() > 0}
    assert moved == {n for n, _ in model.named_parameters() if n.startswith("it3_conditioning")}


def test_post_hoc_third_pass_adds_the_loss_on_the_own_prediction() -> None:
    dual = DualPass(third_pass=True, perturb_prior=False)
    twin = net()
    twin.eval()
    with torch.no_grad():
        own = twin.predict_with(X, None).softmax(1)
        losses = [F.cross_entropy(twin.predict_with(X, prior), Y) for prior in (ONE_HOT, own)]
    recorded = step_once(net(dual, train="conditioning"), (X, Y))
    torch.testing.assert_close(recorded.loss, losses[0] + losses[1])


def test_off_is_the_plain_module() -> None:
    plain = seeded(LitNet())
    plain.load_state_dict(net().state_dict(), strict=False)
    expected, actual = step_once(plain, (X, Y)), step_once(net(train="off"), (X, Y))
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=0)
    for name, gradient in expected.grads.items():
        assert torch.equal(actual.grads[name], gradient)


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_it3_loss_in_a_step_of_ones_own(train: Any) -> None:
    class Own(IT3Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.it3_loss(batch, F.cross_entropy)

    own = step_once(seeded(Own(**parts(dual_pass=EXACT, train=train))), (X, Y))
    agree(own, step_once(net(EXACT, train=train), (X, Y)))


def test_predict_with_is_the_conditioned_forward_pass() -> None:
    model = net()
    expected = by_hand(model, lambda f: f(X, ONE_HOT).sum() + 10 * f(X, None).sum())
    model.train()
    actual = model.predict_with(X, ONE_HOT).sum() + 10 * model.predict_with(X, None).sum()
    torch.testing.assert_close(actual.detach(), expected.loss.detach())


def test_priors_of_a_class_prior_are_one_hot_and_softmax() -> None:
    prior = ClassPrior(3)
    assert torch.equal(prior.from_target(Y), ONE_HOT)
    logits = ToyNet()(X)
    torch.testing.assert_close(prior.from_output(logits), logits.softmax(1))
