"""Correctness, completeness, quality: against brute force, scipy's distances, and known cases."""

import math

import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryJaccardIndex

from it3_lightning.tasks import Completeness, Correctness, Quality, RelaxedScore
from it3_lightning.tasks.segmentation import near, relaxed_counts

TOLERANCES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.3]


def masks(
    count: int, *, share: float = 0.1, seed: int = 0, size: tuple[int, int] = (9, 13)
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, *size, generator=generator) < share


def brute_force(preds: Tensor, target: Tensor, tolerance: float) -> list[int]:
    """Count by comparing every road pixel with every other of the same image."""
    counts = [0, 0, 0, 0]
    for found, true in zip(preds[:, 0].tolist(), target[:, 0].tolist(), strict=True):
        places = [
            [(i, j) for i, line in enumerate(mask) for j, road in enumerate(line) if road]
            for mask in (found, true)
        ]
        for which in (0, 1):
            mine, theirs = places[which], places[1 - which]
            matched = [p for p in mine if any(math.dist(p, q) <= tolerance for q in theirs)]
            counts[2 * which] += len(mine)
            counts[2 * which + 1] += len(matched)
    return counts


@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_counts_equal_brute_force(tolerance: float) -> None:
    preds, target = masks(6, seed=1), masks(6, seed=2)
    preds[2], target[3] = False, False  # nothing predicted, nothing there
    expected = brute_force(preds, target, tolerance)
    assert relaxed_counts(preds, target, tolerance).tolist() == expected


@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_near_equals_the_distance_transform(tolerance: float) -> None:
    mask = masks(1, share=0.03, seed=3, size=(40, 31))
    distances = torch.from_numpy(distance_transform_edt(~mask[0, 0].numpy()))
    assert torch.equal(near(mask, tolerance)[0, 0], distances <= tolerance)


def test_scores_are_of_all_batches_together_not_a_mean_over_them() -> None:
    preds, target = masks(12, seed=4), masks(12, seed=5)
    preds[:4] = False  # batches of very different numbers of roads
    found, right, true, matched = brute_force(preds, target, 2.0)
    for metric, expected in (
        (Correctness(2.0), right / found),
        (Completeness(2.0), matched / true),
        (Quality(2.0), right / (found + true - matched)),
    ):
        for part in (slice(0, 4), slice(4, 5), slice(5, 12)):
            metric.update(preds[part], target[part])
        assert metric.compute().item() == pytest.approx(expected)


def test_quality_without_tolerance_is_the_intersection_over_union() -> None:
    preds, target = masks(5, share=0.4, seed=6), masks(5, share=0.4, seed=7)
    expected = BinaryJaccardIndex()(preds.long(), target.long())
    torch.testing.assert_close(Quality(0.0)(preds, target), expected)


def test_a_line_beside_the_true_one_is_right_within_the_tolerance_only() -> None:
    target, preds = (torch.zeros(1, 1, 9, 9, dtype=torch.bool) for _ in range(2))
    target[..., 2, :], preds[..., 4, :] = True, True
    for kind in (Correctness, Completeness, Quality):
        assert kind(2.0)(preds, target).item() == 1
        assert kind(1.9)(preds, target).item() == 0


def test_roads_of_one_image_do_not_match_those_of_another() -> None:
    preds, target = torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)
    preds[0], target[1] = 1, 1
    assert relaxed_counts(preds, target, 3.0).tolist() == [9, 0, 9, 0]


@pytest.mark.parametrize("kind", [Correctness, Completeness, Quality])
def test_nothing_predicted_and_nothing_there_score_0(kind: type[RelaxedScore]) -> None:
    empty, full = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert [kind()(*pair).item() for pair in ((empty, full), (full, empty), (empty, empty))] == [
        0.0
    ] * 3


def test_probabilities_bools_and_maps_without_channels_count_alike() -> None:
    preds, target = masks(3, seed=8), masks(3, seed=9)
    expected = relaxed_counts(preds, target, 1.0)
    probabilities = torch.where(preds, 0.51, 0.5)
    assert torch.equal(relaxed_counts(probabilities, target.float(), 1.0), expected)
    assert torch.equal(relaxed_counts(preds[:, 0], target[:, 0].int(), 1.0), expected)


def test_a_collection_counts_once_for_all_three() -> None:
    metrics = MetricCollection([Correctness(1.0), Completeness(1.0), Quality(1.0)])
    preds, target = masks(4, seed=10), masks(4, seed=11)
    for part in (slice(0, 1), slice(1, 4)):
        metrics.update(preds[part], target[part])
    assert len(metrics.compute_groups) == 1
    counts = brute_force(preds, target, 1.0)
    assert metrics.compute()["Completeness"].item() == pytest.approx(counts[3] / counts[2])


@pytest.mark.parametrize(
    ("preds", "target"),
    [((2, 1, 4, 4), (2, 4, 4)), ((2, 2, 4, 4), (2, 2, 4, 4)), ((4, 4), (4, 4))],
)
def test_other_shapes_are_refused(preds: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of one shape"):
        Quality()(torch.zeros(preds), torch.zeros(target))


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tolerance >= 0 pixels, got -1"):
        Quality(-1)
