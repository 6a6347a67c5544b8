"""Bootstrap intervals: those of a loop over seeds and samples, and of the normal distribution."""

import statistics

import numpy as np
import pytest

from it3_lightning.benchmark.intervals import Cell, Interval, Values, resampled


def by_loops(values: list[Values], replicates: int) -> list[float]:
    """Draw seeds, and for each draw samples of it, one by one."""
    random = np.random.default_rng(7)
    means = []
    for _ in range(replicates):
        drawn = [values[random.integers(len(values))] for _ in values]
        means.append(
            statistics.fmean(
                each[random.integers(0, len(each), len(each))].mean() for each in drawn
            )
        )
    return means


@pytest.mark.parametrize("sizes", [(40,), (40, 40, 40), (30, 50), (2500, 2500)])
def test_intervals_are_those_of_drawing_seeds_and_samples_one_by_one(
    sizes: tuple[int, ...],
) -> None:
    random = np.random.default_rng(len(sizes))
    given = [random.integers(-1, 2, size).astype(float) + 0.1 * n for n, size in enumerate(sizes)]
    found = resampled([each[:, None] for each in given], 4000)[:, 0]
    reference = by_loops(given, 4000)
    spread = statistics.stdev(reference)
    assert found.std() == pytest.approx(spread, rel=0.08)
    assert found.mean() == pytest.approx(statistics.fmean(reference), abs=0.1 * spread)
    ends = np.quantile(reference, [0.025, 0.975])
    interval = Interval.of(0.0, found)
    assert [interval.low, interval.high] == pytest.approx(ends.tolist(), abs=0.25 * spread)


def test_of_one_seed_the_interval_is_that_of_the_normal_distribution() -> None:
    given = np.random.default_rng(0).normal(2.0, 3.0, (900, 1))
    interval = Interval.of(float(given.mean()), resampled([given])[:, 0])
    half = 1.96 * given.std() / 30
    assert interval.low == pytest.approx(given.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(given.mean() + half, abs=0.1 * half)


def test_columns_of_the_same_samples_are_drawn_together() -> None:
    """A sample that gains under one shift what it loses under another one has no spread."""
    gains = np.random.default_rng(0).normal(size=1500)
    replicates = resampled([np.stack([gains, -gains], 1)] * 2)
    assert replicates.mean(1) == pytest.approx(np.zeros(2000), abs=1e-9)
    assert replicates[:, 0] == pytest.approx(resampled([gains[:, None]] * 2)[:, 0], abs=1e-9)


def test_of_seeds_alone_the_interval_reaches_from_the_least_to_the_most() -> None:
    replicates = resampled([np.array([[value]]) for value in (1.0, 2.0, 6.0)])[:, 0]
    interval = Interval.of(3.0, replicates)
    assert (interval.low, interval.high) == pytest.approx((1.0, 6.0))


def test_numbers_are_written_with_their_signs() -> None:
    assert f"{Interval(0.004, -0.0101, 0.02):.3f}" == "+0.004 [-0.010, +0.020]"
    assert f"{Cell.of([1.0, 3.0]):+.1f}" == "+2.0 ± 1.4"
