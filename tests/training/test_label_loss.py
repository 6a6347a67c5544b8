"""The loss of the label pass: logged in training and on validation batches, without a trace."""

from typing import Any

import pytest
import torch
from helpers.toy import Batch, IT3Net, LitNet, loader, net, quiet, samples
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from it3_lightning import DualPass, IT3Mixin

EXACT = DualPass(perturb_prior=False)


class Validates(LitNet):
    """Validates as people do."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class IT3Validates(IT3Mixin, Validates):
    """The same with priors."""


def label_loss(model: Any, batch: Batch) -> float:
    """Compute the loss with the exact labels as prior."""
    with torch.no_grad():
        logits = model.predict_with(batch[0], F.one_hot(batch[1], 3).to(batch[0]))
        return F.cross_entropy(logits, batch[1]).item()


def unseen() -> DataLoader[Any]:
    """Serve batches of four, four and two other samples."""
    return loader(10, 4, seed=1)


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_it_is_that_with_the_labels_as_priors(train: Any) -> None:
    model = net(IT3Validates, train=train, dual_pass=EXACT)
    optimizer = torch.optim.SGD(model.it3_conditioning.parameters(), lr=0.0)
    model.configure_optimizers = lambda: optimizer
    trainer = quiet()
    trainer.fit(model, loader(), unseen())
    model.eval()
    expected = sum(len(batch[0]) * label_loss(model, batch) for batch in unseen()) / 10
    validated = float(trainer.callback_metrics["it3/val_label_loss"])
    assert validated == pytest.approx(expected, abs=1e-6)
    assert float(trainer.callback_metrics["val_loss"]) != pytest.approx(validated)
    model.train(train == "joint")  # with the statistics of each batch
    expected = sum(label_loss(model, batch) for batch in loader()) / 3
    assert float(trainer.callback_metrics["it3/label_loss"]) == pytest.approx(expected, abs=1e-6)


def test_each_loader_has_its_own() -> None:
    model, trainer = net(IT3Validates, dual_pass=EXACT), quiet()
    trainer.fit(model, loader(), [unseen(), loader(4, 4, seed=2)])
    model.eval()
    expected = label_loss(model, samples(4, seed=2))
    logged = trainer.callback_metrics["it3/val_label_loss/dataloader_idx_1"]
    assert float(logged) == pytest.approx(expected, abs=1e-6)


class Epochs(Callback):
    """Keeps the loss on validation batches of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["it3/val_label_loss"]))


def test_its_random_priors_and_inputs_are_those_of_the_last_epoch() -> None:
    epochs = Epochs()
    model = net(IT3Validates, train="conditioning")  # blurred priors, noisy inputs
    optimizer = torch.optim.SGD(model.it3_conditioning.parameters(), lr=0.0)
    model.configure_optimizers = lambda: optimizer
    quiet(callbacks=[epochs], max_epochs=3, num_sanity_val_steps=2).fit(model, loader(), unseen())
    assert epochs.losses == [epochs.losses[0]] * 3


class Notes(Validates):
    """Counts its training steps in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.batches: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        assert isinstance(self.calls, Tensor)
        self.calls += 1
        self.batches.append(batch_idx)
        self.log("steps", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return super().training_step(batch, batch_idx)


class IT3Notes(IT3Mixin, Notes):
    """The same with priors."""


def test_validating_trains_the_same_weights_and_leaves_no_trace() -> None:
    with_loss, without = net(IT3Notes), net(IT3Notes)
    without._it3_validate = lambda *_: None
    for model in (with_loss, without):
        torch.manual_seed(0)
        trainer = quiet(max_epochs=2)
        trainer.fit(model, loader(), unseen())
        assert model.batches == [0, 1, 2] * 2
        assert float(model.calls) == 6
        assert float(trainer.callback_metrics["steps"]) == 3
    for name, value in without.state_dict().items():
        assert torch.equal(with_loss.state_dict()[name], value), name


def test_a_step_that_cannot_be_run_on_validation_batches_is_told_and_fitting_goes_on() -> None:
    class Pairs(Validates):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    class IT3Pairs(IT3Mixin, Pairs):
        pass

    pairs = [{"x": x, "y": y} for x, y in loader()]
    trainer, model = quiet(max_epochs=2), net(IT3Pairs)
    with pytest.warns(
        UserWarning, match=r"it3/val_label_loss is not logged: training_step"
    ) as told:
        trainer.fit(model, DataLoader(pairs, batch_size=None), unseen())  # type: ignore[arg-type]
    assert sum("it3/val_label_loss" in str(each.message) for each in told) == 1
    assert "it3/val_label_loss" not in trainer.callback_metrics
    assert trainer.current_epoch == 2
    assert {"val_loss", "it3/label_loss"} <= trainer.callback_metrics.keys()


def test_a_step_of_ones_own_logs_it_in_training_alone() -> None:
    class Own(IT3Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return self.it3_loss(batch, F.cross_entropy)

    trainer = quiet()
    trainer.fit(net(Own, dual_pass=EXACT), loader())
    assert {k for k in trainer.callback_metrics if "label_loss" in k} == {
        "it3/label_loss",
        "it3/label_loss_epoch",
        "it3/label_loss_step",
    }


def test_one_pass_for_both_priors_has_none_of_its_own() -> None:
    model, trainer = net(IT3Validates, dual_pass=DualPass(passes="single")), quiet()
    trainer.fit(model, loader(), unseen())
    assert "it3/label_loss" not in trainer.callback_metrics
    assert "it3/val_label_loss" in trainer.callback_metrics


@pytest.mark.parametrize("fitted", [True, False])
def test_no_loss_is_logged_where_training_is_off_or_a_validation_stands_alone(fitted: bool) -> None:
    trainer = quiet()
    if fitted:
        trainer.fit(IT3Validates(train="off"), loader(), unseen())
    else:
        trainer.validate(net(IT3Validates), unseen(), verbose=False)
    assert [k for k in trainer.callback_metrics if "label_loss" in k] == []
    assert "val_loss" in trainer.callback_metrics
