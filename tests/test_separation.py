"""The distance as a score of being shifted: against scikit-learn, on distances computed by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_benchmark import benchmark, digits, make_model
from torch import Tensor

from it3_lightning.benchmark import Results
from it3_lightning.benchmark.separation import CONFIDENCE, DISTANCE, separations
from it3_lightning.methods import Idempotence
from it3_lightning.report import page, separation
from it3_lightning.tasks import IT3Classifier


def drawn() -> IT3Classifier:
    torch.manual_seed(0)
    model = make_model()
    for parameter in model.it3_parts()[1].parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def scores(model: IT3Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared L2 distances and 1 - confidence, in plain torch."""
    with torch.no_grad():
        y0 = model(images).softmax(1)
        y1 = model.predict_with(images, y0).softmax(1)
    return (y0 - y1).square().sum(1), 1 - y0.max(1).values


def test_separation_is_the_area_under_the_curve_of_distances_and_confidences() -> None:
    model, data = drawn(), digits()
    found = {
        record.row: record.score
        for record in separations({"post-hoc": model}, data, Idempotence("l2"))
    }
    clean, shifted = (torch.cat([x for x, _ in loader]) for loader in data.test_dataloader())
    target = np.repeat([0, 1], [len(clean), len(shifted)])
    for index, name in enumerate((DISTANCE, CONFIDENCE)):
        both = torch.cat([scores(model, clean)[index], scores(model, shifted)[index]])
        expected = 100 * roc_auc_score(target, both.numpy())
        assert found[name] == pytest.approx(expected, abs=0.02)


def test_benchmark_reports_the_separation_and_keeps_it(tmp_path: Path) -> None:
    def run() -> Results:
        return benchmark(tmp_path).run(make_model, digits())

    first, second = run(), run()  # the second time from the file
    titles, *rows = separation(first)
    assert titles == ["training", "score", "contrast"]
    assert [row[:2] for row in rows] == [
        [training, name] for training in ("joint", "post-hoc") for name in (DISTANCE, CONFIDENCE)
    ]
    assert rows == separation(second)[1:]
    assert all(f"<td>{row[2]}</td>" in page(first) for row in rows)


def test_a_model_without_a_second_prediction_has_no_distance() -> None:
    assert separations({"ordinary": drawn()}, digits(), Idempotence()) == []
    assert separation(Results("acc", [])) == []
