"""Callbacks that write into weights: the frozen network is what it was, or they are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toy import Batch, IT3Net, LitNet, loader, parts, quiet, seeded
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn

from it3_lightning.training.post_hoc import Kept, entries


class Validated(IT3Net):
    """Notes the network that it is validated with."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.seen: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append(of_network(self))


def of_network(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith("net.")}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """The weights of an ordinary network that was trained for an epoch."""
    torch.manual_seed(0)
    model = LitNet()
    quiet().fit(model, loader())
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    return str(tmp_path / "plain.pt")


def differing(state: dict[str, Tensor], source: str) -> list[str]:
    expected = torch.load(source, weights_only=True)
    names = [name for name in state if name.startswith("net.")]
    assert set(names) == set(expected)
    return [name for name in names if not torch.equal(state[name], expected[name])]


AVERAGES: dict[str, Any] = {
    "stochastic": lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=0.5),
    "moving": lambda: EMAWeightAveraging(decay=0.7),
    "moving, buffers kept": lambda: EMAWeightAveraging(decay=0.7, use_buffers=False),
    "equal": lambda: WeightAveraging(),
}


@pytest.mark.filterwarnings("ignore:.*overrides the configure_model:UserWarning")
@pytest.mark.parametrize("name", AVERAGES)
def test_averaged_weights_are_those_of_the_conditioning_alone(
    name: str, source: str, tmp_path: Path
) -> None:
    model = Validated(**parts(source_checkpoint=source))
    trainer = quiet(callbacks=[AVERAGES[name]()], max_epochs=4)
    trainer.fit(model, loader(), loader(seed=1))
    assert differing(model.state_dict(), source) == []
    assert len(model.seen) >= 12
    assert [differing(state, source) for state in model.seen] == [[] for _ in model.seen]
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    # The schedule of torch 2.6 for averages puts a function into checkpoints
    kept = torch.load(tmp_path / "averaged.ckpt", weights_only=False)["state_dict"]
    assert differing(kept, source) == []


@pytest.mark.filterwarnings("ignore:.*overrides the configure_model:UserWarning")
def test_the_conditioning_is_averaged(source: str) -> None:
    def last(*callbacks: Callback) -> Tensor:
        torch.manual_seed(0)
        model: Any = IT3Net(**parts(source_checkpoint=source))
        quiet(callbacks=list(callbacks)).fit(model, loader())
        weight: Tensor = model.it3_conditioning.embedders["net-dense"].last.weight
        return weight

    class Steps(Callback):
        values: list[Tensor]

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            weight = pl_module.it3_conditioning.embedders["net-dense"].last.weight
            self.values.append(weight.detach().clone())

    steps = Steps()
    steps.values = []
    last(steps)
    expected = torch.stack(steps.values).mean(0)
    torch.testing.assert_close(last(WeightAveraging()), expected)


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.conv)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        self.unfreeze_and_add_param_group(pl_module.net.conv, optimizer)


@pytest.mark.parametrize(
    "callback",
    [BackboneFinetuning(), Unfreezes(), ModelPruning("l1_unstructured", amount=0.5)],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_are_there_to_change_the_network_are_refused(
    callback: Callback, source: str
) -> None:
    def step(*_: Any) -> None:
        raise AssertionError("a batch was run")

    model: Any = IT3Net(**parts(source_checkpoint=source))
    model.training_step = step
    message = f"freezes the network, and {type(callback).__name__} changes it. Leave out"
    with pytest.raises(MisconfigurationException, match=message):
        quiet(callbacks=[callback]).fit(model, loader())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Optimizes(Callback):
    """Gives a layer of the network to the optimizer, when an epoch begins."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.optimizers[0].add_param_group({"params": list(pl_module.net.head.parameters())})


class Requires(Callback):
    """Lets a layer of the network need gradients, when an epoch begins."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.net.head.requires_grad_(True)


@pytest.mark.parametrize("kind", [Optimizes, Requires])
def test_a_callback_that_lets_the_network_train_is_refused_before_any_batch(
    kind: type[Callback], source: str
) -> None:
    def step(*_: Any) -> None:
        raise AssertionError("a batch was run")

    model: Any = IT3Net(**parts(source_checkpoint=source))
    model.training_step = step
    with pytest.raises(MisconfigurationException, match=f"The callbacks are {kind.__name__}"):
        quiet(callbacks=[kind()]).fit(model, loader())
    assert differing(model.state_dict(), source) == []


class Writes(Callback):
    """Writes into a layer of the network, when an epoch ends."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.get_parameter("net.head.weight").data.mul_(2)
        pl_module.get_buffer("net.bn.running_mean").add_(1)


def test_what_any_other_callback_writes_is_put_back_and_told(source: str) -> None:
    model = IT3Net(**parts(source_checkpoint=source))
    told = r"wrote into the frozen network: net.bn.running_mean, net.head.weight. It has been put"
    with pytest.warns(UserWarning, match=told):
        quiet(callbacks=[Writes()], max_epochs=2).fit(model, loader())
    assert differing(model.state_dict(), source) == []


def test_joint_training_is_not_kept_from_moving() -> None:
    first = seeded(IT3Net(**parts()))
    before = of_network(first)
    quiet(callbacks=[StochasticWeightAveraging(swa_lrs=0.1)], max_epochs=2).fit(first, loader())
    assert not all(torch.equal(before[name], v) for name, v in of_network(first).items())


def test_entries_are_put_back_in_place() -> None:
    layer: Any = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    assert entries(layer, bool).keys() == layer.state_dict().keys()
    kept, weight = Kept(layer, lambda name: name.startswith("0")), layer[0].weight
    weight.data.add_(1)
    layer[1].running_mean.add_(1)
    layer[0].bias.data.fill_(float("nan"))
    kept.take(lambda name: name.endswith("bias"))
    assert kept.put_back() == ["0.weight"]
    assert layer[0].weight is weight
    assert torch.equal(weight, kept.values["0.weight"])
    assert layer[1].running_mean.item() == 1
