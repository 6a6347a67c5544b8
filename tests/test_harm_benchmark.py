"""What `tests/benchmarks/harm.py` makes of errors: gains, their intervals, what was chosen."""

import statistics
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from harm import BEFORE, Found, gain, lines, main, over_seeds, told

from it3_lightning.benchmark.policy_rule import Condition, Errors

CLEAN, FOG, BLUR = (Condition(name, "equal", 100) for name in ("clean", "fog", "blur"))


def found(seed: int, chosen: str) -> Found:
    draw = np.random.default_rng(seed)
    every = (CLEAN, FOG, BLUR)
    source = {c: draw.normal(10.0, 1.0, 50) for c in every}
    taken = {CLEAN: 0.0, FOG: 2.0, BLUR: -1.0}
    before = {c: source[c] - taken[c] - 0.1 * draw.normal(size=50) for c in every}
    policies = {BEFORE: before, "source": source} if chosen == "source" else {BEFORE: before}
    return Found(chosen, Errors({c: np.arange(50) for c in every}, source, policies))


def test_a_gain_is_the_mean_of_means_and_its_interval_that_of_the_samples() -> None:
    errors = found(0, BEFORE).errors
    taken = [errors.source[c] - errors.policies[BEFORE][c] for c in (FOG, BLUR)]
    each = (taken[0] + taken[1]) / 2  # a sample under both conditions is one sample
    mean, half = gain(errors, BEFORE, "source", [FOG, BLUR])
    assert mean == pytest.approx(each.mean())
    assert half == pytest.approx(1.96 * each.std() / sqrt(50), rel=0.05)


def test_over_seeds_the_wider_interval_counts() -> None:
    mean, half = over_seeds([(1.0, 0.1), (2.0, 0.1), (3.0, 0.1)])
    assert mean == 2.0
    assert half == pytest.approx(4.30 / sqrt(3))
    assert over_seeds([(1.0, 3.0), (1.0, 4.0)]) == (1.0, 2.5)
    assert over_seeds([(1.0, 0.3)]) == (1.0, 0.3)


def test_the_table_has_what_was_the_default_and_what_the_rule_chose() -> None:
    both = [found(0, "source"), found(1, "source")]
    before, rule = lines("toy", both, 1)
    assert "| one step | +0.5 ±" in before
    assert before.endswith("(blur, equal) |")
    worst = statistics.fmean(
        float((own.errors.source[BLUR] - own.errors.policies[BEFORE][BLUR]).mean()) for own in both
    )
    assert f"| {worst:+.1f} ±" in before
    assert "| **by the rule**: no adaptation | +0.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0" in rule
    assert told(["source", "evidence", "source"]) == "no adaptation (2), evidence (1)"


def test_a_configuration_is_calibrated_and_its_test_samples_are_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--data.train_size=80", "--data.test_size=40", "--data.shifts=[contrast]"]
    short = [
        "--benchmark.epochs=1",
        "--benchmark.posthoc_epochs=1",
        f"--benchmark.output={tmp_path}",
    ]
    asked = ["--calibrate.batch_sizes=[40]", "--calibrate.streams=[equal]", "--calibrate.batches=1"]
    main(["configs/digits.yaml", "--seeds", "0", "1", "--size", "40", *sizes, *short, *asked])
    *told_of, before, still, second, rule = capsys.readouterr().out.strip().splitlines()
    chosen = [line for line in told_of if line.startswith("<!-- digits, seed")]
    assert [line.split(":")[0] for line in chosen] == [f"<!-- digits, seed {n}" for n in (0, 1)]
    assert before.startswith("| digits | ")
    assert "| one step |" in before
    assert "| batch statistics |" in still
    assert "| one step, batch statistics |" in second
    assert "| **by the rule**: " in rule
