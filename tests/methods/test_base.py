"""What methods are made of: objectives, steps, predictions, and what they take of source data."""

import copy
import threading
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.method_runs import Validates, from_yaml
from helpers.modules import bits, changed, same, stream, toy
from helpers.reference import OPTIMIZERS
from helpers.toy import LitNet, differing, everything, loader, parts, quiet, samples, seeded
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from it3_lightning import ClassPrior, IT3Mixin, MaskPrior, TestTimeCallback, ValuePrior
from it3_lightning.engine import Adaptation, BatchAdapter, Settings, adapt
from it3_lightning.engine.types import Plain
from it3_lightning.methods import Entropy, Objective, Passes, Steps, TestTimeMethod
from it3_lightning.priors import Prior


def test_unreliable_samples_have_no_gradient_even_if_not_finite() -> None:
    measure = torch.tensor([1.0, torch.inf, 3.0], requires_grad=True)
    loss = Objective(measure, torch.tensor([True, False, True])).loss()
    (gradient,) = torch.autograd.grad(loss, measure)
    assert loss.item() == 2.0
    assert gradient.tolist() == [0.5, 0.0, 0.5]


def test_nothing_reliable_is_empty_unless_a_batch_term_remains() -> None:
    measure, none = torch.ones(2), torch.zeros(2, dtype=torch.bool)
    assert Objective(measure, none).empty
    assert Objective(measure, none).loss().item() == 0.0
    assert not Objective(measure, none, torch.tensor(3.0)).empty
    assert Objective(measure, none, torch.tensor(3.0)).loss().item() == 3.0


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("Idempotence", "sharpen"),
        ("Tent", "balance"),
        ("MEMO", "views"),
        ("EATA", "margin"),
        ("CoTTA", "views"),
    ],
)
def test_arguments_have_types_in_a_configuration(name: str, argument: str) -> None:
    assert getattr(from_yaml(name, **{argument: 2}), argument) == 2
    with pytest.raises(ArgumentError, match=f'(?s)"{argument}".*Got value: nonsense'):
        from_yaml(name, **{argument: "nonsense"})


def test_every_adapter_has_a_method_of_its_own_that_begins_anew(net: nn.Module) -> None:
    method = Wanders()
    alone = [run(adapter_of(net, Wanders()), x, net).outputs for x in STREAM[:1]]
    first, second = adapter_of(net, method), adapter_of(net, method)
    for x in STREAM:  # the third of one batch after the other goes back to the source
        run(first, x, net)
    found = [run(each, STREAM[0], net).outputs for each in (second, adapter_of(net, method))]
    torch.testing.assert_close(found, alone * 2, rtol=0, atol=0)
    assert method.state_dict() == {"batches": 0}


# What a method may do with weights, predictions and source data


class Sharp(TestTimeMethod):
    """Steps by the gradient at weights moved up its direction by ``rho``, as SAM does."""

    rho = 0.05

    def loss(self, passes: Passes) -> Objective:
        return Entropy().loss(passes)

    def step(self, passes: Passes, state: Steps) -> Objective:
        objective = self.loss(passes)
        gradients = state.gradients(objective.loss())
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        with state.moved_by({name: self.rho * g / norm for name, g in gradients.items()}):
            loss = self.loss(passes.again()).loss()
            sharp = state.gradients(loss)
        state.step_by(sharp, loss)
        return objective


def entropy(net: nn.Module, x: Tensor) -> Tensor:
    p: Tensor = net(x).softmax(1)
    return -(p * p.log()).sum(1).mean()


def gradients_of(net: nn.Module, x: Tensor) -> list[Tensor]:
    weights = list(net.parameters())
    found = torch.autograd.grad(entropy(net, x), weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


@pytest.fixture
def net() -> nn.Module:
    return toy().double().eval()


STREAM = [batch.double() for batch in stream(4)]


def adapter_of(net: nn.Module, method: TestTimeMethod, **settings: Any) -> BatchAdapter:
    given = {"objective": method, "optimizer": "sgd", "lr": 0.05, "reset": "never", **settings}
    return BatchAdapter(net, lambda x, _: net(x), lambda y: y.softmax(1), Settings(**given))


def run(adapter: BatchAdapter, x: Tensor, net: nn.Module) -> Adaptation:
    with adapter.adapted(x, Plain(lambda inputs, _: net(inputs))) as found:
        return found


def test_a_sharpness_aware_step_is_that_of_plain_torch(net: nn.Module) -> None:
    own = copy.deepcopy(net)
    weights, rho = list(own.parameters()), Sharp.rho
    adapter = adapter_of(net, Sharp(), optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))
    optimizer = torch.optim.SGD(weights, 0.05, momentum=0.9)
    for batch, x in enumerate(STREAM):
        up = gradients_of(own, x)
        norm = torch.stack([g.norm() for g in up]).norm()
        with torch.no_grad():
            for w, g in zip(weights, up, strict=True):
                w.add_(rho * g / norm)
        sharp = gradients_of(own, x)
        with torch.no_grad():
            for w, g, s in zip(weights, up, sharp, strict=True):
                w.sub_(rho * g / norm)
                w.grad = s
        optimizer.step()
        found = run(adapter, x, net)
        torch.testing.assert_close(found.outputs, own(x).detach(), rtol=0, atol=1e-10)
        assert (found.backwards, found.forwards) == (2, 4 if batch else 3)


class Wanders(TestTimeMethod):
    """Steps, sets half of each weight back, and goes back to the source at the third batch."""

    def __init__(self) -> None:
        self.batches = torch.zeros(())

    def loss(self, passes: Passes) -> Objective:
        return Entropy().loss(passes)

    def step(self, passes: Passes, state: Steps) -> Objective:
        self.batches += 1
        objective = super().step(passes, state)
        halves = {n: (w + state.source[n]) / 2 for n, w in state.weights.items()}
        state.assign(halves)
        if self.batches == 3:
            state.reset()
        return objective

    def predict(self, passes: Passes) -> Tensor:
        return (passes.y0 + passes.anchor(passes.inputs)) / 2

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches = state["batches"]


def test_weights_are_assigned_and_reset_and_a_bad_batch_takes_nothing_along(
    net: nn.Module,
) -> None:
    own, source = copy.deepcopy(net), copy.deepcopy(net)
    bad = STREAM[0].clone()
    bad[0] = torch.nan
    adapter = adapter_of(net, Wanders())
    batches = 0
    for x in (STREAM[0], bad, STREAM[1], bad, STREAM[2], STREAM[3]):
        found = run(adapter, x, net)
        if x is bad:
            assert found.reason == "non-finite output"
            assert found.prediction is None
            continue
        batches += 1
        gradients = gradients_of(own, x)
        with torch.no_grad():
            for w, s, g in zip(own.parameters(), source.parameters(), gradients, strict=True):
                w.copy_(s if batches == 3 else (w - 0.05 * g + s) / 2)
        torch.testing.assert_close(found.outputs, own(x).detach(), rtol=0, atol=1e-10)
        mean = (own(x).softmax(1) + source(x).softmax(1)) / 2
        torch.testing.assert_close(found.prediction, mean.detach(), rtol=0, atol=1e-10)
        assert adapter._method.state_dict() == {"batches": batches}
    assert same(zip(net.parameters(), source.parameters(), strict=True))


def test_the_anchor_is_the_mean_teacher_where_it_follows(net: nn.Module) -> None:
    own, teacher = copy.deepcopy(net), copy.deepcopy(net)

    class Teacher(TestTimeMethod):
        def loss(self, passes: Passes) -> Objective:
            return Entropy().loss(passes)

        def predict(self, passes: Passes) -> Tensor:
            return passes.anchor(passes.inputs)

    adapter = adapter_of(net, Teacher(), anchor="ema", ema_decay=0.9)
    for x in STREAM:
        gradients = gradients_of(own, x)
        with torch.no_grad():
            for w, t, g in zip(own.parameters(), teacher.parameters(), gradients, strict=True):
                w.sub_(0.05 * g)
                t.lerp_(w, 0.1)
        found = run(adapter, x, net).prediction
        torch.testing.assert_close(found, teacher(x).softmax(1).detach(), rtol=0, atol=1e-10)


class Unadapted(TestTimeMethod):
    """Weighs the entropy by the source's confidence, and predicts what the source does."""

    def loss(self, passes: Passes) -> Objective:
        found = Entropy().loss(passes)
        sure = passes.unadapted(passes.inputs).amax(1)
        assert not sure.requires_grad
        return Objective(sure * found.measure, found.reliable)

    def predict(self, passes: Passes) -> Tensor:
        return passes.unadapted(passes.inputs)


@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
def test_the_source_is_asked_whatever_the_anchor_is(net: nn.Module, anchor: Any) -> None:
    own, source = copy.deepcopy(net), copy.deepcopy(net)
    adapter = adapter_of(net, Unadapted(), anchor=anchor, ema_decay=0.5, steps=2)
    for x in STREAM:
        sure = source(x).softmax(1).amax(1).detach()
        for _ in range(2):
            p = own(x).softmax(1)
            loss = -(sure * (p * p.log()).sum(1)).mean()
            weights = list(own.parameters())
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            with torch.no_grad():
                for w, g in zip(weights, gradients, strict=True):
                    w.sub_(0 if g is None else 0.05 * g)
        found = run(adapter, x, net)
        torch.testing.assert_close(found.outputs, own(x).detach(), rtol=0, atol=1e-10)
        expected = source(x).softmax(1).detach()
        torch.testing.assert_close(found.prediction, expected, rtol=0, atol=1e-12)


class Noisy(TestTimeMethod):
    """Draws the inputs' noise itself; the network draws nothing."""

    def loss(self, passes: Passes) -> Objective:
        measure = passes.other(passes.inputs + torch.rand(())).amax(1)
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))


@pytest.mark.parametrize("others", [False, True])
def test_what_a_method_draws_is_put_back_though_other_threads_run(
    net: nn.Module, others: bool
) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    adapter = adapter_of(net, Noisy())
    if others:
        thread.start()
    try:
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        found = run(adapter, STREAM[0], net)
        torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
        assert (found.forwards, found.backwards) == (4, 1)
    finally:
        done.set()
        if others:
            thread.join()


def test_halves_that_are_assigned_what_they_are_keep_what_lies_beneath_their_rounding() -> None:
    class Assigns(TestTimeMethod):
        def loss(self, passes: Passes) -> Objective:
            return Entropy().loss(passes)

        def step(self, passes: Passes, state: Steps) -> Objective:
            objective = super().step(passes, state)
            state.assign(dict(state.weights))
            return objective

    nets = [toy().bfloat16().eval() for _ in range(2)]
    found = []
    for net, method in zip(nets, (Entropy(), Assigns()), strict=True):
        adapter = adapter_of(net, method, lr=1e-4)
        for x in STREAM * 5:
            last = run(adapter, x.bfloat16(), net)
        found.append(last.weights)
    source = dict(nets[0].named_parameters())
    assert not same((found[0][name], source[name]) for name in found[0])
    assert same((found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weights_go_back_by_a_share_after_each_step(net: nn.Module, optimizer: Any) -> None:
    own, source = copy.deepcopy(net), copy.deepcopy(net)
    moves = OPTIMIZERS[optimizer](own.parameters(), lr=0.05)
    adapter = adapter_of(net, Entropy(), optimizer=optimizer, weight_ensembling=0.2, steps=2)
    for x in STREAM:
        for _ in range(2):
            moves.zero_grad()
            torch.autograd.backward(entropy(own, x))
            moves.step()
            with torch.no_grad():
                for w, s in zip(own.parameters(), source.parameters(), strict=True):
                    w.lerp_(s, 0.2)
        torch.testing.assert_close(run(adapter, x, net).outputs, own(x).detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [1, 6])
def test_mixed_statistics_are_those_of_the_paper(net: nn.Module, count: int) -> None:
    own = copy.deepcopy(net)
    x, prior = STREAM[0][:count], 4
    norm: Any = own.get_submodule("bn")
    before = norm.running_mean.clone(), norm.running_var.clone()
    given = own.get_submodule("conv")(x).detach()
    mean, var = given.mean((0, 2, 3)), given.var((0, 2, 3), correction=0)
    norm.running_mean = (prior * before[0] + count * mean) / (prior + count)
    norm.running_var = (prior * before[1] + count * var) / (prior + count)
    adapter = adapter_of(net, Entropy(), steps=0, norm_stats="mixed", norm_prior=prior)
    found = run(adapter, x, net)
    torch.testing.assert_close(found.outputs, own(x).detach(), rtol=0, atol=1e-12)
    bn: Any = net.get_submodule("bn")
    assert same(zip(before, (bn.running_mean, bn.running_var), strict=True))
    assert "forward" not in vars(bn)


def test_mixed_statistics_go_with_scope_sample_and_one_image_at_a_time(net: nn.Module) -> None:
    given: dict[str, Any] = {"objective": Entropy(), "lr": 0.05, "norm_stats": "mixed"}

    def forward(x: Tensor, _: Tensor | None) -> Tensor:
        return net(x)  # type: ignore[no-any-return]

    def label(y: Tensor) -> Tensor:
        return y.softmax(1)

    whole = adapt(
        net,
        STREAM[0],
        forward=forward,
        to_label=label,
        settings=Settings(scope="sample", **given),
    )
    ones = [
        adapt(net, x[None], forward=forward, to_label=label, settings=Settings(**given))
        for x in STREAM[0]
    ]
    assert whole.outputs is not None
    singles = torch.cat([torch.as_tensor(one.outputs) for one in ones])
    torch.testing.assert_close(whole.outputs, singles, rtol=0, atol=1e-12)


class Mirrored(TestTimeMethod):
    """Asks for features of other inputs, and for a part of the module."""

    def loss(self, passes: Passes) -> Objective:
        features = passes.features_of("dense", passes.inputs.flip(3))
        head = passes.submodule("head")
        return Objective(head(features).square().sum(1), torch.ones(6, dtype=torch.bool))


def test_features_of_other_inputs_have_a_graph_and_leave_nothing(net: nn.Module) -> None:
    own: Any = copy.deepcopy(net)
    adapter, before = adapter_of(net, Mirrored()), bits(net)
    for x in STREAM:
        dense = own.dense(own.bn(own.conv(x.flip(3))).relu().flatten(1))
        loss = own.head(dense).square().sum(1).mean()
        gradients = torch.autograd.grad(loss, list(own.parameters()), allow_unused=True)
        with torch.no_grad():
            for w, g in zip(own.parameters(), gradients, strict=True):
                w.sub_(0.05 * (torch.zeros_like(w) if g is None else g))
        found = run(adapter, x, net)
        torch.testing.assert_close(found.outputs, own(x).detach(), rtol=0, atol=1e-10)
    assert changed(before, net) == []


# Under a Trainer


class Prototypes(TestTimeMethod):
    """Predicts the mean prediction of source data, whatever it is shown."""

    needs_source: ClassVar[bool] = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def loss(self, passes: Passes) -> Objective:
        return Entropy().loss(passes)

    def predict(self, passes: Passes) -> Tensor:
        return torch.cat(self.seen).mean(0).expand_as(passes.y0)

    def fit_source(self, passes: Passes) -> None:
        self.seen.append(passes.y0.detach().clone())

    def source_dict(self) -> dict[str, Any]:
        return {"seen": torch.cat(self.seen)} if self.seen else {}

    def load_source_dict(self, source: Mapping[str, Any]) -> None:
        self.seen = [source["seen"]] if source else []


def test_source_data_are_seen_with_the_statistics_of_the_adaptation(net: nn.Module) -> None:
    method, before = Prototypes(), bits(net)
    adapter = adapter_of(net, method, norm_stats="batch")
    bad = STREAM[1].clone()
    bad[0] = torch.nan
    for x in (STREAM[0], bad, STREAM[2][:1], STREAM[3]):  # a bad batch, and one of one sample
        adapter.fit_source(x)
        assert changed(before, net) == []
    own = copy.deepcopy(net)
    norm: Any = own.get_submodule("bn")
    norm.running_mean = norm.running_var = None
    expected = torch.cat([own(x).softmax(1) for x in (STREAM[0], STREAM[3])])
    torch.testing.assert_close(torch.cat(method.seen), expected.detach(), rtol=0, atol=1e-12)


class IT3Validates(IT3Mixin, Validates):
    pass


def test_source_data_are_those_of_a_validation_and_what_was_seen_travels(tmp_path: Path) -> None:
    module: Any = seeded(IT3Validates(**parts())).eval()
    quiet().predict(module, loader(4))  # a Trainer leaves something of its own
    before = everything(module)
    callback = TestTimeCallback(Prototypes())
    trainer = quiet(callbacks=[callback])
    with pytest.raises(MisconfigurationException, match="has seen nothing yet"):
        trainer.predict(module, loader(8))
    trainer.validate(module, loader(12), verbose=False)
    assert differing(before, everything(module)) == []
    mean = module.net(samples(12)[0]).softmax(1).mean(0).detach()
    found: Any = (quiet(callbacks=[callback]).predict(module, loader(8)) or [])[0]
    torch.testing.assert_close(found.softmax(1), mean.expand(4, 3))
    trainer.save_checkpoint(tmp_path / "it3.ckpt")
    other = IT3Validates.load_from_checkpoint(tmp_path / "it3.ckpt", **parts())
    fresh = TestTimeCallback(Prototypes())
    again: Any = (quiet(callbacks=[fresh]).predict(other, loader(8)) or [])[0]
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    with torch.no_grad():
        other.net.head.bias.add_(1)
    with pytest.raises(MisconfigurationException, match="with other weights"):
        quiet(callbacks=[callback]).predict(other, loader(8))


def test_an_untouched_module_keeps_what_was_seen_in_the_callback() -> None:
    module: Any = seeded(Validates()).eval()
    callback = TestTimeCallback(Prototypes())
    trainer = quiet(callbacks=[callback])
    trainer.validate(module, loader(12), verbose=False)
    fresh, checkpoint = TestTimeCallback(Prototypes()), dict[str, Any]()
    callback.on_save_checkpoint(trainer, module, checkpoint)
    fresh.on_load_checkpoint(trainer, module, checkpoint)
    for each in (callback, fresh):
        found: Any = (quiet(callbacks=[each]).predict(module, loader(8)) or [])[0]
        mean = module.net(samples(12)[0]).softmax(1).mean(0).detach()
        torch.testing.assert_close(found.softmax(1), mean.expand(4, 3))


class NeverAsks(LitNet):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch[0])


class AsksForSome(LitNet):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch[0][:2])


class Mean(Sharp):
    def predict(self, passes: Passes) -> Tensor:
        return passes.y0.mean(0).expand_as(passes.y0)


def test_a_method_that_predicts_answers_calls_of_the_module_or_says_why_it_cannot() -> None:
    with pytest.raises(MisconfigurationException, match=r"never called self\(\.\.\.\)"):
        quiet(callbacks=[TestTimeCallback(Mean())]).predict(seeded(NeverAsks()), loader(4))
    with pytest.raises(ValueError, match="on the 4 samples that were predicted, got one on 2"):
        quiet(callbacks=[TestTimeCallback(Mean())]).predict(seeded(AsksForSome()), loader(4))
    with pytest.raises(ValueError, match="Mean predicts by itself: leave out prediction='mean'"):
        TestTimeCallback(Mean(), prediction="mean")
    with pytest.raises(ValueError, match="nor a method that predicts by itself, as Mean may"):
        TestTimeCallback(Mean(), scope="sample")
    with pytest.raises(ValueError, match="Sharp takes steps of its own"):
        TestTimeCallback(Sharp(), gate=0.9)


@pytest.mark.parametrize(
    ("prior", "shape"),
    [
        (ClassPrior(3), (4, 3)),
        (ClassPrior(3, outputs="probabilities"), (4, 3)),
        (ClassPrior(2), (4, 1)),
        (ClassPrior(2), (4,)),
        (ClassPrior(2, outputs="probabilities"), (4,)),
        (MaskPrior(), (4, 1, 2, 2)),
        (MaskPrior(), (4, 2, 2)),
        (MaskPrior(2), (4, 1, 2, 2)),
        (MaskPrior(3), (4, 3, 2, 2)),
        (ValuePrior(mean=3.0, std=2.0), (4,)),
        (ValuePrior(size=2, mean=[3.0, 1.0], std=[2.0, 0.5]), (4, 2)),
    ],
)
def test_outputs_of_a_prediction_are_those_it_comes_from(prior: Prior, shape: Any) -> None:
    output = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if getattr(prior, "outputs", "") == "probabilities" and len(shape) > 1:
        output = output / output.sum(1, keepdim=True)
    prediction = prior.from_output(output)
    found = prior.to_output(prediction, output)
    assert found.shape == output.shape
    torch.testing.assert_close(prior.from_output(found), prediction)
