"""AuxiliaryMixin: the loss of both tasks, checkpoints, YAML, and what cannot learn a task."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.auxiliary import TTTNet
from helpers.toy import IT3Net, LitNet, doubles, loader, parts, quiet, samples, seeded
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning import (
    TTT,
    TTTMAE,
    Auxiliary,
    AuxiliaryMixin,
    Contrastive,
    IT3Mixin,
    IT3Predictor,
    MaskedPatches,
    Rotation,
    TestTimeCallback,
    TestTimeMethod,
    TTTPlusPlus,
)
from it3_lightning.training.auxiliary import with_auxiliary
from it3_lightning.training.dual_pass import DualPass


def head(layer: str = "net.dense", **args: Any) -> Rotation:
    return Rotation(layer, channels=8, hidden=5, **args)


def rotation_loss(module: Any, x: Tensor) -> Tensor:
    """The mean over samples and turns, from the weights of a module."""
    net, task = module.net, module.it3_auxiliary.head
    turned = torch.cat([x, *(torch.rot90(x, k, (2, 3)) for k in (1, 2, 3))])
    features = net.dense(net.bn(net.conv(turned)).relu().flatten(1))
    return F.cross_entropy(task(features), torch.arange(4).repeat_interleave(len(x)))


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_fitting_minimises_the_loss_of_both_tasks(weight: float) -> None:
    with doubles():
        module = seeded(TTTNet(auxiliary=head(), auxiliary_weight=weight))
        own = copy.deepcopy(module).train()
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        auxiliary = []
        for x, y in loader(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(own.net(x), y)
            other = rotation_loss(own, x)
            torch.autograd.backward(loss + weight * other)
            optimizer.step()
            auxiliary.append(other.detach())
        trainer = quiet()
        trainer.fit(module, loader(12))
    found, expected = module.state_dict(), own.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)
    mean = torch.stack(auxiliary).mean()
    torch.testing.assert_close(trainer.callback_metrics["it3/auxiliary_loss_epoch"], mean)
    assert set(trainer.callback_metrics) == {
        "train_loss",
        *(f"it3/auxiliary_loss{kind}" for kind in ("", "_step", "_epoch")),
    }


class Counting(LitNet):
    """Counts its passes, skips a batch, and returns more than a loss."""

    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.log("seen", 1.0)
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            return None
        return {"loss": F.cross_entropy(self(batch[0]), batch[1]), "preds": batch_idx}


class TTTCounting(AuxiliaryMixin, Counting):
    """The same with a task."""


class Outputs(Callback):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.found.append(args[2])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_the_steps_own_output_stays_and_passes_of_the_task_count_nothing() -> None:
    module = seeded(TTTCounting(auxiliary=head()))
    x, y = (rows[:4] for rows in samples(12))
    expected = F.cross_entropy(module.net.train()(x), y) + rotation_loss(module, x)
    outputs = Outputs()
    module = seeded(TTTCounting(auxiliary=head()))
    quiet(callbacks=[outputs]).fit(module, loader(12))
    assert [output and output["preds"] for output in outputs.found] in ([0, None, 2], [0, {}, 2])
    torch.testing.assert_close(outputs.found[0]["loss"], expected.detach())
    assert module.passes == 2


class Keeps(LitNet):
    def __init__(self, **args: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


class TTTKeeps(AuxiliaryMixin, Keeps):
    """Keeps its hyperparameters."""


def test_a_checkpoint_is_plain_data_and_brings_the_head_back(tmp_path: Path) -> None:
    module, path = seeded(TTTKeeps(auxiliary=head(), auxiliary_weight=0.5)), tmp_path / "it3.ckpt"
    trainer = quiet()
    trainer.fit(module, loader(8))
    trainer.save_checkpoint(path)
    kept = torch.load(path, weights_only=True)["hyper_parameters"]
    assert kept["auxiliary"]["class_path"] == "it3_lightning.methods.Rotation"
    again = TTTKeeps.load_from_checkpoint(path)
    assert again.it3_auxiliary_weight == 0.5
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    predicted = [
        torch.cat(quiet(callbacks=[TestTimeCallback(TTT(), lr=0.05)]).predict(m, loader(4)))  # type: ignore[arg-type]
        for m in (module, again)
    ]
    torch.testing.assert_close(*predicted, rtol=0, atol=0)


def test_a_plain_checkpoint_loads_with_a_warning_and_no_other_key_may_lack() -> None:
    plain, module = seeded(LitNet(), 5), seeded(TTTNet(auxiliary=head()))
    before = copy.deepcopy(module.it3_auxiliary.state_dict())
    with pytest.warns(UserWarning, match="has no it3_auxiliary: the head stays as it is"):
        module.load_state_dict(plain.state_dict())
    assert torch.equal(module.net.dense.weight, plain.net.dense.weight)
    assert all(torch.equal(v, before[n]) for n, v in module.it3_auxiliary.state_dict().items())
    lacking = {n: v for n, v in module.state_dict().items() if n != "it3_auxiliary.head.0.bias"}
    with pytest.raises(RuntimeError, match=r"it3_auxiliary\.head\.0\.bias"):
        module.load_state_dict(lacking)


CONFIG = """
model:
  class_path: helpers.auxiliary.TTTNet
  init_args:
    hidden: 8
    auxiliary_weight: 0.5
    auxiliary: {class_path: it3_lightning.Rotation, init_args: {layer: net.dense, channels: 8}}
trainer:
  accelerator: cpu
  callbacks:
    - class_path: it3_lightning.TestTimeCallback
      init_args:
        steps: 2
        method: {class_path: it3_lightning.TTT, init_args: {seed: 3}}
"""


def test_all_of_it_is_written_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    monkeypatch.setattr("sys.argv", ["it3"])  # LightningCLI warns of arguments there
    cli = LightningCLI(
        LitNet,
        subclass_mode_model=True,
        seed_everything_default=False,
        run=False,
        args=[f"--config={file}"],
    )
    task = cli.model.it3_auxiliary
    assert isinstance(task, Rotation)
    assert task.init_args() == {"layer": "net.dense", "channels": 8, "hidden": 64}
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, TestTimeCallback))  # type: ignore[attr-defined]
    assert callback.settings.method == TTT(seed=3)
    assert (callback.settings.steps, callback.settings.scope) == (2, "sample")


class TTTAndIT3(AuxiliaryMixin, IT3Net):
    """Learns both."""


def test_with_priors_the_task_is_learnt_on_the_neutral_pass_alone() -> None:
    dual = DualPass(perturb_prior=False)
    with doubles():
        both = seeded(TTTAndIT3(**parts(), dual_pass=dual, auxiliary=head()))
        alone = seeded(IT3Net(**parts(), dual_pass=dual))
        alone.load_state_dict({n: v for n, v in both.state_dict().items() if "auxil" not in n})
        expected = rotation_loss(copy.deepcopy(both).train(), samples(4)[0])
        outputs = [Outputs(), Outputs()]
        for module, kept in zip((both, alone), outputs, strict=True):
            quiet(callbacks=[kept]).fit(module, loader(4))
    losses = [kept.found[0]["loss"] for kept in outputs]
    torch.testing.assert_close(losses[0] - losses[1], expected.detach(), rtol=0, atol=1e-10)
    found: Any = quiet(callbacks=[TestTimeCallback(TTT())]).predict(both.float(), loader(4))
    assert torch.cat(found).isfinite().all()


TASKS: list[tuple[Auxiliary, TestTimeMethod]] = [
    (head(), TTT()),
    (MaskedPatches("net.conv", 2, image_channels=1, patch=2), TTTMAE(masks=2)),
    (Contrastive("net.dense", 8), TTTPlusPlus(queue=5)),
]


class Validated(TTTNet):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


@pytest.mark.parametrize(("task", "method"), TASKS, ids=["rotation", "masked", "contrastive"])
def test_every_task_is_learnt_and_stepped_on_in_mixed_precision_and_when_served(
    task: Auxiliary, method: TestTimeMethod
) -> None:
    module = seeded(Validated(auxiliary=copy.deepcopy(task)))
    callback = TestTimeCallback(method, lr=1e-4, steps=2)
    trainer = quiet(precision="bf16-mixed", callbacks=[callback])
    torch.manual_seed(0)  # masks and views are drawn
    trainer.fit(module, loader(8), loader(8))
    found: Any = trainer.predict(module, loader(8))
    assert torch.cat(found).isfinite().all()
    assert (callback.summary.samples, callback.summary.skipped) == (8, 0)
    served = IT3Predictor(module, callback.settings)(samples(6)[0])
    assert served.outputs.isfinite().all()
    assert not served.skipped.any()
    assert (served.distance_adapted < served.distance).any()


def test_a_module_that_is_there_learns_a_task_as_one_that_was_made_so() -> None:
    module, made = seeded(LitNet()), seeded(TTTNet(auxiliary=head()))
    with_auxiliary(module, seeded(head()), 0.3)
    made.it3_auxiliary, made.it3_auxiliary_weight = seeded(head()), 0.3
    made.net.load_state_dict(module.net.state_dict())
    assert isinstance(module, AuxiliaryMixin)
    assert isinstance(module, LitNet)
    for each in (module, made):
        quiet().fit(each, loader(12))
    for name, value in made.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert type(LitNet()) is LitNet  # others of its class do not


class Manual(LitNet):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TTTManual(AuxiliaryMixin, Manual):
    """Optimizes by itself."""


class AddsItself(TTTManual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.it3_auxiliary_loss(batch))
        self.optimizers().step()  # type: ignore[union-attr]


class Silent(AuxiliaryMixin):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def silent() -> Silent:
    module = Silent(auxiliary=head())
    module.net = nn.ModuleDict({"dense": nn.Linear(1, 8)})
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (TTTNet, "TTTNet has none. Train it with one"),
        (lambda: TTTNet(auxiliary=head("net.dens")), "Unknown layer 'net.dens'. Did you mean"),
        (lambda: TTTManual(auxiliary=head()), "a training_step that optimizes manually"),
        (silent, "Silent has no training_step, so there is no loss to add to"),
        (
            lambda: TTTAndIT3(**parts(), train="conditioning", auxiliary=head()),
            "train='conditioning' freezes the network",
        ),
    ],
)
def test_what_cannot_learn_the_task_is_refused_before_any_batch(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        quiet().fit(make(), loader(4))


def test_a_step_of_ones_own_may_add_the_loss_itself() -> None:
    module = seeded(AddsItself(auxiliary=head()))
    before = module.it3_auxiliary.head[0].weight.detach().clone()
    quiet().fit(module, loader(4))
    assert not torch.equal(before, module.it3_auxiliary.head[0].weight)


def test_bad_arguments_and_another_order_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected auxiliary_weight >= 0"):
        TTTNet(auxiliary=head(), auxiliary_weight=-1.0)
    wrong: Any = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="Expected a Auxiliary, got Linear"):
        TTTNet(auxiliary=wrong)
    with pytest.raises(TypeError, match="Expected AuxiliaryMixin before IT3Mixin in After"):
        type("After", (IT3Mixin, AuxiliaryMixin, LitNet), {})


def test_a_layer_that_never_runs_is_named() -> None:
    module = TTTNet(auxiliary=head("net.embed"))
    with pytest.raises(RuntimeError, match=r"Expected the layer 'net\.embed' to run"):
        quiet().fit(module, loader(4))
    assert not module.net.embed._forward_hooks
