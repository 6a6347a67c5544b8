"""`IT3Mixin` on anyone's module: what it refuses and when, what is optimized, what is measured."""

import copy
from typing import Any

import pytest
import torch
from helpers.toy import Batch, IT3Net, LitNet, loader, net, parts, quiet, samples, seeded
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import ClassPrior, DualPass, FeatureInjection, IT3Mixin
from it3_lightning.training.post_hoc import Fitting

EXACT = DualPass(perturb_prior=False)


def mixed(base: type[LightningModule], **args: Any) -> Any:
    return type("IT3Mixed", (IT3Mixin, base), {})(**parts(**args))


def refused_before_any_batch(model: Any, match: str) -> None:
    def step(*_: Any) -> None:
        raise AssertionError("a batch was run")

    if "training_step" not in vars(type(model)):
        model.forward = step
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=match):
        quiet().fit(model, loader())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# Refusals


@pytest.mark.parametrize(
    ("args", "missing"),
    [
        ({"prior": None}, "no prior"),
        ({"conditioning": None}, "no conditioning"),
        ({"prior": None, "conditioning": None}, "no prior and no conditioning"),
    ],
)
def test_missing_parts_are_refused_when_fitting_starts(args: dict[str, Any], missing: str) -> None:
    refused_before_any_batch(IT3Net(**parts(**args)), f"IT3Net has {missing}. Give both")


def test_missing_parts_do_not_matter_where_training_is_off() -> None:
    model = IT3Net(train="off")
    quiet(max_steps=1).fit(model, loader())
    assert model.it3_prior is None


def test_manual_optimization_is_refused_with_the_way_out() -> None:
    class Manual(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    refused_before_any_batch(mixed(Manual), "wrong:  class IT3Net.IT3Mixin, Lit(.|\n)*it3_loss")


def test_manual_optimization_in_a_step_of_ones_own_learns_both_passes() -> None:
    class Manual(IT3Net):
        def __init__(self, **args: Any) -> None:
            super().__init__(**args)
            self.automatic_optimization = False

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.it3_loss(batch, F.cross_entropy))
            optimizer.step()

    manual, automatic = seeded(Manual(**parts(dual_pass=EXACT))), net(dual_pass=EXACT)
    for model in (manual, automatic):
        quiet().fit(model, loader())
    for name, value in automatic.state_dict().items():
        assert torch.equal(manual.state_dict()[name], value), name


def test_module_without_a_step_is_refused() -> None:
    class Bare(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"dense": nn.Linear(2, 3)})

    refused_before_any_batch(mixed(Bare), "has no training_step of its own")


def test_step_that_takes_an_iterator_is_refused() -> None:
    class Iterates(LitNet):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return next(dataloader_iter)

    refused_before_any_batch(mixed(Iterates), "Iterates takes a dataloader_iter")


def test_unknown_layer_is_refused_at_construction_with_the_closest_name() -> None:
    with pytest.raises(ValueError, match=r"Unknown layer 'net.dence'. Did you mean 'net.dense'"):
        IT3Net(prior=ClassPrior(3), conditioning=FeatureInjection("net.dence"))


def test_values_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match="'joint', 'conditioning' or 'off', got 'both'"):
        IT3Net(**parts(train="both"))
    with pytest.raises(TypeError, match="Expected a Prior, got int"):
        IT3Net(**parts(prior=3))
    with pytest.raises(ValueError, match="Expected passes='dual' with train='conditioning'"):
        IT3Net(**parts(train="conditioning", dual_pass=DualPass(passes="single")))


def test_source_checkpoint_means_post_hoc_unless_said_otherwise() -> None:
    assert IT3Net(**parts()).it3_train == "joint"
    assert IT3Net(**parts(source_checkpoint="a.ckpt")).it3_train == "conditioning"
    assert IT3Net(**parts(source_checkpoint="a.ckpt", train="joint")).it3_train == "joint"


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_a_prior_of_other_classes_than_the_network_is_refused_before_the_first_step(
    classes: int, train: Any
) -> None:
    images, labels = samples()
    data: Any = DataLoader(TensorDataset(images, labels.clamp(max=1)), batch_size=4)
    model, trainer = IT3Net(**parts(prior=ClassPrior(classes), train=train)), quiet()
    before = [p.detach().clone() for p in model.parameters()]
    refusals = (MisconfigurationException, ValueError)
    with pytest.raises(refusals, match=rf"output of shape \(B, {classes}, ...\), got \(4, 3\)"):
        trainer.fit(model, data)
    assert trainer.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model._forward_hooks


# What reaches the base


def test_arguments_of_the_base_pass_through_by_position_and_by_name() -> None:
    by_position, by_name = IT3Net(5, 0.3, **parts()), IT3Net(lr=0.3, hidden=5, **parts())
    assert by_position.net.dense.out_features == by_name.net.dense.out_features == 5
    assert by_position.lr == by_name.lr == 0.3


def test_command_lines_see_the_arguments_of_both() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(IT3Net, "model")
    made = parser.instantiate_classes(
        parser.parse_args(
            [
                *("--model.hidden=5", "--model.lr=0.3", "--model.prior=ClassPrior"),
                *("--model.prior.num_classes=3", "--model.conditioning=FeatureInjection"),
                *("--model.conditioning.layer=net.dense", "--model.dual_pass.label_weight=0.5"),
            ]
        )
    ).model
    assert (made.net.dense.out_features, made.lr) == (5, 0.3)
    assert (made.it3_prior.channels, made.it3_conditioning.layers) == (3, ("net.dense",))
    assert made.it3_dual_pass.label_weight == 0.5


class Lazy(LitNet):
    """Builds its network when a Trainer says so."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = LitNet().net


class LazyBySetup(Lazy):
    def configure_model(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        Lazy.configure_model(self)


@pytest.mark.parametrize("base", [Lazy, LazyBySetup])
def test_networks_built_by_a_hook_are_conditioned_then_and_trained(base: type[Lazy]) -> None:
    model = mixed(base)
    assert not list(model.parameters())
    quiet().fit(model, loader())
    embedder = model.it3_conditioning.embedders["net-dense"]
    assert embedder.last.weight.abs().max() > 0  # it starts at zero


def test_unknown_layer_of_a_network_built_by_a_hook_is_refused_when_it_is_built() -> None:
    model = mixed(Lazy, conditioning=FeatureInjection("net.dence"))
    with pytest.raises(ValueError, match=r"Did you mean 'net.dense'"):
        quiet().fit(model, loader())


# The optimizer


class OfTheNetwork(LitNet):
    """Makes its optimizer of its own network's parameters, with a scheduler."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)]


def test_conditioning_is_trained_by_an_optimizer_that_does_not_know_of_it() -> None:
    class OfAll(OfTheNetwork):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)]

    models = [seeded(mixed(base, dual_pass=EXACT)) for base in (OfTheNetwork, OfAll)]
    for model in models:
        quiet(max_epochs=2).fit(model, loader())
    ours, expected = (model.state_dict() for model in models)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    optimizer = models[0].optimizers().optimizer
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_conditioning_is_given_to_the_optimizer_once() -> None:
    model = mixed(OfTheNetwork)
    trainer = quiet(max_epochs=2)
    trainer.fit(model, loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, loader())
    given = [id(p) for p in trainer.optimizers[0].param_groups[0]["params"]]
    assert sorted(given) == sorted({id(p) for p in model.parameters()})


# The callback behind it


def test_fitting_is_added_once_and_only_for_fitting() -> None:
    class Own(IT3Net):
        def configure_callbacks(self) -> Any:
            return super().configure_callbacks()

    def added(trainer: Trainer) -> int:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return sum(isinstance(callback, Fitting) for callback in callbacks)

    model, trainer, tester = Own(**parts()), quiet(), quiet()
    trainer.fit(model, loader())
    trainer.test(model, loader(), verbose=False)
    trainer.fit(model, loader())
    tester.test(model, loader(), verbose=False)
    assert (added(trainer), added(tester)) == (1, 0)


def test_trainer_goes_on_with_a_plain_module() -> None:
    plain, twin, trainer = seeded(LitNet()), seeded(LitNet()), quiet(max_epochs=2)
    trainer.fit(net(), loader())
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(plain, loader())
    quiet(max_epochs=2).fit(twin, loader())
    assert all(torch.equal(twin.state_dict()[k], v) for k, v in plain.state_dict().items())


def test_callbacks_of_the_module_are_kept() -> None:
    class Mine(Callback):
        pass

    class Own(LitNet):
        def configure_callbacks(self) -> Any:
            return Mine()

    trainer = quiet()
    trainer.fit(mixed(Own), loader())
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    assert {Mine, Fitting} <= {type(callback) for callback in callbacks}


# Copies


def test_deep_copy_has_a_conditioning_of_its_own() -> None:
    model = net()
    twin = copy.deepcopy(model)
    images, labels = samples()
    prior = F.one_hot(labels, 3).float()
    expected = model.predict_with(images, prior)
    assert torch.equal(twin.predict_with(images, prior), expected)
    with torch.no_grad():
        twin.it3_conditioning.embedders["net-dense"].last.bias.add_(1)
    assert not torch.equal(twin.predict_with(images, prior), expected)
    assert torch.equal(model.predict_with(images, prior), expected)


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_a_score_that_another_step_takes_from_training_step_knows_no_label(train: Any) -> None:
    class Shared(LitNet):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("test_loss", self.training_step(batch, batch_idx))

    class IT3Shared(IT3Mixin, Shared):
        pass

    model = seeded(IT3Shared(**parts(), train=train))
    (tested,) = quiet().test(model, loader(), verbose=False)
    (validated,) = quiet().validate(model, loader(), verbose=False)
    plain = seeded(Shared())
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if "it3_" not in n})
    (expected,) = quiet().test(plain, loader(), verbose=False)
    assert tested["test_loss"] == validated["val_loss"] == expected["test_loss"]
