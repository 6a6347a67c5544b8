"""The benchmark of false alarms and delays on a few orders of the digits: what it counts."""

import io
import json
from contextlib import redirect_stdout
from random import Random
from typing import Any

import alarms
import pytest
import torch

from it3_lightning.engine.betting import ConformalMartingale


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the command prints and leaves behind."""
    folder, printed = tmp_path_factory.mktemp("alarms"), io.StringIO()
    few = ["--digits", "--epochs=1", "--orders=3", "--few=2", "--clean=40"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(alarms, "METHODS", {"js": alarms.METHODS["js"]})
        alarms.main([*few, f"--output={folder}"])
    kept: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return printed.getvalue(), kept


def test_every_stream_is_bet_on_and_every_accuracy_stands_beside_the_source(run: Any) -> None:
    (bets,), accuracy = run[1]["bets"], run[1]["accuracy"]
    assert (bets["distance"], bets["orders"], len(bets["delays"])) == ("js", 3, 9)
    for counts in (bets["alarms"], bets["redrawn"]):
        assert counts["0.01"] <= counts["0.05"] <= counts["0.1"] <= 3
    for found in (*bets["delays"].values(), *bets["sorted"].values()):
        assert len(found) == 2
    streams = ["clean", *bets["sorted"], *bets["delays"]]
    assert list(accuracy) == streams
    for scores in accuracy.values():
        assert list(scores) == ["source", "Tent", "Tent, gate='bet'"]
        assert all(0 <= score <= 100 for score in scores.values())


def test_what_it_prints_fits_a_hundred_columns(run: Any) -> None:
    lines = [line.rstrip() for line in run[0].splitlines()]
    assert max(map(len, lines)) <= 100
    assert sum("never in" in line or "(" in line for line in lines) >= 12


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_an_alarm_is_the_first_sample_that_reaches_the_limit(shift: float) -> None:
    generator = Random(0)
    known, stream = ([generator.gauss(mean, 1) for _ in range(250)] for mean in (0.0, shift))
    begin = martingale = ConformalMartingale.of(known)
    expected = None
    for count, distance in enumerate(stream, 1):
        martingale = martingale.after([distance])
        if expected is None and martingale.wealth >= 100:
            expected = count
    assert alarms.alarm(begin, stream, 0.01) == expected
    assert (expected is None) == (shift == 0)


def test_samples_before_the_shift_do_not_count_as_delay() -> None:
    clean, shifted = [Random(seed).gauss(0, 1) for seed in range(200)], [9.0 + n for n in range(50)]
    for before in (0, 60):
        found = alarms.delays(clean[:100], clean[100:], shifted, 3, before)
        assert all(at is not None and 0 < at < 20 for at in found)
    assert alarms.false_alarms(clean[:100], clean[100:], 5, redrawn=True)[0.01] == 0
    assert alarms.false_alarms(clean[:100], shifted, 5, redrawn=False)[0.01] == 5


def test_clean_streams_in_order_hold_each_sample_once() -> None:
    labels = torch.arange(10).repeat(30)
    streams = alarms.in_order(labels, 1)
    by_class = labels[streams["sorted by class"]].view(10, 30)
    assert by_class.eq(by_class[:, :1]).all()
    for name, rows in streams.items():
        assert len(set(rows.tolist())) == len(rows) == (111 if name == "unequal classes" else 300)
