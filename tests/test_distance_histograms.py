"""Histograms and tables of distances: against NumPy, on the page, in files, and resumed."""

import json
import statistics
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from test_benchmark import benchmark, digits, make_model

from it3_lightning.benchmark import Benchmark, Results
from it3_lightning.benchmark.distance_figure import bins, counted, figure
from it3_lightning.benchmark.distance_report import as_page, as_text, picture
from it3_lightning.benchmark.distance_table import beyond_table, lines, median_table, names, pooled
from it3_lightning.benchmark.distances import ADAPTED, SOURCE, STATISTICS, Distances, kept_distances
from it3_lightning.report import page, show

SPLITS = ("train", "validation", "clean", "fog/1", "blur/1", "fog/5", "blur/5", "unseen_ages")
LINES = ["training samples", "validation", "clean", "severity 1", "severity 5", "unseen ages"]


def toy(trainings: tuple[str, ...] = ("joint", "post-hoc"), scale: float = 1.0) -> list[Distances]:
    """Distances that grow from split to split and are halved by adaptation, of two seeds."""
    draw = np.random.default_rng(0)
    return [
        Distances(training, row, seed, split, tuple(values.tolist()))
        for training in trainings
        for seed in (0, 1)
        for place, split in enumerate(SPLITS)
        for row, factor in ((SOURCE, 1.0), (ADAPTED, 0.5))
        for values in [scale * factor * draw.lognormal(-6 + place / 2, 1, 40)]
    ]


def values(
    distances: list[Distances], training: str, row: str, seed: int, *splits: str
) -> list[float]:
    return [
        value
        for each in distances
        for value in each.values
        if (each.training, each.row, each.seed) == (training, row, seed) and each.split in splits
    ]


# Tables


def test_lines_are_ordered_and_pool_the_shifts_of_a_severity() -> None:
    given = toy()
    assert names(reversed(given)) == LINES
    groups = pooled(given)
    for seed in (0, 1):
        expected = values(given, "joint", SOURCE, seed, "fog/5", "blur/5")
        assert groups["joint", SOURCE, "severity 5"][seed] == expected


def test_medians_and_shares_are_those_of_numpy_seed_by_seed() -> None:
    given = toy()
    found = {(each.training, each.row, each.name): each for each in lines(given)}
    assert len(found) == 2 * 2 * len(LINES)
    for row in (SOURCE, ADAPTED):
        medians, shares = [], []
        for seed in (0, 1):
            limit = np.quantile(values(given, "post-hoc", row, seed, "validation"), 0.95)
            shifted = np.array(values(given, "post-hoc", row, seed, "fog/1", "blur/1"))
            medians.append(float(np.median(shifted)))
            shares.append(100 * float((shifted > limit).mean()))
        line = found["post-hoc", row, "severity 1"]
        assert line.median.mean == pytest.approx(statistics.fmean(medians))
        assert line.median.std == pytest.approx(statistics.stdev(medians))
        assert line.beyond.mean == pytest.approx(statistics.fmean(shares))
        assert line.beyond.std == pytest.approx(statistics.stdev(shares))
        assert found["post-hoc", row, "validation"].beyond.mean == 5.0  # 2 of 40


@pytest.mark.parametrize(
    ("scale", "unit", "power"), [(1.0, "10⁻³", -3), (1e4, "1", 0), (1e6, "10³", 3), (0.0, "1", 0)]
)
def test_medians_are_written_in_a_unit_that_suits_the_smallest(
    scale: float, unit: str, power: int
) -> None:
    found = lines(toy(scale=scale))
    (titles, first, *_), written = median_table(found)
    assert written == unit
    assert titles == ["training", "at test time", *LINES]
    assert first[:2] == ["joint", SOURCE]
    shown = [float(cell.split(" ± ")[0]) for cell in first[2:]]
    expected = [each.median.mean / 10.0**power for each in found[: len(LINES)]]
    assert shown == pytest.approx(expected, abs=0.05)


def test_shares_are_written_in_percent() -> None:
    found = lines(toy())
    first = beyond_table(found)[1]
    assert first[2:] == [f"{each.beyond.mean:.1f} ± {each.beyond.std:.1f}" for each in found[:6]]


def test_a_split_without_distances_is_an_empty_cell() -> None:
    given = [
        replace(each, values=()) if each.split == "unseen_ages" and each.row == ADAPTED else each
        for each in toy()
    ]
    rows = beyond_table(lines(given))
    assert [row[-1] == "" for row in rows[1:]] == [False, True, False, True]


# The figure


def drawn(given: list[Distances]) -> Figure:
    return figure(given, unit="(l1)")


def test_the_figure_has_a_column_for_each_training_and_a_line_for_each_split() -> None:
    found = drawn(toy())
    assert [axes.get_title() for axes in found.axes] == [
        "joint: idempotence distance (l1)",
        "post-hoc: idempotence distance (l1)",
    ]
    assert [label.get_text() for label in found.axes[0].get_yticklabels()] == LINES
    assert {axes.get_xscale() for axes in found.axes} == {"log"}
    words = [text.get_text() for text in found.legends[0].get_texts()]
    assert words == [
        "as trained",
        "adapted (default objective, episodic)",
        "95 % of validation samples, as trained, lie to the left",
    ]


def both_seeds(given: list[Distances], split: str) -> list[float]:
    return [value for seed in (0, 1) for value in values(given, "joint", SOURCE, seed, split)]


def test_strokes_stand_at_the_medians_and_the_dotted_line_at_the_limit() -> None:
    given = toy(("joint",))
    places = [np.asarray(line.get_data(), dtype=float) for line in drawn(given).axes[0].lines]
    strokes = [(x[0], y[0]) for x, y in places if x[0] == x[1]]
    for base, split in ((0, "train"), (-2, "clean")):
        assert (pytest.approx(np.median(both_seeds(given, split))), base) in strokes
    limit = np.quantile(both_seeds(given, "validation"), 0.95)
    assert places[-1][0].tolist() == pytest.approx([limit, limit])


def test_histograms_have_the_shares_of_numpy_on_common_bins() -> None:
    given = toy(("joint",))
    edges = bins([value for each in given for value in each.values])
    found = [p for p in drawn(given).axes[0].patches if isinstance(p, StepPatch)]
    assert len(found) == 2 * len(LINES)
    assert all(np.array_equal(patch.get_data()[1], edges) for patch in found)
    outline = min(found, key=lambda patch: (patch.get_fill(), -np.min(patch.get_data()[2])))
    pool = np.clip(both_seeds(given, "train"), edges[0], edges[-1])
    shares = np.histogram(pool, edges)[0] / len(pool)
    heights = outline.get_data()[0]
    assert heights == pytest.approx(shares * heights.max() / shares.max())
    assert counted(pool.tolist(), edges) == pytest.approx(shares)


@pytest.mark.parametrize("ends", [(0.2, 0.3), (0.02, 0.05), (0.004, 0.3), (1e-6, 0.1)])
def test_ticks_can_be_read_on_every_range(ends: tuple[float, float]) -> None:
    spread = np.geomspace(*ends, 40)
    found = figure([Distances("joint", SOURCE, 0, "clean", tuple(spread.tolist()))])
    found.draw_without_rendering()
    axes = found.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    inside = sorted((box.x0, box.x1) for box in boxes if axes.bbox.x0 <= box.x1 <= axes.bbox.x1)
    assert len(inside) >= 2
    assert all(right < left for (_, right), (left, _) in pairwise(inside))
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))


def test_bins_of_nothing_and_of_a_single_distance_have_a_width() -> None:
    for given in ([], [0.0], [0.3], [0.3, 0.3]):
        edges = bins(given)
        assert (np.diff(edges) > 0).all()


def test_batch_statistics_are_an_outline_of_their_own() -> None:
    given = toy(("joint",))
    given += [replace(each, row=STATISTICS) for each in given if each.row == SOURCE]
    found = drawn(given)
    words = [text.get_text() for text in found.legends[0].get_texts()]
    assert words[1] == "batch statistics, weights as trained"
    assert len(found.axes[0].patches) == 3 * len(LINES)


# Files and the page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("distances")
    return folder, benchmark(folder, distance_samples=60).run(make_model, digits())


def test_the_page_and_the_svg_name_every_split(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    show(results, folder)
    words = ["training samples", "validation", "clean", *(f"severity {n}" for n in range(1, 6))]
    for text in (page(results), (folder / "distances.svg").read_text()):
        assert all(f"<!-- {word} -->" in text for word in words)
    text = (folder / "table.md").read_text()
    assert "Median idempotence distance (js), in units of 10" in text
    rows = [line for line in text.splitlines() if line.startswith("| post-hoc")][-6:]
    assert [row.split("|")[2].strip() for row in rows] == 2 * [SOURCE, STATISTICS, ADAPTED]
    assert all("| training samples |" in part for part in as_text(results))


def test_a_resumed_run_has_identical_distances_and_draws_them_identically(
    finished: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = finished
    monkeypatch.setattr(Benchmark, "trainer", lambda *_, **__: pytest.fail("trained again"))
    again = benchmark(folder, distance_samples=60).run(make_model, digits())
    assert again.distances == results.distances
    assert picture(again) == picture(results)
    assert as_page(again) == as_page(results)


def test_distances_lie_beside_the_scores_with_their_summary_in_the_results(
    finished: tuple[Path, Results],
) -> None:
    folder, results = finished
    content = json.loads((folder / "distances_seed_0.json").read_text())
    assert [Distances(**{**c, "values": tuple(c["values"])}) for c in content] == results.distances
    assert {entry["split"] for entry in content} == {
        *("train", "validation", "clean"),
        *(f"contrast/{level}" for level in range(1, 6)),
    }
    assert {len(entry["values"]) for entry in content} == {60, 100}  # at least a batch of 100
    written = json.loads((folder / "results.json").read_text())["distances"]
    assert written == [asdict(line) for line in lines(results.distances)]
    assert kept_distances(folder, [0, 7]) == results.distances


def test_without_samples_there_is_no_figure(tmp_path: Path) -> None:
    results = benchmark(tmp_path, distance_samples=0).run(make_model, digits())
    show(results, tmp_path)
    assert results.distances == []
    assert not (tmp_path / "distances.svg").exists()
    assert "Idempotence distance of" not in page(results)
    assert "Median" not in (tmp_path / "table.md").read_text()


def test_a_negative_number_of_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"distance_samples >= 0, got -1"):
        benchmark(tmp_path, distance_samples=-1)


def test_without_matplotlib_the_tables_stay_and_a_note_stands_for_the_figure(
    finished: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = as_page(finished[1])
    assert picture(finished[1]) is None
    assert "it3_lightning[plots]" in text
    assert text.count("<table>") == 2
