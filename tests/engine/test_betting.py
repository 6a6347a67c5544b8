"""The conformal martingale: its definition, and all orders of few distances."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import permutations
from random import Random
from typing import Any

import pytest

from it3_lightning.engine import betting
from it3_lightning.engine.betting import STRENGTHS, ConformalMartingale, payoffs

NAN = float("nan")


def wealth(ranks: Sequence[tuple[int, int]]) -> float:
    """The wealth by its definition: the mixture over bets and over when they begin.

    Args:
        ranks: of each distance, from above, and the number of distances it is ranked among.
    """
    reserve = [1 / math.log2(n + 2) for n in range(len(ranks) + 1)]
    total = reserve[-1]
    for strength in STRENGTHS:
        for above in (True, False):
            for begin in range(len(ranks)):
                paid = (reserve[begin] - reserve[begin + 1]) / (2 * len(STRENGTHS))
                for rank, count in ranks[begin:]:
                    place = rank if above else count + 1 - rank
                    paid *= count * (
                        (place / count) ** strength - ((place - 1) / count) ** strength
                    )
                total += paid
    return total


def ranks_of(known: Sequence[float], stream: Sequence[float]) -> list[tuple[int, int]]:
    """Ranks of distances without equals, by counting."""
    found = []
    for n, value in enumerate(stream):
        others = [*known, *stream[:n]]
        found.append((1 + sum(other > value for other in others), len(others) + 1))
    return found


def draws(count: int, seed: int = 0) -> list[float]:
    generator = Random(seed)
    return [generator.gauss(0, 1) for _ in range(count)]


class Drawn:
    """Random numbers that take one branch of all that could be drawn, and know its probability."""

    def __init__(self, branch: Sequence[int]) -> None:
        self.branch, self.probability = list(branch), Fraction(1)
        self.open: list[int] = []
        self._taken = 0

    def randrange(self, count: int) -> int:
        self.probability /= count
        if self._taken == len(self.branch):
            self.open.append(count)
            self.branch.append(0)
        self._taken += 1
        return self.branch[self._taken - 1]

    def randint(self, low: int, high: int) -> int:
        return low + self.randrange(high - low + 1)


def branches(run: Callable[[Drawn], Any]) -> Iterator[tuple[Fraction, Any]]:
    """Run for everything that can be drawn; yield probabilities and results."""
    waiting: list[list[int]] = [[]]
    while waiting:
        drawn = Drawn(waiting.pop())
        given = len(drawn.branch)
        result = run(drawn)
        for place, count in enumerate(drawn.open, given):
            waiting += [[*drawn.branch[:place], other] for other in range(1, count)]
        yield drawn.probability, result


# Against the definition


@pytest.mark.parametrize(("known", "count"), [(0, 6), (1, 20), (30, 60)])
@pytest.mark.parametrize("shift", [0.0, 1.5, -1.5])
def test_wealth_is_that_of_the_definition(known: int, count: int, shift: float) -> None:
    source, stream = draws(known), [value + shift for value in draws(count, 1)]
    martingale, highest = ConformalMartingale.of(source), 1.0
    ranks = ranks_of(source, stream)
    for n, distance in enumerate(stream, 1):
        martingale = martingale.after([distance])
        expected = wealth(ranks[:n])
        highest = max(highest, expected)
        assert martingale.wealth == pytest.approx(expected, rel=1e-9)
        assert martingale.highest == pytest.approx(highest, rel=1e-9)
    assert martingale.count == count


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_every_bet_is_fair(count: int) -> None:
    for paid in zip(*(payoffs(rank, count) for rank in range(1, count + 1)), strict=True):
        assert sum(paid) / count == pytest.approx(1, rel=1e-12)
        assert min(paid) >= 0


# Under exchangeability, all orders and all draws


def everything(
    values: Sequence[float], known: int, patch: pytest.MonkeyPatch
) -> Iterator[tuple[Fraction, list[ConformalMartingale], list[tuple[int, int]]]]:
    """Every order of values, the first of which are known, and every draw, with probabilities."""
    orders = list(permutations(values))
    paid: list[tuple[int, int]] = []

    def noted(rank: int, count: int) -> list[float]:
        paid.append((rank, count))
        return payoffs(rank, count)

    patch.setattr(betting, "payoffs", noted)
    for order in orders:

        def run(drawn: Drawn, order: Sequence[float] = order) -> Any:
            paid.clear()
            patch.setattr(betting, "Random", lambda *_: drawn)
            path = [ConformalMartingale.of(order[:known])]
            for value in order[known:]:
                path.append(path[-1].after([value]))
            return path, list(paid)

        for probability, (path, ranks) in branches(run):
            yield probability / len(orders), path, ranks


CASES = pytest.mark.parametrize(
    ("values", "most"),
    [((1, 2, 3, 4, 5, 6), 100), ((0, 0, 1, 1, 2), 100), ((0, 0, 0, 0), 100), ((0, 1, 1, 2, 3), 2)],
    ids=["distinct", "equal ones", "all equal", "full reference"],
)


@CASES
@pytest.mark.parametrize("known", [0, 2])
def test_ranks_are_uniform_and_independent(
    values: Sequence[float], most: int, known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(betting, "MOST", most)
    joint: Counter[tuple[tuple[int, int], ...]] = Counter()
    for probability, _, ranks in everything(values, known, monkeypatch):
        joint[tuple(ranks)] += probability  # type: ignore[assignment]
    counts = [min(n, most) + 1 for n in range(known, len(values))]
    assert len(joint) == math.prod(counts)
    assert set(joint.values()) == {Fraction(1, math.prod(counts))}
    assert all([count for _, count in ranks] == counts for ranks in joint)


@CASES
def test_mean_wealth_is_one_and_high_wealth_is_as_rare_as_ville_says(
    values: Sequence[float], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(betting, "MOST", most)
    paths = list(everything(values, 1, monkeypatch))
    for n in range(len(values)):
        mean = sum(float(probability) * path[n].wealth for probability, path, _ in paths)
        assert mean == pytest.approx(1, rel=1e-12)
    for enough in (1.01, 1.1, 1.25, 1.5, 2.0, 4.0):
        reached = sum(share for share, path, _ in paths if path[-1].highest >= enough)
        assert reached <= 1 / enough


def test_false_alarms_of_long_streams_are_rarer_than_delta() -> None:
    runs = [
        ConformalMartingale.of(draws(50, 2 * run)).after(draws(400, 2 * run + 1)).highest
        for run in range(200)
    ]
    assert sum(highest >= 10 for highest in runs) <= 0.1 * 200
    assert max(runs) > 1  # it does bet


@pytest.mark.parametrize("shift", [1.5, -1.5])
def test_a_shift_is_found_after_a_long_clean_stream(shift: float) -> None:
    clean = ConformalMartingale.of(draws(500)).after(draws(3000, 1))
    assert clean.highest < 100
    found = clean.after([value + shift for value in draws(60, 2)])
    assert found.highest >= 100


# Along a stream


@pytest.mark.parametrize("most", [10_000, 20])
def test_a_stream_may_come_in_any_batches(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(betting, "MOST", most)
    stream = [round(value, 1) for value in draws(50, 1)]  # with equals
    begin = ConformalMartingale.of([round(value, 1) for value in draws(20)])
    whole, parts, single = begin.after(stream), begin, begin
    for start in range(0, 50, 8):
        parts = parts.after(stream[start : start + 8])
    for value in stream:
        single = single.after([value])
    assert whole == parts == single


def test_nothing_is_changed_in_place() -> None:
    begin = ConformalMartingale.of(draws(5))
    first = begin.after([1.0, 2.0])
    again = begin.after([1.0, 2.0])
    assert first == again
    assert (begin.count, begin.wealth, len(begin.reference)) == (0, 1.0, 5)
    assert first.after([3.0]) != first


def test_the_seed_orders_equal_distances() -> None:
    found = {ConformalMartingale.of([0.0] * 9, seed=seed).after([0.0]).wealth for seed in range(20)}
    assert len(found) > 1
    same = {ConformalMartingale.of([0.0] * 9, seed=3).after([0.0]).wealth for _ in range(5)}
    assert len(same) == 1


def test_distances_that_are_not_finite_do_not_count() -> None:
    begin = ConformalMartingale.of([1.0, NAN, 3.0, math.inf])
    assert begin.reference.tolist() == [1.0, 3.0]
    assert begin.after([NAN, 2.0, -math.inf]) == begin.after([2.0])
    assert begin.after([NAN]) == begin.after([]) == begin


def test_of_many_distances_some_are_kept_at_random() -> None:
    many = [float(value) for value in range(25_000)]
    kept = ConformalMartingale.of(many).reference.tolist()
    assert len(set(kept)) == len(kept) == 10_000
    assert kept == sorted(kept)
    assert sum(kept) / len(kept) == pytest.approx(12_500, rel=0.02)
    full = ConformalMartingale.of(many).after([0.5, 1.5])
    assert len(full.reference) == 10_000
