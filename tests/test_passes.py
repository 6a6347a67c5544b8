"""The loss and the gradients of every kind of pass, against the same written out by hand."""

from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from reference import ToyNet
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from toy import Batch, IT3Net, LitNet, doubles, parts, quiet, samples, seeded

from it3_lightning import ClassPrior, DualPass, IT3Mixin

Grads = dict[str, Tensor]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


class Recorded(Callback):
    """Seeds the first step, and keeps its loss and gradients."""

    def __init__(self) -> None:
        self.grads: Grads = {}
        self.loss = torch.tensor(0.0)

    def on_train_batch_start(self, *_: Any) -> None:
        torch.manual_seed(7)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        named = pl_module.named_parameters()
        self.grads = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.loss = outputs["loss"]


def one(batch: Any) -> Any:
    """Serve one batch, as it is."""
    return DataLoader(cast(Any, [batch]), batch_size=None)


def step_once(model: LightningModule, batch: Any) -> Recorded:
    """Train on one batch, with the global generator at seed 7 when the step starts."""
    recorded = Recorded()
    quiet(max_steps=1, callbacks=[recorded]).fit(model, one(batch))
    return recorded


def by_hand(model: IT3Net, loss: Callable[[Callable[..., Tensor]], Tensor]) -> Recorded:
    """Differentiate a loss of f(x, p), written with plain functions of the model's weights."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    embedder = "it3_conditioning.embedders.net-dense"

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def f(x: Tensor, prior: Tensor | None) -> Tensor:
        x = F.conv2d(x, weights["net.conv.weight"], weights["net.conv.bias"])
        affine = weights["net.bn.weight"], weights["net.bn.bias"]
        x = F.batch_norm(x, None, None, *affine, training=True).relu().flatten(1)
        features = linear("net.dense", x)
        if prior is not None:
            features = features + linear(
                f"{embedder}.last", linear(f"{embedder}.first", prior).relu()
            )
        return linear("net.head", features.relu())

    recorded = Recorded()
    recorded.loss = loss(f)
    grads = torch.autograd.grad(recorded.loss, list(weights.values()), allow_unused=True)
    recorded.grads = {
        n: torch.zeros_like(weights[n]) if g is None else g
        for n, g in zip(weights, grads, strict=True)
    }
    return recorded


def agree(actual: Recorded, expected: Recorded) -> None:
    torch.testing.assert_close(actual.loss, expected.loss.detach())
    assert actual.grads.keys() == expected.grads.keys()
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(actual.grads[name], gradient, msg=name)


def net(dual: DualPass | None = None, **args: Any) -> IT3Net:
    model: IT3Net = seeded(IT3Net(**parts(dual_pass=dual, **args)))
    return model


X, Y = samples(6)[0].double(), samples(6)[1]
ONE_HOT = F.one_hot(Y, 3).double()
EXACT = DualPass(perturb_prior=False)


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


class DictStep(LitNet):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "preds": logits.detach()}


class StepWithoutIndex(LitNet):
    def training_step(self, batch: Batch) -> Any:  # type: ignore[override]
        return F.cross_entropy(self(batch[0]), batch[1])


class NamedBatch(LitNet):
    """Takes the label out of a dict batch, as many steps do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, dict):
            return F.cross_entropy(self(batch["image"]), batch.pop("label"))
        return F.cross_entropy(self(batch.image), batch.label)


def mixed(base: type[LitNet], **args: Any) -> IT3Net:
    model: IT3Net = seeded(type("IT3Foreign", (IT3Mixin, base), {})(**parts(**args)))
    return model


@dataclass
class Pair:
    image: Tensor
    label: Tensor


Named = namedtuple("Named", ["image", "label"])


@pytest.mark.parametrize(
    ("base", "batch"),
    [
        (LitNet, (X, Y)),
        (LitNet, [X, Y]),
        (DictStep, (X, Y)),
        (StepWithoutIndex, (X, Y)),
        (NamedBatch, {"image": X, "label": Y}),
        (NamedBatch, Pair(X, Y)),
        (NamedBatch, Named(X, Y)),
    ],
    ids=["tuple", "list", "dict step", "no batch_idx", "dict", "dataclass", "named tuple"],
)
@pytest.mark.parametrize("perturbed", [False, True])
def test_any_step_and_any_batch_give_the_same_loss(
    base: type[LitNet], batch: Any, perturbed: bool
) -> None:
    perturb = (lambda x: x * 0.5) if perturbed else None
    dual = DualPass(perturb_prior=False, perturb_inputs=perturb)
    shown = X * 0.5 if perturbed else X
    expected = by_hand(
        net(), lambda f: F.cross_entropy(f(X, None), Y) + F.cross_entropy(f(shown, ONE_HOT), Y)
    )
    agree(step_once(mixed(base, dual_pass=dual), batch), expected)


def test_dict_of_a_step_keeps_its_other_entries_from_the_neutral_pass() -> None:
    kept: list[Tensor] = []

    class Keep(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
        ) -> None:
            kept.append(outputs["preds"])

    twin = net()
    twin.train()
    expected = twin(X).detach()
    model = mixed(DictStep, dual_pass=EXACT)
    quiet(max_steps=1, callbacks=[Keep()]).fit(model, one((X, Y)))
    torch.testing.assert_close(kept[0], expected)


def test_step_that_returns_none_skips_the_batch() -> None:
    class Skips(LitNet):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None

    model = mixed(Skips)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="returned `None`"):
        quiet().fit(model, one((X, Y)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_step_that_returns_something_else_is_refused() -> None:
    class Odd(LitNet):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return str(self(batch[0]).sum())

    with pytest.raises(TypeError, match=r"to return a loss tensor.*got str"):
        quiet().fit(mixed(Odd), one((X, Y)))


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
