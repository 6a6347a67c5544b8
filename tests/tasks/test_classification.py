"""Classification: the area under the ROC curve against scikit-learn, each loader by itself."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.task_runs import loaders, outputs, quiet, targets
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning.networks import MLP
from it3_lightning.tasks import AUROC, Classifier


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


def test_ignored_labels_count_in_no_loss_and_no_score() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(10, 3), torch.arange(10) % 2
    ignored = labels.clone()
    ignored[[1, 2, 3, 6]] = 255  # of the first batch of four, one counts; of the last, both do
    model = Classifier(MLP(3, 2, (8,)), ignore_index=255, auroc=True)
    kept = ignored != 255
    expected, found = (
        quiet().test(net, DataLoader(TensorDataset(*data), batch_size=size), verbose=False)[0]
        for net, data, size in (
            (Classifier(model.network, auroc=True), (x[kept], labels[kept]), 6),
            (model, (x, ignored), 4),
        )
    )
    assert found == pytest.approx(expected)
    scores = model.scores(torch.randn(2, 2), torch.tensor([255, 255]))
    assert [value.item() for value in scores.values()] == [0.0, 0.0]
