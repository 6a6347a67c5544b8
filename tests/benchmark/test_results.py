"""Results of a benchmark: gains, corruption errors, lines of distances as NumPy has them, files."""

import csv
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.benchmark_runs import (
    LINES,
    benchmark,
    make_model,
    toy_distances,
    toy_results,
    values_of,
)

from it3_lightning.benchmark import Record, Results, Row
from it3_lightning.benchmark.distance_lines import Distances, lines, names, pooled
from it3_lightning.benchmark.distances import ADAPTED, SOURCE, kept_distances
from it3_lightning.benchmark.tables import headers, line, markdown
from it3_lightning.data import DigitsDataModule

FOG = [f"fog/{level}" for level in range(1, 6)]


def test_gain_is_over_batch_statistics_of_the_same_model_seed_by_seed() -> None:
    results = toy_results()
    gain = results.gain(results.rows[2], "equal")
    assert gain is not None
    assert gain.mean == pytest.approx(4.0)  # (63 - 60 + 65 - 60) / 2
    assert gain.std == pytest.approx(2**0.5)
    worst = results.worst(results.rows[2], "equal")
    assert worst is not None
    assert worst[0] == "noise"
    assert worst[1] == pytest.approx(4.0)
    assert results.gain(results.rows[1], "equal") is None


def test_mean_of_shifts_leaves_the_clean_samples_out() -> None:
    results = toy_results()
    assert results.shifted(results.rows[0], "equal").mean == 50.0
    assert results.clean(results.rows[0], "equal").mean == 90.0


def test_rows_of_each_sample_are_compared_with_the_source(
    finished: tuple[Path, Results],
) -> None:
    _, results = finished
    rows = {row.name: row for row in results.rows if row.training == "post-hoc"}
    for name in ("default", "published"):
        row = rows[f"{name} objective, each sample"]
        assert row.settings is not None
        assert (row.settings.scope, row.settings.norm_stats) == ("sample", "source")
        gain = results.gain(row, "equal")
        assert gain is not None
        (mine,), (base,) = (results.scores(r, "equal", ["contrast"]) for r in (row, rows["source"]))
        assert gain.mean == pytest.approx(mine - base)


def with_samples(gains: dict[tuple[str, str], float], size: int = 400) -> Results:
    """Source and Tent on two streams, right or wrong sample by sample, of two seeds."""
    random = np.random.default_rng(0)
    results = Results("acc", [Row("ordinary", "source"), Row("ordinary", "Tent")], percent=True)
    for (stream, shift), gain in gains.items():
        for seed in (0, 1):
            source = random.random(size) < 0.5
            tent = source ^ (random.random(size) < abs(gain) / 50) & (source == (gain < 0))
            for row, scores in (("source", source), ("Tent", tent)):
                score = 100 * float(scores.mean())
                results.records.append(Record("ordinary", row, stream, seed, shift, score, 0.0, 0))
                results.samples["ordinary", row, stream, seed, shift] = scores
    return results


GAINS = {
    ("equal", "clean"): 0.0,
    ("equal", "fog"): 8.0,
    ("equal/4", "clean"): -1.0,
    ("equal/4", "fog"): -8.0,
}


def test_intervals_are_paired_sample_by_sample_and_hold_the_gain() -> None:
    results = with_samples(GAINS)
    tent = results.rows[1]
    for stream, shift in GAINS:
        interval, gain = results.interval(tent, stream, shift), results.gain(tent, stream, shift)
        assert interval is not None
        assert gain is not None
        assert interval.low <= interval.mean <= interval.high
        assert interval.mean == pytest.approx(gain.mean)
    pairs = [
        [results.samples["ordinary", row, "equal", seed, "fog"] for row in ("Tent", "source")]
        for seed in (0, 1)
    ]
    paired = 100 * statistics.fmean((a ^ b).std() ** 2 / len(a) for a, b in pairs) ** 0.5
    interval = results.interval(tent, "equal", "fog")
    assert interval is not None
    assert interval.high - interval.low < 4 * paired  # unpaired samples would give three times
    assert results.interval(results.rows[0], "equal") is None


def test_harm_names_the_worst_of_all_cells_and_counts_those_that_surely_lose() -> None:
    results = with_samples(GAINS)
    harm = results.harm(results.rows[1])
    assert harm is not None
    assert harm.cell == "fog, equal/4"
    gain = results.gain(results.rows[1], "equal/4", "fog")
    assert gain is not None
    assert harm.gain == pytest.approx(gain.mean)
    assert (harm.harmed, harm.cells) == (2, 4)
    assert results.harm(results.rows[0]) is None


def test_where_scores_are_no_means_over_samples_seeds_alone_are_drawn() -> None:
    results = toy_results()
    interval = results.interval(results.rows[2], "equal")
    assert interval is not None
    assert (interval.low, interval.mean, interval.high) == pytest.approx((3.0, 4.0, 5.0))
    results.records = [r for r in results.records if r.seed == 0]
    harm = results.harm(results.rows[2])
    assert results.interval(results.rows[2], "equal") is None
    assert harm is not None
    assert (harm.cell, harm.gain, harm.interval, harm.cells) == ("clean", -1.0, None, 0)


def test_records_that_are_added_or_replaced_are_seen() -> None:
    results = toy_results()
    row = results.rows[2]
    assert not results.has(row, "unequal")
    results.records += [replace(r, stream="unequal") for r in results.records]
    assert results.has(row, "unequal")
    results.records[:] = [replace(r, score=r.score + 1) for r in results.records]
    assert results.scores(row, "unequal", ["noise"]) == [64.0, 66.0]
    assert results.scores(row, "unequal", ["none"]) == []


def accuracies(row: str, seed: int, drop: float) -> list[Record]:
    """One row on clean samples and on two corruptions at five severities."""
    shifts = ["clean", *(f"{name}/{level}" for name in ("fog", "snow") for level in range(1, 6))]
    scores = [90.0, *(80.0 - drop * level for _ in range(2) for level in range(1, 6))]
    return [
        Record("ordinary", row, "equal", seed, shift, score - 10 * ("snow" in shift), 0.0, 0)
        for shift, score in zip(shifts, scores, strict=True)
    ]


def test_mean_corruption_error_is_the_errors_share_of_the_baselines() -> None:
    rows = [Row("ordinary", "source"), Row("ordinary", "Tent")]
    records = [
        *accuracies("source", 0, 4.0),
        *accuracies("source", 1, 5.0),
        *accuracies("Tent", 0, 2.0),
        *accuracies("Tent", 1, 2.0),
    ]
    results = Results("acc", rows, records, baseline_errors={"fog": 64.0, "snow": 84.0})
    source, tent = (results.corruption_error(row, "equal") for row in rows)
    assert source is not None
    assert tent is not None
    first = 100 * (32 / 64 + 42 / 84) / 2  # errors 20 + 4 * 3 and 30 + 4 * 3
    second = 100 * (35 / 64 + 45 / 84) / 2
    assert source.mean == pytest.approx((first + second) / 2)
    assert tent.mean == pytest.approx(100 * (26 / 64 + 36 / 84) / 2)
    place = headers(results).index("mCE (lower is better)")
    assert line(results, rows[1])[place] == f"{tent.mean:.1f} ± 0.0"
    assert headers(results)[place] in markdown(results)


def test_without_a_baseline_there_is_no_mean_corruption_error() -> None:
    results = toy_results()
    assert results.corruption_error(results.rows[0], "equal") is None
    assert not any("mCE" in title for title in headers(results))


class Compared(DigitsDataModule):
    """Digits under fog, with errors of a reference network."""

    @property
    def baseline_errors(self) -> dict[str, float]:
        return {"fog": 50.0}


def test_a_data_module_with_baseline_errors_has_them_reported(tmp_path: Path) -> None:
    data = Compared(shifts=["fog"], severity="all", train_size=60, test_size=30)
    results = benchmark(tmp_path).run(make_model, data)
    errors = [100 - score for score in results.scores(results.rows[0], "equal", FOG)]
    found = results.corruption_error(results.rows[0], "equal")
    assert found is not None
    assert found.mean == pytest.approx(2 * errors[0])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["table"][0]["equal"]["mean_corruption_error"]["mean"] == found.mean
    assert benchmark(tmp_path / "b", percent=False).run(make_model, data).baseline_errors is None


def test_files_hold_every_record(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [r.score for r in results.records]
    content = json.loads((folder / "results.json").read_text())
    assert len(content["records"]) == len(results.records)
    assert content["about"]["seeds"] == [0]
    assert content["about"]["versions"]["torch"] == torch.__version__


def test_lines_are_ordered_and_pool_the_shifts_of_a_severity() -> None:
    given = toy_distances()
    assert names(reversed(given)) == LINES
    groups = pooled(given)
    for seed in (0, 1):
        expected = values_of(given, "joint", SOURCE, seed, "fog/5", "blur/5")
        assert groups["joint", SOURCE, "severity 5"][seed] == expected


def test_medians_and_shares_are_those_of_numpy_seed_by_seed() -> None:
    given = toy_distances()
    found = {(each.training, each.row, each.name): each for each in lines(given)}
    assert len(found) == 2 * 2 * len(LINES)
    for row in (SOURCE, ADAPTED):
        medians, shares = [], []
        for seed in (0, 1):
            limit = np.quantile(values_of(given, "post-hoc", row, seed, "validation"), 0.95)
            shifted = np.array(values_of(given, "post-hoc", row, seed, "fog/1", "blur/1"))
            medians.append(float(np.median(shifted)))
            shares.append(100 * float((shifted > limit).mean()))
        line = found["post-hoc", row, "severity 1"]
        assert line.median.mean == pytest.approx(statistics.fmean(medians))
        assert line.median.std == pytest.approx(statistics.stdev(medians))
        assert line.beyond.mean == pytest.approx(statistics.fmean(shares))
        assert line.beyond.std == pytest.approx(statistics.stdev(shares))
        assert found["post-hoc", row, "validation"].beyond.mean == 5.0  # 2 of 40


def test_distances_lie_beside_the_scores_with_their_summary_in_the_results(
    with_distances: tuple[Path, Results],
) -> None:
    folder, results = with_distances
    kept = json.loads((folder / "distances_seed_0.json").read_text())
    content, fingerprint = kept["distances"], kept["fingerprint"]
    assert [Distances(**{**c, "values": tuple(c["values"])}) for c in content] == results.distances
    assert {entry["split"] for entry in content} == {
        *("train", "validation", "clean"),
        *(f"contrast/{level}" for level in range(1, 6)),
    }
    assert {len(entry["values"]) for entry in content} == {60, 100}  # at least a batch of 100
    written = json.loads((folder / "results.json").read_text())["distances"]
    assert written == [asdict(line) for line in lines(results.distances)]
    assert kept_distances(folder, 0, fingerprint) == (results.separations, results.distances)
    assert kept_distances(folder, 7, fingerprint) is None
