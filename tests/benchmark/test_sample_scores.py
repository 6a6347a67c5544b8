"""Errors and scores of single samples: their means are what was logged; kept and read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benchmark_runs import benchmark, digits, make_model, scored_rows
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_jaccard_index, multiclass_jaccard_index

from it3_lightning import (
    ClassPrior,
    Idempotence,
    IT3TestTimeCallback,
    LabelsPrior,
    MaskPrior,
    ValuePrior,
)
from it3_lightning.benchmark import Results
from it3_lightning.benchmark.sample_scores import (
    Seen,
    errors_of,
    keep_samples,
    kept_samples,
    noting,
    unit_of,
)


def test_classes_are_right_or_wrong() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 5
    wrong = [
        100.0 * (row.argmax().item() != y.item()) for row, y in zip(logits, labels, strict=True)
    ]
    assert errors_of(ClassPrior(5), logits, labels).tolist() == wrong
    assert {0.0, 100.0} == set(wrong)


def test_a_single_logit_is_that_of_class_one() -> None:
    errors = errors_of(ClassPrior(2), torch.tensor([-1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
    assert errors.tolist() == [0.0, 0.0, 100.0]


def test_labels_that_the_loss_ignores_are_never_wrong() -> None:
    prior = ClassPrior(3, ignore_index=255)
    assert errors_of(prior, torch.eye(3)[:2], torch.tensor([255, 0])).tolist() == [0.0, 100.0]


def test_values_have_their_absolute_error_in_their_own_units() -> None:
    prior = ValuePrior(2, mean=[10.0, 0.0], std=[5.0, 2.0])
    outputs, target = torch.tensor([[11.0, 1.0], [2.0, 3.0]]), torch.tensor([[10.0, 4.0], [2, 3]])
    torch.testing.assert_close(errors_of(prior, outputs, target), torch.tensor([2.0, 0.0]))


def test_of_tokens_and_of_labels_the_share_counts_that_is_wrong() -> None:
    tokens = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]]])  # 0, 0, 1, 1
    prior = ClassPrior(2, layout="BTC", ignore_index=9)
    assert errors_of(prior, tokens, torch.tensor([[0, 0, 1, 0]])).tolist() == [25.0]
    assert errors_of(prior, tokens, torch.tensor([[9, 9, 1, 0]])).tolist() == [50.0]
    logits, labels = torch.tensor([[1.0, -1.0, 1.0, 1.0]]), torch.tensor([[1, 1, 1, 0]])
    assert errors_of(LabelsPrior(4), logits, labels).tolist() == [50.0]


def test_values_of_a_series_have_the_units_of_their_channel_and_unknown_ones_do_not_count() -> None:
    prior = ValuePrior(2, layout="BCT", mean=[0.0, 1.0], std=[2.0, 10.0])
    outputs = torch.tensor([[[1.0, 2.0, 0.0], [5.0, 6.0, 0.0]]])
    target = torch.tensor([[[0.0, 0.0, float("nan")], [5.0, 9.0, 0.0]]])
    torch.testing.assert_close(errors_of(prior, outputs, target), torch.tensor([1.5]))


def test_a_binary_mask_has_the_overlap_of_its_foreground() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 1, 5, 5, generator=draw)
    target = torch.randint(2, (6, 5, 5), generator=draw)
    known = [
        100 - 100 * binary_jaccard_index(o, y) for o, y in zip(outputs[:, 0], target, strict=True)
    ]
    torch.testing.assert_close(errors_of(MaskPrior(1), outputs, target), torch.stack(known))
    two = torch.cat([-outputs / 2, outputs / 2], dim=1)
    torch.testing.assert_close(errors_of(MaskPrior(2), two, target), torch.stack(known))


def test_an_empty_mask_is_right_where_nothing_is_found() -> None:
    nothing = torch.full((2, 1, 3, 3), -1.0)
    nothing[1, 0, 0, 0] = 1.0
    assert errors_of(MaskPrior(1), nothing, torch.zeros(2, 3, 3)).tolist() == [0.0, 100.0]


def test_several_classes_have_the_mean_of_those_in_the_image() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 3, 6, 6, generator=draw)
    target = torch.randint(3, (4, 6, 6), generator=draw)
    target[:, 0, 0] = 255
    known = [
        100 - 100 * multiclass_jaccard_index(o.argmax(0)[None], y[None], 3, ignore_index=255)
        for o, y in zip(outputs, target, strict=True)
    ]
    prior = MaskPrior(3, ignore_index=255)
    torch.testing.assert_close(errors_of(prior, outputs, target), torch.stack(known))


@pytest.mark.parametrize(
    ("prior", "unit"),
    [
        (ClassPrior(3), "error, percent"),
        (MaskPrior(), "100 - IoU, percent"),
        (ValuePrior(), "absolute error"),
    ],
)
def test_the_unit_is_said(prior: ClassPrior, unit: str) -> None:
    assert unit_of(prior) == unit


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


def test_of_several_values_the_squares_are_averaged_too() -> None:
    model, seen = make_model(), Seen()
    model.it3_prior = ValuePrior(2, mean=[0.0, 1.0], std=[2.0, 5.0])
    outputs, target = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0], [3.0, 2.0]])
    seen.add(model, outputs, (torch.zeros(1), target), 0)
    squared = seen.matching(0, float(nn.functional.mse_loss(outputs, target)))
    assert squared is not None
    assert squared.tolist() == pytest.approx([5.0, 2.0])


def test_tokens_and_labels_have_the_share_that_is_right_and_ignored_samples_none() -> None:
    model, seen = make_model(), Seen()
    logits = torch.tensor([[[3.0, 0.0], [3.0, 0.0]], [[0.0, 3.0], [0.0, 3.0]]])  # 0, 0; 1, 1
    model.it3_prior = ClassPrior(2, layout="BTC", ignore_index=9)
    seen.add(model, logits, (torch.zeros(1), torch.tensor([[0, 1], [9, 9]])), 0)
    tokens = seen.matching(0, 0.5)
    model.it3_prior = LabelsPrior(2)
    seen.add(model, logits[:, 0], (torch.zeros(1), torch.tensor([[1, 0], [1, 1]])), 1)
    labels = seen.matching(1, 0.75)
    model.it3_prior = ClassPrior(2, ignore_index=9)
    seen.add(model, logits[:, 0], (torch.zeros(1), torch.tensor([9, 1])), 2)
    single = seen.matching(2, 1.0)
    assert tokens is not None
    assert labels is not None
    assert single is not None
    assert (tokens.tolist(), labels.tolist(), single.tolist()) == ([0.5], [1.0, 0.5], [True])


def test_scores_are_kept_as_bits_or_numbers(tmp_path: Path) -> None:
    random, file = np.random.default_rng(0), tmp_path / "samples" / "one.pt"
    given = {"clean": random.random(5001) > 0.5, "fog": random.random(7).astype(np.float32)}
    keep_samples(file, "{}", given, {})
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
