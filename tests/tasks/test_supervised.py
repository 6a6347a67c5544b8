"""What all tasks share: metrics of one evaluation alone, and sizes that fit the data."""

from typing import Any

import pytest
import torch
from helpers.task_runs import loaders, quiet, regressor
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from it3_lightning import ClassPrior, FeatureInjection
from it3_lightning.data import BundledDataModule
from it3_lightning.networks import MLP
from it3_lightning.tasks import Classifier, IT3Classifier, Regressor


def test_auroc_is_logged_only_where_asked_for_and_rmse_only_where_judged() -> None:
    trainer = quiet(max_epochs=1)
    trainer.fit(Classifier(MLP(3, 2, (8,))), loaders(2)[0], loaders(2)[1])
    assert trainer.callback_metrics.keys() == {"train_loss", "train_acc", "val_loss", "val_acc"}
    trainer = quiet(max_epochs=1)
    trainer.fit(Regressor(MLP(3, 1, (8,))), loaders()[0], loaders()[1])
    expected = {"train_loss", "train_mae", "val_loss", "val_mae", "val_rmse"}
    assert trainer.callback_metrics.keys() == expected


def test_a_module_that_was_validated_can_be_fitted_and_tested_again() -> None:
    model, (first, second) = regressor(), loaders()
    before = quiet().validate(model, second, verbose=False)[0]["val_rmse"]
    trainer = quiet(max_epochs=1)  # counts without inference mode
    trainer.fit(model, first, second)
    after = trainer.callback_metrics["val_rmse"].item()
    assert after != before
    assert quiet().validate(model, second, verbose=False)[0]["val_rmse"] == pytest.approx(after)


def test_a_run_that_broke_off_leaves_nothing_in_the_next_ones_score() -> None:
    class Breaks(Regressor):
        broken = True

        def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
            if self.broken and len(target) < 4:
                raise KeyError
            return super().scores(outputs, target)

    torch.manual_seed(0)
    model, (first, _) = Breaks(MLP(3, 1, (8,))), loaders()
    with pytest.raises(KeyError):
        quiet().test(model, first, verbose=False)
    model.broken = False
    (logged,) = quiet().test(model, first, verbose=False)
    assert logged["test_rmse"] ** 2 == pytest.approx(logged["test_loss"])


def test_batches_of_the_sanity_check_are_not_counted() -> None:
    class Counts(Regressor):
        begun = 0

        def metrics(self) -> dict[str, Metric]:
            self.begun += 1
            return super().metrics()

    model, (first, second) = Counts(MLP(3, 1, (8,))), loaders()
    quiet(max_epochs=1, num_sanity_val_steps=2).fit(model, first, second)
    assert model.begun == 1


@pytest.mark.parametrize(
    ("network", "classes", "message"),
    [
        (MLP(31, 2), 2, "network.in_features to be 30, .* got 31"),
        (MLP(30, 3), 2, "network.out_features to be 2, .* got 3"),
        (MLP(30, 2), 5, "it3_prior.channels to be 2, .* got 5"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_network_of_other_sizes_than_the_data_is_refused_with_both_numbers(
    network: MLP, classes: int, message: str, stage: str
) -> None:
    model = IT3Classifier(
        network, prior=ClassPrior(classes), conditioning=FeatureInjection("network.layer0")
    )
    with pytest.raises(MisconfigurationException, match=message):
        getattr(quiet(max_epochs=1), stage)(model, datamodule=BundledDataModule())


def test_values_are_refused_by_a_classifier_and_classes_by_a_regressor() -> None:
    classifier = Classifier(MLP(10, 2))
    with pytest.raises(MisconfigurationException, match=r"out_features to be 1, .* got 2"):
        quiet(max_epochs=1).fit(classifier, datamodule=BundledDataModule("diabetes"))
    with pytest.raises(MisconfigurationException, match=r"out_features to be 3, .* got 1"):
        quiet(max_epochs=1).fit(Regressor(MLP(4, 1)), datamodule=BundledDataModule("iris"))


def test_networks_and_data_that_do_not_tell_their_sizes_are_taken_as_they_are() -> None:
    network: Any = torch.nn.Sequential(MLP(3, 1, (8,)))
    for module in (Regressor(network), Regressor(MLP(3, 1, (8,)))):
        (logged,) = quiet().test(module, loaders()[0], verbose=False)
        assert logged["test_rmse"] > 0
