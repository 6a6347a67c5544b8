"""What the callback cannot adapt it refuses before any batch, saying what to do."""

from typing import Any

import pytest
import torch
from helpers.toy import IT3Net, LitNet, loader, parts, quiet, samples
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from it3_lightning import Idempotence, IT3TestTimeCallback, ValuePrior
from it3_lightning.callbacks.checks import check_trainer
from it3_lightning.engine import Settings


def refused(model: Any, match: str, data: Any = None, stage: str = "test", **args: Any) -> None:
    def step(*_: Any) -> None:
        raise AssertionError("a batch was run")

    model.forward = step
    trainer = quiet(callbacks=[IT3TestTimeCallback(**args)])
    with pytest.raises(MisconfigurationException, match=match):
        getattr(trainer, stage)(model, data or loader())


def test_module_without_the_mixin_is_shown_the_right_code() -> None:
    wrong = r"LitNet does not.\n    wrong:  model = LitNet\(...\)\n"
    right = r"    right:  class IT3Net\(IT3Mixin, LitNet\): pass"
    refused(LitNet(), wrong + right)


def test_fit_is_refused_before_training_where_its_validation_could_not_adapt() -> None:
    refused(LitNet(), "LitNet does not", stage="fit", stages=["validate"])


def test_module_without_prior_is_refused_where_training_is_off() -> None:
    refused(IT3Net(train="off"), "IT3Net has no prior and no conditioning")


def test_prior_that_does_not_know_the_targets_is_refused() -> None:
    unfitted = IT3Net(**parts(prior=ValuePrior(3)))
    refused(unfitted, "ValuePrior does not know the mean and spread of the targets. Give both")


def test_selection_without_a_match_names_the_closest() -> None:
    refused(IT3Net(**parts()), "Did you mean 'net.head", parameters=["net.haed.*"])


def test_nothing_trainable_is_refused() -> None:
    model = IT3Net(**parts()).requires_grad_(False)
    refused(model, "'all' matches no trainable parameter")


@pytest.mark.parametrize(
    "settings",
    [{"norm_stats": "batch"}, {"objective": Idempotence(balance=0.3)}],
    ids=["batch statistics", "balance"],
)
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_single_samples_are_refused_where_several_are_needed(
    settings: dict[str, Any], stage: Any
) -> None:
    class Validated(IT3Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    model, data = Validated(**parts()), [loader(), loader(batch=1)]
    refused(model, "a dataloader has batch_size=1", data, stage, stages=[stage], **settings)


def test_batch_sampler_of_single_samples_is_refused() -> None:
    dataset = TensorDataset(*samples())
    sampler = BatchSampler(SequentialSampler(dataset), 1, drop_last=False)
    data = DataLoader(dataset, batch_sampler=sampler)
    refused(IT3Net(**parts()), "batch_size=1", data, norm_stats="batch")


class Host:
    """As much of a Trainer as is asked for."""

    def __init__(self, strategy: Any, world_size: int) -> None:
        self.strategy, self.world_size = strategy, world_size
        self.callbacks: list[Any] = []


def checked(strategy: Any, world_size: int, independent_ranks: bool = False, **args: Any) -> None:
    trainer: Any = Host(strategy, world_size)
    module: LightningModule = IT3Net(**parts())
    check_trainer(trainer, module, Settings(**args), independent_ranks)


def test_batch_statistics_shared_between_processes_are_refused() -> None:
    trainer: Any = Host(DDPStrategy(), 2)
    module: Any = nn.SyncBatchNorm(2)
    with pytest.raises(MisconfigurationException, match="SyncBatchNorm"):
        check_trainer(trainer, module, Settings(norm_stats="batch"), False)


def test_bets_along_a_stream_are_refused_on_several_processes() -> None:
    module: LightningModule = IT3Net(**parts())
    trainers: list[Any] = [Host(DDPStrategy(), ranks) for ranks in (2, 1)]
    with pytest.raises(MisconfigurationException, match="2 processes would each bet on their own"):
        check_trainer(trainers[0], module, Settings(), False, bets=True)
    check_trainer(trainers[0], module, Settings(), True, bets=True)
    check_trainer(trainers[1], module, Settings(), False, bets=True)


def test_sharded_strategies_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="FSDPStrategy shards the weights"):
        checked(FSDPStrategy(), 2)


def test_sharded_strategies_are_refused_before_fitting_where_the_gate_is_calibrated() -> None:
    trainer: Any = Host(FSDPStrategy(), 2)
    with pytest.raises(MisconfigurationException, match="FSDPStrategy shards the weights"):
        IT3TestTimeCallback(gate=0.95).setup(trainer, IT3Net(**parts()), "fit")


@pytest.mark.parametrize("reset", ["never", 5])
def test_carried_weights_on_several_processes_need_a_word(reset: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"2 processes would .*independent_rank"):
        checked(DDPStrategy(), 2, reset=reset)
    checked(DDPStrategy(), 2, reset=reset, independent_ranks=True)
    checked(DDPStrategy(), 2, reset="batch")
    checked(DDPStrategy(), 1, reset=reset)


def test_refusal_leaves_the_module_as_it_was() -> None:
    model = IT3Net(**parts())
    trainer: Trainer = quiet(callbacks=[IT3TestTimeCallback(parameters=["nothing"])])
    with pytest.raises(MisconfigurationException):
        trainer.predict(model, loader())
    assert "predict_step" not in vars(model)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    assert not torch.is_inference_mode_enabled()


def test_a_module_without_forward_is_shown_the_right_code() -> None:
    class NoForward(IT3Net):
        forward = LightningModule.forward

    trainer = quiet(callbacks=[IT3TestTimeCallback()])
    with pytest.raises(MisconfigurationException, match=r"def it3_forward\(self, inputs\):"):
        trainer.test(NoForward(**parts()), loader(), verbose=False)
