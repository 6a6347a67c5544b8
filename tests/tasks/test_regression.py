"""Regression: RMSE and MAE against scikit-learn, of every sample once, each loader by itself."""

from typing import Any

import pytest
import torch
from helpers.task_runs import loaders, outputs, quiet, regressor, targets
from lightning.pytorch import Trainer
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from it3_lightning import Idempotence, IT3TestTimeCallback


def test_rmse_and_mae_are_those_of_scikit_learn_for_each_loader() -> None:
    model, sets = regressor(), loaders()
    logged: Any = quiet().test(model, sets, verbose=False)
    pairs = zip(outputs(model, quiet(), sets), targets(sets), strict=True)
    for index, (predicted, target) in enumerate(pairs):
        for name, score in (("rmse", root_mean_squared_error), ("mae", mean_absolute_error)):
            expected = score(target.numpy(), predicted.numpy())
            key = f"test_{name}/dataloader_idx_{index}"
            assert logged[index][key] == pytest.approx(expected, rel=1e-5)
    assert logged[0]["test_rmse/dataloader_idx_0"] != logged[1]["test_rmse/dataloader_idx_1"]


@pytest.mark.parametrize("steps", [0, 3])
def test_with_adaptation_every_sample_counts_once_and_with_its_adapted_prediction(
    steps: int,
) -> None:
    def adapting() -> Trainer:
        objective = Idempotence("l1")
        return quiet(callbacks=[IT3TestTimeCallback(steps=steps, lr=0.05, objective=objective)])

    model, sets = regressor(), loaders()
    with torch.no_grad():
        for parameter in model.it3_parts()[1].parameters():
            parameter.normal_(0, 0.3)
    logged: Any = adapting().test(model, sets, verbose=False)
    adapted = outputs(model, adapting(), sets)
    for index, (predicted, target) in enumerate(zip(adapted, targets(sets), strict=True)):
        expected = root_mean_squared_error(target.numpy(), predicted.numpy())
        key = f"test_rmse/dataloader_idx_{index}"
        assert logged[index][key] == pytest.approx(expected, rel=1e-5)
    source = outputs(model, quiet(), sets)
    assert torch.equal(source[0], adapted[0]) == (steps == 0)


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_in_validation_inside_dual_pass_training_every_sample_counts_once(train: Any) -> None:
    model, sets = regressor(train=train), loaders()
    trainer = quiet(max_epochs=2)
    trainer.fit(model, sets[0], sets)
    for index, (predicted, target) in enumerate(
        zip(outputs(model, quiet(), sets), targets(sets), strict=True)
    ):
        expected = root_mean_squared_error(target.numpy(), predicted.numpy())
        logged = trainer.callback_metrics[f"val_rmse/dataloader_idx_{index}"]
        assert logged.item() == pytest.approx(expected, rel=1e-5)
