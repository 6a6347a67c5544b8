"""What a `ValuePrior` measures of the training targets, without a trace in the training."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toy import Batch, LitNet, parts, quiet, samples, seeded
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from it3_lightning import DualPass, IT3Mixin, ValuePrior

EXACT = DualPass(perturb_prior=False)


class Regression(LitNet):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0])[:, 0], batch[1])


class IT3Regression(IT3Mixin, Regression):
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


def test_large_data_is_measured_evenly_from_end_to_end() -> None:
    targets = torch.arange(1000.0)
    data = DataLoader(TensorDataset(samples(1000)[0], targets), batch_size=4)
    model = regression(ValuePrior())
    quiet(max_steps=1).fit(model, data)
    assert model.it3_prior.mean.item() == pytest.approx(targets[::2].mean().item())


def test_given_statistics_are_not_measured() -> None:
    model = regression(ValuePrior(mean=1.0, std=3.0))
    quiet().fit(model, pairs())
    assert (model.it3_prior.mean.item(), model.it3_prior.std.item()) == (1.0, 3.0)


class Draws(TensorDataset):
    """Draws random numbers from every global generator for each sample."""

    def __getitem__(self, index: int) -> Any:
        x, y = self.tensors[0][index], self.tensors[1][index]
        return x + torch.rand(1) + random.random() + np.random.rand(), y


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
        model = regression(prior)
        quiet(max_epochs=2).fit(model, data)
        return model.state_dict(), torch.get_rng_state(), random.random(), np.random.rand()

    expected = values().double()
    mean, std = expected.mean().item(), expected.std(correction=0).item()
    measured, given = run(ValuePrior()), run(ValuePrior(mean=mean, std=std))
    assert [k for k, v in measured[0].items() if not torch.equal(given[0][k], v)] == []
    assert torch.equal(measured[1], given[1])
    assert measured[2:] == given[2:]


def test_several_training_loaders_are_measured_as_the_step_sees_them() -> None:
    class Two(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.mse_loss(self(batch["a"][0])[:, 0], batch["a"][1])

    class IT3Two(IT3Mixin, Two):
        def it3_inputs(self, batch: Any) -> Any:
            return batch["a"][0]

        def it3_target(self, batch: Any) -> Any:
            return batch["a"][1]

    model: Any = IT3Two(**parts(prior=ValuePrior(), dual_pass=EXACT))
    quiet().fit(model, {"a": pairs(), "b": pairs(5)})
    assert model.it3_prior.mean.item() == pytest.approx(values().double().mean().item())
