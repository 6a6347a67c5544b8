"""Scores of single samples: their means are what was logged, in every row; kept and read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benchmark_runs import benchmark, digits, make_model, scored_rows
from torch import Tensor

from it3_lightning import Idempotence, IT3TestTimeCallback, ValuePrior
from it3_lightning.benchmark import Results
from it3_lightning.benchmark.sample_scores import Seen, keep_samples, kept_samples, noting


def test_the_mean_over_samples_is_the_score_of_every_row(finished: tuple[Path, Results]) -> None:
    _, results = finished
    for r in results.records:
        scores = results.samples[r.training, r.row, r.stream, r.seed, r.shift]
        assert scores.dtype == np.bool_
        assert len(scores) == 120 or r.stream == "unequal"
        assert 100 * scores.mean() == pytest.approx(r.score, abs=1e-4)


@pytest.mark.parametrize("prediction", ["first", "mean"])
@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_what_is_noted_is_what_the_step_predicts_and_changes_nothing(
    scope: Any, prediction: Any
) -> None:
    torch.manual_seed(0)
    model, data = make_model(), digits()
    for parameter in model.it3_parts()[1].parameters():
        torch.nn.init.normal_(parameter)

    def tested() -> Any:
        objective = Idempotence(reliability=None)
        callback = IT3TestTimeCallback(objective=objective, scope=scope, prediction=prediction)
        trainer = benchmark(Path()).trainer(callbacks=[callback])
        logged = trainer.test(model, datamodule=data, verbose=False)
        return [{k: v for k, v in each.items() if "ms_per_sample" not in k} for each in logged]

    plain = tested()
    with noting(model, alone=scope == "sample") as seen:
        noted = tested()
    assert plain == noted
    assert "test_step" not in vars(model)
    for loader, logged in enumerate(plain):
        accuracy = logged[f"test_acc/dataloader_idx_{loader}"]
        scores = seen.matching(loader, accuracy)
        assert scores is not None
        assert scores.sum() == round(120 * accuracy)
        assert seen.matching(loader, accuracy + 0.1) is None


def binned(confidence: Tensor, right: Tensor) -> float:
    """The expected calibration error bin by bin, as Guo et al. write it."""
    error = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            gap = right[inside].float().mean() - confidence[inside].mean()
            error += float(inside.float().mean() * gap.abs())
    return 100 * error


def test_calibration_error_is_that_of_fifteen_bins() -> None:
    torch.manual_seed(0)
    model, seen = make_model(), Seen()
    logits, labels = 2 * torch.randn(200, 10), torch.randint(10, (200,))
    for part in (slice(0, 150), slice(150, 200)):
        seen.add(model, logits[part], (torch.zeros(1), labels[part]), 3)
    confidence, predicted = logits.softmax(1).max(1)
    expected = binned(confidence, predicted == labels)
    assert seen.calibration_error(3) == pytest.approx(expected, abs=1e-3)
    assert expected > 10
    assert seen.calibration_error(0) is None


def test_values_have_absolute_and_squared_errors_and_no_calibration() -> None:
    model, seen = make_model(), Seen()
    model.it3_prior = ValuePrior(mean=0.0, std=1.0)
    outputs, target = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 5.0])
    seen.add(model, outputs, (torch.zeros(1), target), 0)
    absolute, squared = seen.matching(0, 1.5), seen.matching(0, 2.5)
    assert absolute is not None
    assert squared is not None
    assert (absolute.tolist(), squared.tolist()) == ([1.0, 2.0], [1.0, 4.0])
    assert seen.matching(0, 2.5**0.5) is None  # the root of a mean is no mean
    assert seen.calibration_error(0) is None


def test_scores_are_kept_as_bits_or_numbers(tmp_path: Path) -> None:
    random, file = np.random.default_rng(0), tmp_path / "samples" / "one.pt"
    given = {"clean": random.random(5001) > 0.5, "fog": random.random(7).astype(np.float32)}
    keep_samples(file, "{}", given)
    found = kept_samples(file, "{}")
    assert found is not None
    assert found.keys() == given.keys()
    assert all((found[name] == given[name]).all() for name in given)
    assert file.stat().st_size < 4000


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("samples")
    return folder, benchmark(folder, distance_samples=0).run(make_model, digits())


def test_a_damaged_file_of_samples_is_made_again(
    kept_run: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = kept_run
    file = min((folder / "samples").iterdir())
    file.write_bytes(file.read_bytes()[:-9])
    ran = scored_rows(monkeypatch)
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged .*It is made again"):
        again = benchmark(folder, distance_samples=0).run(make_model, digits())
    assert len(ran) == 1
    assert all((again.samples[key] == each).all() for key, each in results.samples.items())


def test_scores_of_a_former_version_are_read_without_their_samples(
    kept_run: tuple[Path, Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = kept_run
    content = json.loads((folder / "seed_0.json").read_text())
    content.pop("digest")
    for records in content["rows"].values():
        for record in records:
            assert record.pop("calibration_error") > 0
    (tmp_path / "seed_0.json").write_text(json.dumps(content))
    ran = scored_rows(monkeypatch)
    again = benchmark(tmp_path, distance_samples=0).run(make_model, digits())
    assert ran == []
    assert [r.score for r in again.records] == [r.score for r in results.records]
    assert again.samples == {}
    tent = next(row for row in again.rows if row.name == "Tent")
    assert again.interval(tent, "equal") is None  # of one seed
    assert again.calibration_error(tent, "equal") is None
