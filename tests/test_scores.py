"""RMSE and AUROC: of a whole dataloader, each loader by itself, every sample once."""

from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from sklearn.metrics import mean_absolute_error, roc_auc_score, root_mean_squared_error
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from it3_lightning import (
    ClassPrior,
    FeatureInjection,
    Idempotence,
    IT3TestTimeCallback,
    ValuePrior,
)
from it3_lightning.data import BundledDataModule
from it3_lightning.networks import MLP
from it3_lightning.tasks import AUROC, Classifier, IT3Classifier, IT3Regressor, Regressor

Loader = DataLoader[tuple[Tensor, ...]]
COUNTS = (11, 7)  # batches of 4: the last ones are smaller, so means of batch values are wrong


def quiet(**arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def loaders(classes: int = 0) -> list[Loader]:
    """Two loaders; the second one's samples lie elsewhere."""
    sets = []
    for seed, count in enumerate(COUNTS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 3, generator=generator) + seed
        y: Tensor = torch.arange(count) % classes if classes else x.sum(1, keepdim=True) + 5
        sets.append(DataLoader(TensorDataset(x, y), batch_size=4))
    return sets


def regressor(**arguments: Any) -> IT3Regressor:
    torch.manual_seed(0)
    return IT3Regressor(
        MLP(3, 1, (8,)),
        prior=ValuePrior(mean=5.0, std=2.0),
        conditioning=FeatureInjection("network.layer0"),
        **arguments,
    )


def outputs(model: Any, trainer: Trainer, sets: list[Loader]) -> list[Tensor]:
    predicted: Any = trainer.predict(model, sets)
    return [torch.cat(batches) for batches in predicted]


def targets(sets: list[Loader]) -> list[Tensor]:
    return [torch.cat([batch[1] for batch in loader]) for loader in sets]


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


@pytest.mark.parametrize("classes", [2, 3])
def test_auroc_is_that_of_scikit_learn_for_each_loader(classes: int) -> None:
    torch.manual_seed(0)
    model, sets = Classifier(MLP(3, classes, (8,)), auroc=True), loaders(classes)
    logged: Any = quiet().test(model, sets, verbose=False)
    for index, (logits, target) in enumerate(
        zip(outputs(model, quiet(), sets), targets(sets), strict=True)
    ):
        scores = logits.softmax(1).numpy()
        expected = roc_auc_score(
            target.numpy(), scores[:, 1] if classes == 2 else scores, multi_class="ovr"
        )
        assert logged[index][f"test_auroc/dataloader_idx_{index}"] == pytest.approx(expected)


def test_auroc_leaves_absent_classes_out_and_is_nan_for_one_class() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    metric = AUROC()
    for rows in (slice(0, 25), slice(25, 40)):
        metric.update(logits[rows], labels[rows])
    scores = logits.softmax(1).numpy()
    areas = [roc_auc_score(labels.numpy() == c, scores[:, c]) for c in range(3)]
    assert metric.compute().item() == pytest.approx(np.mean(areas))
    metric.reset()
    metric.update(logits[:5], torch.zeros(5).long())
    assert metric.compute().isnan()


def test_auroc_tells_very_confident_scores_apart() -> None:
    metric = AUROC()
    metric.update(torch.tensor([[0.0, 20.0], [0.0, 21.0], [0.0, 22.0]]), torch.tensor([0, 1, 1]))
    assert metric.compute() == 1  # in float32 all three probabilities are 1


def test_auroc_is_logged_only_where_asked_for_and_rmse_only_where_judged() -> None:
    trainer = quiet(max_epochs=1)
    trainer.fit(Classifier(MLP(3, 2, (8,))), loaders(2)[0], loaders(2)[1])
    assert trainer.callback_metrics.keys() == {"train_loss", "train_acc", "val_loss", "val_acc"}
    trainer = quiet(max_epochs=1)
    trainer.fit(Regressor(MLP(3, 1, (8,))), loaders()[0], loaders()[1])
    expected = {"train_loss", "train_mae", "val_loss", "val_mae", "val_rmse"}
    assert trainer.callback_metrics.keys() == expected


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


# --- sizes


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


# --- the network


def test_batch_norm_layers_follow_the_hidden_ones() -> None:
    torch.manual_seed(0)
    network = MLP(3, 2, (4, 5), batch_norm=True, output_mean=7.0, output_std=3.0)
    x = torch.randn(9, 3)
    names = [name for name, _ in network.named_children()]
    assert names == ["layer0", "norm0", "layer1", "norm1", "head"]
    hidden = x
    for index in range(2):
        hidden = network.get_submodule(f"layer{index}")(hidden)
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
        hidden = hidden.clamp_min(0)
    expected = 7 + 3 * (hidden @ network.head.weight.T + network.head.bias)
    torch.testing.assert_close(network(x), expected)


def test_a_network_without_hidden_layers_or_deviation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one hidden layer"):
        MLP(3, 1, ())
    with pytest.raises(ValueError, match="output_std > 0, got 0"):
        MLP(3, 1, output_std=0)
