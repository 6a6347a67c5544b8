"""Histograms and tables of distances: against NumPy, on the page, and resumed."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.benchmark_runs import LINES, benchmark, digits, make_model, toy_distances, values_of
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from it3_lightning.benchmark import Benchmark, Results
from it3_lightning.benchmark.distance_lines import Distances, lines
from it3_lightning.benchmark.distance_report import (
    as_page,
    as_text,
    beyond_table,
    bins,
    counted,
    figure,
    median_table,
    picture,
)
from it3_lightning.benchmark.distances import ADAPTED, SOURCE, STATISTICS
from it3_lightning.benchmark.page import page
from it3_lightning.benchmark.report import show


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e6, 1e-4, 0.0])
def test_medians_are_numbers_with_two_digits(scale: float) -> None:
    found = lines(toy_distances(scale=scale))
    titles, first, *_ = median_table(found)
    assert titles == ["training", "at test time", *LINES]
    assert first[:2] == ["joint", SOURCE]
    shown = [float(cell.split(" ± ")[0]) for cell in first[2:]]
    expected = [each.median.mean for each in found[: len(LINES)]]
    assert shown == pytest.approx(expected, rel=0.05)
    assert all(len(cell) <= 17 for cell in first[2:])


def test_shares_are_written_in_percent() -> None:
    found = lines(toy_distances())
    first = beyond_table(found)[1]
    assert first[2:] == [f"{each.beyond.mean:.1f} ± {each.beyond.std:.1f}" for each in found[:6]]


def test_a_split_without_distances_is_an_empty_cell() -> None:
    given = [
        replace(each, values=()) if each.split == "unseen_ages" and each.row == ADAPTED else each
        for each in toy_distances()
    ]
    rows = beyond_table(lines(given))
    assert [row[-1] == "" for row in rows[1:]] == [False, True, False, True]


def drawn(given: list[Distances]) -> Figure:
    return figure(given, unit="(l1)")


def test_the_figure_has_a_column_for_each_training_and_a_line_for_each_split() -> None:
    found = drawn(toy_distances())
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
    return [value for seed in (0, 1) for value in values_of(given, "joint", SOURCE, seed, split)]


def test_strokes_stand_at_the_medians_and_the_dotted_line_at_the_limit() -> None:
    given = toy_distances(("joint",))
    places = [np.asarray(line.get_data(), dtype=float) for line in drawn(given).axes[0].lines]
    strokes = [(x[0], y[0]) for x, y in places if x[0] == x[1]]
    for base, split in ((0, "train"), (-2, "clean")):
        assert (pytest.approx(np.median(both_seeds(given, split))), base) in strokes
    limit = np.quantile(both_seeds(given, "validation"), 0.95)
    assert places[-1][0].tolist() == pytest.approx([limit, limit])


def test_histograms_have_the_shares_of_numpy_on_common_bins() -> None:
    given = toy_distances(("joint",))
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
    given = toy_distances(("joint",))
    given += [replace(each, row=STATISTICS) for each in given if each.row == SOURCE]
    found = drawn(given)
    words = [text.get_text() for text in found.legends[0].get_texts()]
    assert words[1] == "batch statistics, weights as trained"
    assert len(found.axes[0].patches) == 3 * len(LINES)


def test_the_page_and_the_svg_name_every_split(with_distances: tuple[Path, Results]) -> None:
    folder, results = with_distances
    show(results, folder)
    words = ["training samples", "validation", "clean", *(f"severity {n}" for n in range(1, 6))]
    for text in (page(results), (folder / "distances.svg").read_text()):
        assert all(f"<!-- {word} -->" in text for word in words)
    text = (folder / "table.md").read_text()
    assert "Median idempotence distance (js)." in text
    rows = [line for line in text.splitlines() if line.startswith("| post-hoc")][-6:]
    assert [row.split("|")[2].strip() for row in rows] == 2 * [SOURCE, STATISTICS, ADAPTED]
    assert all(" training samples |" in part for part in as_text(results))


def test_a_resumed_run_has_identical_distances_and_draws_them_identically(
    with_distances: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = with_distances
    monkeypatch.setattr(Benchmark, "trainer", lambda *_, **__: pytest.fail("trained again"))
    again = benchmark(folder, distance_samples=60).run(make_model, digits())
    assert again.distances == results.distances
    assert picture(again) == picture(results)
    assert as_page(again) == as_page(results)


def test_without_samples_there_is_no_figure(tmp_path: Path) -> None:
    results = benchmark(tmp_path, distance_samples=0).run(make_model, digits())
    show(results, tmp_path)
    assert results.distances == []
    assert not (tmp_path / "distances.svg").exists()
    assert "Idempotence distance of" not in page(results)
    assert "Median" not in (tmp_path / "table.md").read_text()


def test_without_matplotlib_the_tables_stay_and_a_note_stands_for_the_figure(
    with_distances: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = as_page(with_distances[1])
    assert picture(with_distances[1]) is None
    assert "it3_lightning[plots]" in text
    assert text.count("<table>") == 2
