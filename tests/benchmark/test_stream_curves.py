"""Curves along a stream: running means of scores, and for which rows they are there."""

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.benchmark_runs import benchmark, make_model, toy_results

from it3_lightning.benchmark import Results, Row
from it3_lightning.benchmark.page import page
from it3_lightning.benchmark.stream_curves import along_streams, panels, running_mean
from it3_lightning.data import DigitsDataModule
from it3_lightning.engine import Settings


def drifting(size: int = 1200, **changes: object) -> Results:
    """A row that carries weights and one that does not, with scores of all samples."""
    results, draw = toy_results(), np.random.default_rng(0)
    results.rows = [
        *results.rows[:2],
        Row("ordinary", "Tent, online", Settings(reset="never")),
        Row("ordinary", "Tent, episodic", Settings(reset="batch")),
        Row("ordinary", "step, moments kept", Settings(reset="weights")),
    ]
    results.percent = True
    results.records = [
        replace(record, row=row.name)
        for record in toy_results().records
        if record.row == "source"
        for row in results.rows
    ]
    results.samples = {
        (r.training, r.row, r.stream, r.seed, r.shift): draw.random(size) < 0.6
        for r in results.records
    }
    for name, value in changes.items():
        setattr(results, name, value)
    return results


def plain_means(scores: list[float], window: int, step: int) -> tuple[list[int], list[float]]:
    """The running mean in a plain loop."""
    ends: list[int] = []
    means: list[float] = []
    end = len(scores)
    while end >= window:
        ends.insert(0, end)
        means.insert(0, sum(scores[end - window : end]) / window)
        end -= step
    return ends, means


@pytest.mark.parametrize(("size", "window", "step"), [(1000, 100, 20), (1003, 100, 7), (5, 5, 1)])
def test_a_running_mean_is_that_of_a_plain_loop(size: int, window: int, step: int) -> None:
    scores = np.random.default_rng(1).normal(size=size)
    seen, means = running_mean(scores, window, step)
    expected = plain_means(scores.tolist(), window, step)
    assert seen.tolist() == expected[0]
    assert seen[-1] == size
    np.testing.assert_allclose(means, expected[1], rtol=1e-9, atol=1e-12)


def test_curves_are_means_over_seeds_and_shifts_of_the_row_and_its_baseline() -> None:
    results = drifting()
    (panel,) = panels(results, "equal")
    assert (panel.training, panel.still) == ("ordinary", "batch statistics")
    assert list(panel.lines) == ["batch statistics", "Tent, online"]
    for name, (seen, means) in panel.lines.items():
        own = [results.samples["ordinary", name, "equal", seed, "noise"] for seed in (0, 1)]
        both = [100 * (float(a) + float(b)) / 2 for a, b in zip(*own, strict=True)]
        expected = plain_means(both, 120, 24)  # a tenth of the stream, and five points in each
        assert seen.tolist() == expected[0]
        np.testing.assert_allclose(means, expected[1], rtol=1e-9)


def test_a_window_has_five_hundred_samples_at_most() -> None:
    seen, _ = panels(drifting(6000), "equal")[0].lines["Tent, online"]
    assert seen[0] - 500 < 100
    assert seen[1] - seen[0] == 100


def test_shifts_of_other_lengths_are_cut_to_the_shortest_and_short_ones_left_out() -> None:
    results = drifting(2000)
    for (*names, seed, shift), scores in list(results.samples.items()):
        key = names[0], names[1], names[2], seed
        results.samples[*key, "fog"] = ~scores[:1500]
        results.samples[*key, "blur"] = np.zeros(900, dtype=bool)
        assert shift in ("clean", "noise")
    seen, means = panels(results, "equal")[0].lines["Tent, online"]
    own = [
        results.samples["ordinary", "Tent, online", "equal", seed, shift][:1500]
        for seed in (0, 1)
        for shift in ("noise", "fog")
    ]
    assert seen[-1] == 1500
    assert means[-1] == pytest.approx(100 * np.mean([each[-150:] for each in own]))


def test_only_rows_that_carry_weights_along_a_stream_that_is_long_enough_have_curves() -> None:
    drawn = along_streams(drifting())
    assert drawn.count("<figure>") == 1
    assert drawn.count("<polyline") == 2
    assert "episodic" not in drawn
    assert "moments kept" not in drawn
    assert "<h2>Along the stream" in page(drifting())
    assert along_streams(drifting(999)) == ""
    assert along_streams(drifting(samples={})) == ""  # the metric is no mean over samples
    still = [row for row in drifting().rows if row.name != "Tent, online"]
    assert along_streams(drifting(rows=still)) == ""
    assert "Along the stream" not in page(drifting(rows=still))


def test_points_lie_where_axes_say() -> None:
    results = drifting(decimals=1)
    rises = np.arange(1200) >= 600  # nothing right, then all
    for key in results.samples:
        results.samples[key] = rises if key[1] == "Tent, online" else ~rises
    drawn = along_streams(results)
    line = re.search(r"points='([^']*)'><title>Tent, online: 0.0 to 100.0", drawn)
    assert line is not None
    points = [tuple(map(float, each.split(","))) for each in line[1].split()]
    height = {float(n): float(y) - 4 for y, n in re.findall(r"y='([\d.]+)' \S+end'>(\d+)<", drawn)}
    right = {int(n.replace(",", "")): float(x) for x, n in re.findall(PLACES, drawn)}
    assert points[0][1] == pytest.approx(height[0.0], abs=0.2)
    assert points[-1][1] == pytest.approx(height[100.0], abs=0.2)
    per_sample = (right[1000] - right[500]) / 500
    assert points[-1][0] == pytest.approx(right[1000] + 200 * per_sample, abs=0.2)
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(points))


PLACES = r"<text x='([\d.]+)' y='\d+' text-anchor='\w+'>([\d,]+)<"


def test_more_rows_than_colours_differ_by_dashes_and_names_are_text() -> None:
    results = drifting()
    names = [f"<b>{number}</b>" for number in range(9)]
    results.rows += [Row("ordinary", name, Settings(reset="never")) for name in names]
    kept = {k: s for k, s in results.samples.items() if k[1] == "Tent, online"}
    records = [r for r in results.records if r.row == "Tent, online"]
    for name in names:
        results.samples |= {(k[0], name, *k[2:]): s for k, s in kept.items()}
        results.records = results.records + [replace(r, row=name) for r in records]
    drawn = along_streams(results)
    styles = re.findall(r"<path d='M0 5H28' (.*?)/>", drawn)
    assert len(styles) == len(set(styles)) == 11
    assert "<b>" not in drawn
    assert "&lt;b&gt;0&lt;/b&gt;" in drawn


def test_where_all_scores_are_the_same_they_are_drawn_too() -> None:
    results = drifting()
    results.samples = {key: np.ones(1000, dtype=bool) for key in results.samples}
    drawn = along_streams(results)
    assert "nan" not in drawn
    assert not math.isnan(float(drawn.partition("points='")[2].partition(",")[0]))


def test_scores_that_are_not_finite_are_left_out() -> None:
    results = drifting()
    before = panels(results, "equal")[0].lines["Tent, online"]
    for key, scores in list(results.samples.items()):
        broken = scores.astype(float)
        broken[700] = math.inf
        results.samples[*key[:4], "fog"] = broken
    seen, means = panels(results, "equal")[0].lines["Tent, online"]
    assert seen.tolist() == before[0].tolist()
    assert means.tolist() == before[1].tolist()


def test_a_benchmark_draws_the_rows_that_it_ran_in_the_order_of_the_stream(tmp_path: Path) -> None:
    shifts = "contrast", "gaussian_noise"
    data = DigitsDataModule(shifts=shifts, severity=4, train_size=200, test_size=500)
    rows = ["post-hoc: default objective, online", "post-hoc: default objective, episodic"]
    given = {"rows": rows, "seeds": [0], "streams": ["continual"], "distance_samples": 0}
    results = benchmark(tmp_path, **given).run(make_model, data)
    (panel,) = panels(results, "continual")
    assert list(panel.lines)[1:] == ["default objective, online"]
    for name, (seen, means) in panel.lines.items():
        row = next(r for r in results.rows if (r.training, r.name) == ("post-hoc", name))
        whole = results.samples["post-hoc", name, "continual", 0, "continual"]
        assert 100 * whole.mean() == pytest.approx(results.scores(row, "continual", SHIFT)[0])
        assert seen[-1] == len(whole) == 1000
        assert means[-1] == pytest.approx(100 * whole[-100:].mean())
    still = results.samples["post-hoc", panel.still, "continual", 0, "continual"]
    data.stream = "continual"
    assert still.tolist() == right(tmp_path, results, data, panel.still)
    assert "Along the stream" in page(results)


SHIFT = ["continual"]


def right(folder: Path, results: Results, data: DigitsDataModule, row: str) -> list[bool]:
    """Which samples the network gets right, batch by batch as they come."""
    states = torch.load(folder / "models" / "seed_0.ckpt", weights_only=True)["states"]
    model = make_model()
    model.load_state_dict({**states["ordinary"], **states["post-hoc"]}, strict=False)
    model.eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d) and row == "batch statistics":
            layer.train()
            layer.track_running_stats = False
    found = []
    with torch.no_grad():
        for x, y in data.test_dataloader()[1]:
            found += (model.network(x).argmax(1) == y).tolist()
    return found
