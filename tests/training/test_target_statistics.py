"""What a ValuePrior measures of the targets: those of the training steps, without a trace."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toy import Batch, LitNet, parts, quiet, samples, seeded
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from it3_lightning import DualPass, IT3Mixin, ValuePrior

EXACT = DualPass(perturb_prior=False)


class Regression(LitNet):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0])[:, 0], batch[1])


class FirstOutput(IT3Mixin):
    def it3_forward(self, inputs: Any) -> Tensor:
        return super().it3_forward(inputs)[:, :1]


class IT3Regression(FirstOutput, Regression):
    pass


def values(count: int = 10) -> Tensor:
    return 5 + 2 * torch.randn(count, generator=torch.Generator().manual_seed(3))


def regression(prior: ValuePrior) -> Any:
    return seeded(IT3Regression(**parts(prior=prior, dual_pass=EXACT, lr=1e-3)))


def pairs(count: int = 10, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(samples(count)[0], values(count)), batch_size=4, **kwargs)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(samples(10)[0], values(), strict=True))


def test_value_prior_measures_the_training_targets() -> None:
    for data in (pairs(), pairs(shuffle=True), DataLoader(Stream(), batch_size=4)):
        model = regression(ValuePrior())
        quiet().fit(model, data)
        expected = values().double()
        assert model.it3_prior.mean.item() == pytest.approx(expected.mean().item())
        assert model.it3_prior.std.item() == pytest.approx(expected.std(correction=0).item())
        assert torch.equal(model.state_dict()["it3_prior.mean"], model.it3_prior.mean)


def test_given_statistics_are_not_measured() -> None:
    model = regression(ValuePrior(mean=1.0, std=3.0))
    quiet().fit(model, pairs())
    assert (model.it3_prior.mean.item(), model.it3_prior.std.item()) == (1.0, 3.0)


class Draws(TensorDataset):
    """Draws random numbers from every global generator for each sample."""

    def __getitem__(self, index: int) -> Any:
        x, y = self.tensors[0][index], self.tensors[1][index]
        return x + torch.rand(1) + random.random() + np.random.rand(), y


class Batches(Callback):
    """Notes the inputs and the targets of every training batch."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        self.inputs.append(batch[0].clone())
        self.targets.append(batch[1].clone())


@pytest.mark.parametrize("workers", [0, 1])
def test_measuring_disturbs_neither_order_nor_random_state(workers: int) -> None:
    def run(prior: ValuePrior) -> Any:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        generator = torch.Generator().manual_seed(5)
        data: Any = DataLoader(
            Draws(samples(10)[0], values()),
            batch_size=4,
            shuffle=True,
            generator=generator,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        model, seen = regression(prior), Batches()
        quiet(max_epochs=2, callbacks=[seen]).fit(model, data)
        return seen.inputs, torch.get_rng_state(), random.random(), np.random.rand()

    measured, given = run(ValuePrior()), run(ValuePrior(mean=5.0, std=2.0))
    assert len(measured[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(measured[0], given[0], strict=True))
    assert torch.equal(measured[1], given[1])
    assert measured[2:] == given[2:]


def test_several_training_loaders_are_measured_as_the_step_sees_them() -> None:
    class Two(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.mse_loss(self(batch["a"][0])[:, 0], batch["a"][1])

    class IT3Two(FirstOutput, Two):
        def it3_inputs(self, batch: Any) -> Any:
            return batch["a"][0]

        def it3_target(self, batch: Any) -> Any:
            return batch["a"][1]

    model: Any = IT3Two(**parts(prior=ValuePrior(), dual_pass=EXACT))
    quiet().fit(model, {"a": pairs(), "b": pairs(5)})
    assert model.it3_prior.mean.item() == pytest.approx(values().double().mean().item())


def assert_measured(model: Any, targets: Tensor) -> None:
    """Hold mean and standard deviation against numpy's."""
    expected = targets.double().numpy()
    assert model.it3_prior.mean.item() == pytest.approx(expected.mean(), rel=1e-5)
    assert model.it3_prior.std.item() == pytest.approx(expected.std(), rel=1e-5)


class Normalised(IT3Regression):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0], (batch[1] - 5) / 2]


class Unpacked(IT3Regression):
    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        pair = [batch["in"], batch["out"]]
        return super().transfer_batch_to_device(pair, device, dataloader_idx)


def test_targets_are_measured_after_the_hooks_that_change_a_batch() -> None:
    model: Any = Normalised(**parts(prior=ValuePrior(), dual_pass=EXACT, lr=1e-3))
    quiet().fit(model, pairs())
    assert_measured(model, (values() - 5) / 2)
    rows: Any = [{"in": x, "out": y} for x, y in zip(samples(10)[0], values(), strict=True)]
    model = Unpacked(**parts(prior=ValuePrior(), dual_pass=EXACT, lr=1e-3))
    quiet().fit(model, DataLoader(rows, batch_size=4))
    assert_measured(model, values())


class Queue(IterableDataset[Any]):
    """Goes on where it was, as a socket does."""

    def __init__(self) -> None:
        self.rows = iter(zip(samples(10)[0], values(), strict=True))

    def __iter__(self) -> Any:
        return self.rows


def test_a_stream_that_can_be_read_once_is_trained_on_whole() -> None:
    def generator() -> Any:
        yield from DataLoader(TensorDataset(samples(12)[0], values(12)), batch_size=4)

    for stream, count in ((DataLoader(Queue(), batch_size=5), 10), (generator(), 12)):
        model, seen = regression(ValuePrior()), Batches()
        quiet(callbacks=[seen]).fit(model, stream)
        assert sum(map(len, seen.targets)) == count
        assert_measured(model, values(count))


class OpenedByWorker(TensorDataset):
    """Has its data in the processes that its ``worker_init_fn`` was run in."""

    opened = False

    def __getitem__(self, index: int) -> Any:
        assert self.opened
        return tuple(tensor[index] for tensor in self.tensors)


def _open(_: int) -> None:
    OpenedByWorker.opened = True


def test_data_opened_by_workers_are_not_opened_elsewhere() -> None:
    data: Any = OpenedByWorker(samples(10)[0], values())
    model = regression(ValuePrior())
    quiet().fit(model, DataLoader(data, batch_size=5, num_workers=1, worker_init_fn=_open))
    assert_measured(model, values())


def test_every_batch_is_scaled_by_what_was_seen_up_to_it_and_the_second_epoch_by_all() -> None:
    class Known(Callback):
        values: list[tuple[float, float]]

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            prior = pl_module.it3_prior
            self.values.append((prior.mean.item(), prior.std.item()))

    known = Known()
    known.values = []
    quiet(callbacks=[known], max_epochs=2).fit(regression(ValuePrior()), pairs())
    y = values().double().numpy()
    expected = [(y[:n].mean(), y[:n].std()) for n in (4, 8, 10, 10, 10, 10)]
    np.testing.assert_allclose(known.values, expected, rtol=1e-5)


def test_search_for_a_learning_rate_sees_finite_losses_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = regression(ValuePrior())
    found = Tuner(quiet()).lr_find(
        model, pairs(40), num_training=5, attr_name="lr", update_attr=False
    )
    assert found is not None
    assert all(map(math.isfinite, found.results["loss"]))
    assert model.it3_prior.measuring
    assert not model.it3_prior.fitted
    quiet().fit(model, pairs(8))
    assert_measured(model, values(8))


def test_a_resumed_first_epoch_goes_on_measuring(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    quiet(callbacks=[Saves()]).fit(regression(ValuePrior()), pairs())
    model = regression(ValuePrior())
    model.load_state_dict(torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"])
    assert_measured(model, values()[:4])
    rest = TensorDataset(samples(10)[0][4:], values()[4:])
    quiet().fit(model, DataLoader(rest, batch_size=4))
    assert_measured(model, values())
    assert not model.it3_prior.measuring


def test_an_epoch_that_was_cut_short_is_not_all() -> None:
    model = regression(ValuePrior())
    quiet(max_steps=1).fit(model, pairs())
    assert model.it3_prior.measuring
    quiet(limit_train_batches=1).fit(regression(model.it3_prior), pairs())
    assert not model.it3_prior.measuring


def test_a_validation_measures_nothing() -> None:
    class Validated(IT3Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.it3_loss(batch, lambda outputs, target: outputs[:, 0].sub(target).square().mean())

    model: Any = Validated(**parts(prior=ValuePrior(), dual_pass=EXACT, lr=1e-3))
    other = DataLoader(TensorDataset(samples(4)[0], 100 + values(4)), batch_size=4)
    quiet(num_sanity_val_steps=1).fit(model, pairs(), other)
    assert_measured(model, values())


def test_averaged_weights_leave_the_statistics_alone(tmp_path: Path) -> None:
    class Validated(IT3Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.it3_prior is not None
            during.append(self.it3_prior.get_buffer("mean").item())

    during: list[float] = []
    model: Any = Validated(**parts(prior=ValuePrior(), dual_pass=EXACT, lr=1e-3))
    average = EMAWeightAveraging(decay=0.5)
    trainer = quiet(callbacks=[average], max_epochs=2)
    with pytest.warns(UserWarning, match="overrides the configure_model"):
        trainer.fit(model, pairs(), pairs())
    assert_measured(model, values())
    assert during == pytest.approx(6 * [model.it3_prior.mean.item()])
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    state = torch.load(tmp_path / "averaged.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["it3_prior.mean"], model.it3_prior.mean)
    assert torch.equal(state["it3_prior.std"], model.it3_prior.std)


def test_targets_that_are_not_finite_do_not_count_and_equal_ones_have_a_spread_of_one() -> None:
    prior = ValuePrior()
    prior.measure(torch.tensor([7.0, float("nan")]))
    assert (prior.mean.item(), prior.std.item(), int(prior.count)) == (7, 1, 1)
    prior.measure(torch.tensor([7.1] * 3).sub(0.1))
    assert prior.std.item() == pytest.approx(1) or prior.std.item() < 1e-6


def test_what_was_scaled_before_more_was_measured_can_still_be_differentiated() -> None:
    prior, outputs = ValuePrior(), torch.ones(3, requires_grad=True)
    prior.measure(torch.tensor([0.0, 2.0]))
    before = prior.from_output(outputs)  # std 1
    prior.measure(torch.tensor([-3.0, 5.0]))
    (gradient,) = torch.autograd.grad(before.sum() + prior.from_output(outputs).sum(), [outputs])
    expected = 1 + 1 / np.std([0, 2, -3, 5])
    assert gradient.tolist() == pytest.approx(3 * [expected])
