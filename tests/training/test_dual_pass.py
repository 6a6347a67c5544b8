"""The training loss against the same written out by hand: passes, steps, batches."""

import functools
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from helpers.by_hand import EXACT, ONE_HOT, X, Y, agree, by_hand, one, step_once
from helpers.reference import ToyNet
from helpers.toy import Batch, IT3Net, LitNet, doubles, ending, net, parts, quiet, seeded
from helpers.toy import net as any_net
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from it3_lightning import ClassPrior, DualPass, IT3Mixin


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def made(dual: DualPass | None = None, **args: Any) -> Any:
    return any_net(dual_pass=dual, **args)


def test_loss_and_gradients_are_those_of_both_passes() -> None:
    expected = by_hand(
        made(EXACT), lambda f: F.cross_entropy(f(X, None), Y) + F.cross_entropy(f(X, ONE_HOT), Y)
    )
    agree(step_once(made(EXACT), (X, Y)), expected)
    assert expected.grads["it3_conditioning.embedders.net-dense.first.weight"].abs().max() > 0


def test_prior_is_perturbed_by_a_random_class_and_share() -> None:
    torch.manual_seed(7)
    other, share = torch.randint(3, (6,)), torch.rand(6, 1)
    prior = share * ONE_HOT + (1 - share) * F.one_hot(other, 3)
    expected = by_hand(
        made(), lambda f: F.cross_entropy(f(X, None), Y) + F.cross_entropy(f(X, prior), Y)
    )
    agree(step_once(made(DualPass()), (X, Y)), expected)


def test_label_weight_scales_the_label_pass_alone() -> None:
    dual = DualPass(label_weight=0.25, perturb_prior=False)
    expected = by_hand(
        made(), lambda f: F.cross_entropy(f(X, None), Y) + 0.25 * F.cross_entropy(f(X, ONE_HOT), Y)
    )
    agree(step_once(made(dual), (X, Y)), expected)


def test_single_pass_shows_each_sample_its_prior_or_none() -> None:
    dual = DualPass(passes="single", neutral_share=0.4, perturb_prior=False)
    torch.manual_seed(7)
    present = torch.rand(6) >= 0.4
    assert present.any()
    assert not present.all()

    def loss(f: Callable[..., Tensor]) -> Tensor:
        return F.cross_entropy(torch.where(present[:, None], f(X, ONE_HOT), f(X, None)), Y)

    agree(step_once(made(dual), (X, Y)), by_hand(made(), loss))


def test_single_pass_perturbs_the_inputs_of_those_that_see_a_prior() -> None:
    dual = DualPass(passes="single", perturb_prior=False, perturb_inputs=lambda x: 2 * x)
    torch.manual_seed(7)
    present = torch.rand(6) >= 0.5
    mixed = torch.where(present.reshape(-1, 1, 1, 1), 2 * X, X)

    def loss(f: Callable[..., Tensor]) -> Tensor:
        return F.cross_entropy(torch.where(present[:, None], f(mixed, ONE_HOT), f(mixed, None)), Y)

    agree(step_once(made(dual), (X, Y)), by_hand(made(), loss))


def test_third_pass_sees_the_own_prediction_without_a_gradient_to_it() -> None:
    dual = DualPass(third_pass=True, label_weight=0.5, perturb_prior=False)

    def loss(f: Callable[..., Tensor]) -> Tensor:
        own = f(X, None).softmax(1).detach()
        with_priors = F.cross_entropy(f(X, ONE_HOT), Y) + F.cross_entropy(f(X, own), Y)
        return F.cross_entropy(f(X, None), Y) + 0.5 * with_priors

    agree(step_once(made(dual), (X, Y)), by_hand(made(), loss))


def test_own_share_replaces_labels_by_predictions_on_the_same_inputs() -> None:
    dual = DualPass(own_share=0.5, perturb_prior=False, perturb_inputs=lambda x: x + 1)
    torch.manual_seed(7)
    chosen = (torch.rand(6) < 0.5)[:, None]

    def loss(f: Callable[..., Tensor]) -> Tensor:
        prior = torch.where(chosen, f(X + 1, None).softmax(1).detach(), ONE_HOT)
        return F.cross_entropy(f(X, None), Y) + F.cross_entropy(f(X + 1, prior), Y)

    agree(step_once(made(dual), (X, Y)), by_hand(made(), loss))


def test_post_hoc_loss_is_the_label_pass_through_a_network_in_eval_mode() -> None:
    model = made(EXACT, train="conditioning")
    twin = made(EXACT)
    twin.eval()
    with torch.no_grad():
        label = F.cross_entropy(twin.predict_with(X, ONE_HOT), Y)
    recorded = step_once(model, (X, Y))
    torch.testing.assert_close(recorded.loss, label)
    moved = {name for name, gradient in recorded.grads.items() if gradient.abs().max() > 0}
    assert moved == {n for n, _ in model.named_parameters() if n.startswith("it3_conditioning")}


def test_post_hoc_third_pass_adds_the_loss_on_the_own_prediction() -> None:
    dual = DualPass(third_pass=True, perturb_prior=False)
    twin = made()
    twin.eval()
    with torch.no_grad():
        own = twin.predict_with(X, None).softmax(1)
        losses = [F.cross_entropy(twin.predict_with(X, prior), Y) for prior in (ONE_HOT, own)]
    recorded = step_once(made(dual, train="conditioning"), (X, Y))
    torch.testing.assert_close(recorded.loss, losses[0] + losses[1])


def test_off_is_the_plain_module() -> None:
    plain = seeded(LitNet())
    plain.load_state_dict(made().state_dict(), strict=False)
    expected, actual = step_once(plain, (X, Y)), step_once(made(train="off"), (X, Y))
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=0)
    for name, gradient in expected.grads.items():
        assert torch.equal(actual.grads[name], gradient)


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_it3_loss_in_a_step_of_ones_own(train: Any) -> None:
    class Own(IT3Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.it3_loss(batch, F.cross_entropy)

    own = step_once(seeded(Own(**parts(dual_pass=EXACT, train=train))), (X, Y))
    agree(own, step_once(made(EXACT, train=train), (X, Y)))


def test_predict_with_is_the_conditioned_forward_pass() -> None:
    model = made()
    expected = by_hand(model, lambda f: f(X, ONE_HOT).sum() + 10 * f(X, None).sum())
    model.train()
    actual = model.predict_with(X, ONE_HOT).sum() + 10 * model.predict_with(X, None).sum()
    torch.testing.assert_close(actual.detach(), expected.loss.detach())


def test_priors_of_a_class_prior_are_one_hot_and_softmax() -> None:
    prior = ClassPrior(3)
    assert torch.equal(prior.from_target(Y), ONE_HOT)
    logits = ToyNet()(X)
    torch.testing.assert_close(prior.from_output(logits), logits.softmax(1))


# Statistics and samples of the label pass


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


def statistics(model: Any) -> list[Tensor]:
    bn = model.net.bn
    return [bn.running_mean.clone(), bn.running_var.clone(), bn.num_batches_tracked.clone()]


@pytest.mark.parametrize("own_share", [0.0, 1.0])
def test_post_hoc_passes_by_batch_statistics_are_those_of_the_batch(own_share: float) -> None:
    dual = DualPass(norm_stats="batch", own_share=own_share, third_pass=True, perturb_prior=False)

    def loss(f: Callable[..., Tensor]) -> Tensor:
        own = f(X, None).softmax(1).detach()
        first = own if own_share else ONE_HOT
        return F.cross_entropy(f(X, first), Y) + F.cross_entropy(f(X, own), Y)

    model = made(dual, train="conditioning")
    before = statistics(model)
    recorded, expected = step_once(model, (X, Y)), by_hand(made(), loss)
    torch.testing.assert_close(recorded.loss, expected.loss.detach())
    for name, gradient in recorded.grads.items():
        theirs = expected.grads[name] if name.startswith("it3_") else torch.zeros_like(gradient)
        torch.testing.assert_close(gradient, theirs, msg=name)
    assert all(map(torch.equal, before, statistics(model)))
    assert model.net.bn.track_running_stats


def test_joint_label_pass_by_batch_statistics_moves_no_running_ones() -> None:
    dual, plain = DualPass(norm_stats="batch", perturb_prior=False), seeded(LitNet())
    plain.load_state_dict(made().state_dict(), strict=False)
    model = made(dual)
    agree(step_once(model, (X, Y)), step_once(made(EXACT), (X, Y)))
    step_once(plain, (X, Y))  # its one pass has moved them as the neutral pass does
    assert all(map(torch.equal, statistics(plain), statistics(model)))


def test_one_sample_goes_by_the_source_statistics() -> None:
    batches = [
        step_once(made(dual, train="conditioning"), (X[:1], Y[:1]))
        for dual in (DualPass(norm_stats="batch", perturb_prior=False), EXACT)
    ]
    assert torch.equal(batches[0].loss, batches[1].loss)


@pytest.mark.parametrize("error", [ValueError("a step"), KeyboardInterrupt()])
def test_a_step_that_fails_leaves_the_layers_their_modes(error: BaseException) -> None:
    class Fails(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            if not self.net.bn.track_running_stats:
                raise error
            return super().forward(x)

    dual = DualPass(norm_stats="batch")
    model = seeded(Fails(**parts(dual_pass=dual, train="conditioning")))
    modes = [(layer.training, vars(layer).get("track_running_stats")) for layer in model.modules()]
    with ending(error):
        quiet().fit(model, one((X, Y)))
    after = [(layer.training, vars(layer).get("track_running_stats")) for layer in model.modules()]
    assert after == modes


def redrawn() -> list[int]:
    """Draw samples of Y as the first step does: by Dirichlet weights of their classes."""
    torch.manual_seed(7)
    torch.rand(())
    strength = torch.empty(()).uniform_(math.log(0.01), math.log(10.0)).exp().item()
    frequencies = torch.distributions.Dirichlet(torch.full((3,), strength)).sample()
    rows: list[int] = torch.multinomial(frequencies[Y] + 1e-6, 6, replacement=True).tolist()
    return rows


@pytest.mark.parametrize("batch", [(X, Y), {"image": X, "label": Y}, Pair(X, Y), Named(X, Y)])
def test_unequal_batches_are_drawn_by_random_weights_of_the_classes(batch: Any) -> None:
    rows = redrawn()
    assert len(set(Y[rows].tolist())) < len(set(Y.tolist()))

    def loss(f: Callable[..., Tensor]) -> Tensor:
        label = F.cross_entropy(f(X[rows] + 1, ONE_HOT[rows]), Y[rows])
        own = f(X[rows], None).softmax(1).detach()
        return F.cross_entropy(f(X, None), Y) + label + F.cross_entropy(f(X[rows], own), Y[rows])

    dual = DualPass(
        unequal_share=1.0, perturb_prior=False, perturb_inputs=lambda x: x + 1, third_pass=True
    )
    base = LitNet if isinstance(batch, tuple) and not isinstance(batch, Named) else NamedBatch
    agree(step_once(mixed(base, dual_pass=dual), batch), by_hand(made(), loss))


def test_it3_loss_sees_the_labels_of_the_samples_drawn() -> None:
    class Own(IT3Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.it3_loss(batch, F.cross_entropy)

    dual = DualPass(unequal_share=1.0, perturb_prior=False)
    own = step_once(seeded(Own(**parts(dual_pass=dual))), (X, Y))
    agree(own, step_once(made(dual), (X, Y)))


def test_a_share_of_the_batches_is_drawn_anew() -> None:
    seen: list[int] = []

    class Looks(LitNet):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            seen.append(len(torch.unique(batch[0].flatten(1), dim=0)))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    dual = DualPass(unequal_share=0.3, perturb_inputs=None)
    batches = DataLoader(cast(Any, [(X, Y)] * 200), batch_size=None)
    quiet().fit(mixed(Looks, dual_pass=dual, lr=0.0), batches)
    label, neutral = seen[::2], seen[1::2]
    assert neutral == [6] * 200
    assert sum(count < 6 for count in label) / 200 == pytest.approx(0.3, abs=0.1)


def test_batches_without_a_row_for_each_sample_are_not_drawn_anew() -> None:
    class Sideways(IT3Net):
        def it3_sample_dims(self, inputs: Any) -> Any:
            return 0

    class Beside(LitNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    dual = DualPass(unequal_share=0.1)
    message = "a row for each of its 6 samples.*Use unequal_share=0"
    with pytest.raises(ValueError, match=message):
        quiet().fit(seeded(Sideways(**parts(dual_pass=dual))), one((X, Y)))
    batch = {"weights": torch.ones(2), "image": X, "label": Y}
    with pytest.raises(ValueError, match=message):
        quiet().fit(mixed(Beside, dual_pass=dual), one(batch))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"norm_stats": "mixed"}, "norm_stats 'source' or 'batch', got 'mixed'"),
        ({"unequal_share": 1.5}, "unequal_share in .0, 1., got 1.5"),
        ({"unequal_share": 0.5, "passes": "single"}, "passes='dual' with norm_stats='batch' or"),
        ({"norm_stats": "batch", "passes": "single"}, "got 'single': its one pass"),
    ],
)
def test_statistics_and_samples_refuse_what_makes_no_sense(
    args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DualPass(**args)


# Any step on any batch


class DictStep(LitNet):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "preds": logits.detach()}


class StepWithoutIndex(LitNet):
    def training_step(self, batch: Batch) -> Any:  # type: ignore[override]
        return F.cross_entropy(self(batch[0]), batch[1])


def checked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a step as libraries do."""

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return wrapper


class Decorated(LitNet):
    @checked
    def training_step(self, batch: Batch) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


class TakesAnything(LitNet):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        (images, labels), index = args
        assert (index, kwargs) == (0, {})
        return F.cross_entropy(self(images), labels)


@pytest.mark.parametrize(
    ("base", "batch"),
    [
        (LitNet, (X, Y)),
        (LitNet, [X, Y]),
        (DictStep, (X, Y)),
        (StepWithoutIndex, (X, Y)),
        (Decorated, (X, Y)),
        (TakesAnything, (X, Y)),
        (NamedBatch, {"image": X, "label": Y}),
        (NamedBatch, Pair(X, Y)),
        (NamedBatch, Named(X, Y)),
    ],
    ids=[
        *("tuple", "list", "dict step", "no batch_idx", "decorated", "anything"),
        *("dict", "dataclass", "named tuple"),
    ],
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


def test_step_may_be_called_by_keyword() -> None:
    model = net(dual_pass=EXACT, train="off")
    model.log = lambda *_, **__: None
    expected = model.training_step((X, Y), 0)
    assert torch.equal(model.training_step(batch=(X, Y), batch_idx=0), expected)


class Scaled(LitNet):
    """Takes two inputs, one of them not a tensor."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x * scale)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(*batch["inputs"]), batch["label"])


def test_single_pass_mixes_tensors_of_nested_inputs_and_takes_the_rest_as_it_is() -> None:
    def perturb(inputs: Any) -> Any:
        return inputs[0] + 1, inputs[1]

    dual = DualPass(passes="single", perturb_prior=False, perturb_inputs=perturb)
    torch.manual_seed(7)
    present = torch.rand(6) >= 0.5
    mixture = 0.5 * torch.where(present.reshape(-1, 1, 1, 1), X + 1, X)

    def loss(f: Callable[..., Tensor]) -> Tensor:
        shown = torch.where(present[:, None], f(mixture, ONE_HOT), f(mixture, None))
        return F.cross_entropy(shown, Y)

    batch = {"inputs": (X, 0.5), "label": Y}
    agree(step_once(mixed(Scaled, dual_pass=dual), batch), by_hand(net(), loss))


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


def test_step_that_returns_none_skips_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Closure, "warning_cache", type(Closure.warning_cache)())  # said once

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
