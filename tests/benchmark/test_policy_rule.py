"""The rule that chooses a policy: its limits, what it refuses to choose, and what it takes."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from it3_lightning.benchmark.policy_rule import (
    Condition,
    Errors,
    HarmlessRule,
    by_family,
    upper_limit,
)

Z = 1.6448536269514722  # 95 percent, one-sided
CONDITIONS = [
    Condition(shift, stream, size)
    for shift in ("clean", "fog", "noise")
    for stream in ("equal", "correlated")
    for size in (1, 16)
]


def drawn(seed: int, count: int = 300, wrong: float = 0.3) -> dict[Condition, Any]:
    draw = np.random.default_rng(seed)
    return {c: 100.0 * (draw.random(count) < wrong) for c in CONDITIONS}


def changed(
    source: dict[Condition, Any], gain: float, seed: int, where: Sequence[Condition] = CONDITIONS
) -> dict[Condition, Any]:
    """Errors of which a share is put right; where the gain is negative, a share is spoilt."""
    draw, found = np.random.default_rng(seed), {c: v.copy() for c, v in source.items()}
    for c in where:
        hit = draw.random(len(found[c])) < abs(gain)
        found[c][hit] = 0.0 if gain > 0 else 100.0
    return found


def of(source: dict[Condition, Any], **policies: dict[Condition, Any]) -> Errors:
    samples = {c: np.arange(len(values)) for c, values in source.items()}
    return Errors(samples, source, policies)


def limit_by_hand(parts: Sequence[tuple[Any, Any]], most: float) -> float:
    """Linearised over samples in plain loops: how each of them moves the mean over conditions."""
    parts = [([*ids, "more"], [*harms, most]) for ids, harms in parts]
    means = [sum(harms) / len(harms) for _, harms in parts]
    moves: dict[Any, float] = {}
    for (ids, harms), mean in zip(parts, means, strict=True):
        for sample, harm in zip(ids, harms, strict=True):
            moves[sample] = moves.get(sample, 0.0) + (harm - mean) / len(harms) / len(parts)
    n = len(moves)
    error = math.sqrt(n / (n - 1) * sum(move**2 for move in moves.values()))
    return float(sum(means) / len(means) + Z * error)


def chosen_by_hand(errors: Errors, tolerance: float) -> str | None:
    """The rule as it reads, in plain loops."""
    bound = tolerance * statistics.fmean(statistics.fmean(v) for v in errors.source.values())
    gains = {}
    for name, own in errors.policies.items():
        harm = {c: [b - a for a, b in zip(errors.source[c], own[c], strict=True)] for c in own}
        most = max(abs(h) for values in harm.values() for h in values)

        def upper(conditions: Any, sign: int, harm: Any = harm, most: float = most) -> float:
            parts = [(errors.samples[c], [sign * h for h in harm[c]]) for c in conditions]
            return limit_by_hand(parts, most)

        groups = [
            [c for c in harm if getattr(c, kind) == value]
            for kind in ("shift", "stream", "batch_size")
            for value in {getattr(c, kind) for c in harm}
        ]
        shifted = [c for c in harm if c.shift != "clean"]
        if (
            all(-upper([c], -1) <= bound for c in harm)
            and all(upper(group, 1) <= bound for group in groups)
            and upper(shifted, 1) < 0
        ):
            gains[name] = -statistics.fmean(statistics.fmean(harm[c]) for c in shifted)
    return max(gains, key=lambda name: gains[name], default=None)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.floats(0, 1))
def test_the_limit_under_one_condition_is_the_normal_one(harms: list[float], most: float) -> None:
    found = upper_limit([(np.arange(len(harms)), np.array(harms))], most, 0.95)
    known = [*harms, most]
    error = statistics.stdev(known) / math.sqrt(len(known))
    assert found == pytest.approx(statistics.fmean(known) + Z * error)


def test_the_same_samples_under_two_conditions_count_once() -> None:
    harms = np.random.default_rng(0).normal(size=400)
    ids = np.arange(400)
    one = upper_limit([(ids, harms)], 1.0, 0.95)
    assert upper_limit([(ids, harms), (ids, harms)], 1.0, 0.95) == pytest.approx(one)
    apart = upper_limit([(ids, harms), (ids + 400, harms)], 1.0, 0.95)
    middle = (harms.sum() + 1) / 401
    assert apart - middle == pytest.approx((one - middle) / math.sqrt(2), rel=0.01)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_limits_are_those_by_hand(seed: int) -> None:
    draw = np.random.default_rng(seed)
    parts = [
        (draw.permutation(30)[:size], draw.normal(size=size)) for size in draw.integers(1, 30, 3)
    ]
    assert upper_limit(parts, 2.0, 0.95) == pytest.approx(limit_by_hand(parts, 2.0))


def test_limits_hold_as_often_as_they_say() -> None:
    draw, held = np.random.default_rng(0), 0
    for _ in range(400):
        harms = draw.choice([-1.0, 0.0, 1.0], 200, p=[0.06, 0.84, 0.10])
        held += upper_limit([(np.arange(200), harms)], 1.0, 0.95) >= 0.04
    assert held >= 0.95 * 400


@given(st.integers(0, 10**6), st.floats(0.0, 0.3))
@settings(max_examples=40, deadline=None)
def test_the_choice_is_that_by_hand(seed: int, tolerance: float) -> None:
    draw = np.random.default_rng(seed)
    source = drawn(seed, 60)
    policies = {}
    for index, gain in enumerate(draw.uniform(-0.1, 0.6, 3)):
        where = [c for c in CONDITIONS if draw.random() < 0.9]
        policies[f"policy {index}"] = changed(source, gain, seed + index, where)
    errors = of(source, **policies)
    assert HarmlessRule(tolerance=tolerance).choose(errors).chosen == chosen_by_hand(
        errors, tolerance
    )


def test_the_harmless_policy_that_gains_most_is_chosen() -> None:
    source = drawn(0)
    choice = HarmlessRule().choose(
        of(source, some=changed(source, 0.3, 1), more=changed(source, 0.6, 2))
    )
    assert choice.chosen == "more"
    shifted = [c for c in CONDITIONS if c.shift != "clean"]
    more = changed(source, 0.6, 2)
    gain = statistics.fmean(float((source[c] - more[c]).mean()) for c in shifted)
    assert choice.judgements["more"].gain == pytest.approx(gain)
    assert choice.judgements["some"].verdict == choice.judgements["more"].verdict == "gains"
    assert choice.tolerated == pytest.approx(
        0.05 * statistics.fmean(float(v.mean()) for v in source.values())
    )


@given(st.sampled_from(CONDITIONS), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_policy_that_harms_one_condition_is_never_chosen(harmed: Condition, seed: int) -> None:
    source = drawn(seed)
    policy = changed(changed(source, 0.9, seed + 1), -0.5, seed + 2, [harmed])
    choice = HarmlessRule().choose(of(source, policy=policy))
    assert choice.chosen is None
    judged = choice.judgements["policy"]
    assert judged.harm is not None
    assert judged.harm[0] == harmed
    harm = float((policy[harmed] - source[harmed]).mean())
    assert judged.harm[1] == pytest.approx(harm)
    assert judged.verdict == "harms"


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_harmful_policy_more_changes_nothing_for_the_others(seed: int) -> None:
    source = drawn(seed)
    good = {"a": changed(source, 0.4, seed + 1), "b": changed(source, 0.5, seed + 2)}
    harmful = changed(changed(source, 0.9, seed + 3), -0.5, seed + 4, CONDITIONS[:1])
    before = HarmlessRule().choose(of(source, **good))
    after = HarmlessRule().choose(of(source, harmful=harmful, **good))
    assert after.chosen == before.chosen is not None
    assert {name: after.judgements[name] for name in good} == dict(before.judgements)
    assert after.left_out == before.left_out


def test_without_policies_and_with_one_that_is_the_source_nothing_is_adapted() -> None:
    source = drawn(0)
    assert HarmlessRule().choose(of(source)).chosen is None
    same = HarmlessRule().choose(of(source, same=source))
    assert same.chosen is None
    assert same.judgements["same"].verdict == "no gain"
    assert same.judgements["same"].limit[1] == 0


def test_of_equal_policies_the_first_is_taken() -> None:
    source = drawn(0)
    better = changed(source, 0.6, 1)
    assert HarmlessRule().choose(of(source, second=better, first=better)).chosen == "second"


def test_few_samples_do_not_show_that_a_policy_is_harmless() -> None:
    few, many = drawn(0, 40), drawn(0, 4000)
    for source, verdict in ((few, "may harm"), (many, "gains")):
        policy = changed(source, 0.1, 1, [c for c in CONDITIONS if c.shift != "clean"])
        judged = HarmlessRule().choose(of(source, policy=policy)).judgements["policy"]
        assert judged.verdict == verdict
    assert HarmlessRule().choose(of(few, policy=changed(few, 0.1, 1))).chosen is None


def test_a_family_left_out_gets_what_is_chosen_without_it() -> None:
    source = drawn(0)
    fog = [c for c in CONDITIONS if c.shift == "fog"]
    wild = changed(changed(source, 0.9, 1), -0.4, 2, fog)
    tame = changed(source, 0.4, 3)
    choice = HarmlessRule().choose(of(source, wild=wild, tame=tame))
    assert choice.chosen == "tame"
    assert {family: name for family, (name, _) in choice.left_out.items()} == {
        "fog": "wild",
        "noise": "tame",
    }
    lost = statistics.fmean(float((source[c] - wild[c]).mean()) for c in fog)
    assert choice.left_out["fog"][1] == pytest.approx(lost)
    assert lost < 0


def test_errors_that_are_not_finite_are_harm() -> None:
    source = drawn(0)
    broken = changed(source, 0.9, 1)
    broken[CONDITIONS[3]][0] = np.nan
    judged = HarmlessRule().choose(of(source, broken=broken)).judgements["broken"]
    assert judged.harm == (CONDITIONS[3], math.inf)
    with pytest.raises(ValueError, match="finite errors of the source"):
        HarmlessRule().choose(of(broken, policy=source))


def test_a_policy_without_all_errors_is_refused() -> None:
    source = drawn(0)
    short = {c: v[: 300 - (c == CONDITIONS[0])] for c, v in source.items()}
    with pytest.raises(ValueError, match="an error of short for each sample"):
        HarmlessRule().choose(of(source, short=short))


@pytest.mark.parametrize("wrong", [{"tolerance": -0.1}, {"confidence": 1.0}, {"confidence": 0.4}])
def test_a_wrong_rule_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"tolerance >= 0 and confidence in \[0\.5, 1\)"):
        HarmlessRule(**wrong)


def test_severities_of_a_shift_are_one_family() -> None:
    weak, strong = Condition("fog/1", "equal", 4), Condition("fog/5", "equal", 4)
    clean = Condition("clean", "equal", 4)
    ids = {c: np.arange(2) for c in (clean, weak, strong)}
    values = {clean: np.zeros(2), weak: np.ones(2), strong: np.full(2, 5.0)}
    found = by_family(Errors(ids, values, {"policy": values}))
    fog = Condition("fog", "equal", 4)
    assert found.samples[fog].tolist() == [0, 1, 0, 1]
    assert found.source[fog].tolist() == found.policies["policy"][fog].tolist() == [1, 1, 5, 5]
    assert [*found.source] == [clean, fog]
