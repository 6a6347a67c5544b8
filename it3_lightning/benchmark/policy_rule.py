"""Decision rule of calibration: of several policies the best that harms nowhere, or none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from it3_lightning.data.shifts import parted

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Condition:
    """What samples are predicted under.

    Args:
        shift: the family of shifts; ``"clean"``: none.
        stream: order and frequencies of the classes.
        batch_size: samples in a batch.

    >>> print(Condition("fog", "equal", 16))
    fog, equal, batches of 16
    """

    shift: str
    stream: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.shift}, {self.stream}, batches of {self.batch_size}"

    @property
    def groups(self) -> tuple[str, str, str]:
        """Names of the groups that it belongs to: of its shift, its stream, its size of batches."""
        return self.shift, f"{self.stream} stream", f"batches of {self.batch_size}"


@dataclass(frozen=True)
class Errors:
    """Errors of the same samples under the same conditions, without and with each policy.

    Args:
        samples: which samples each condition has, ``(N,)`` integers: the same number is the same
            sample, wherever it stands.
        source: errors ``(N,)`` without adaptation, the smaller the better.
        policies: the same of each policy, by its name.
    """

    samples: Mapping[Condition, NDArray[np.int64]]
    source: Mapping[Condition, Array]
    policies: Mapping[str, Mapping[Condition, Array]]


def by_family(errors: Errors) -> Errors:
    """Return errors whose conditions name families of shifts: all severities of one together."""

    def joined(own: Mapping[Condition, Any]) -> dict[Condition, Any]:
        groups: dict[Condition, list[Any]] = {}
        for condition, values in own.items():
            family = replace(condition, shift=parted(condition.shift)[0])
            groups.setdefault(family, []).append(values)
        return {family: np.concatenate(parts) for family, parts in groups.items()}

    policies = {name: joined(own) for name, own in errors.policies.items()}
    return Errors(joined(errors.samples), joined(errors.source), policies)


@dataclass(frozen=True)
class Judgement:
    """What the rule says of a policy. All numbers are in units of the error.

    Args:
        gain: mean over the shifted conditions of the error that it takes away.
        surely: what it gains there at least, with the confidence of the rule.
        clean: gain on clean samples.
        harm: the condition with the largest harm of those where one is shown, and the mean harm.
        doubt: of the groups of conditions that it may harm by more than is tolerated the one with
            the largest upper limit of the harm, and that limit.
        limit: the largest upper limit of the harm in all groups, and which group that is.
    """

    gain: float
    surely: float
    clean: float
    harm: tuple[Condition, float] | None
    doubt: tuple[str, float] | None
    limit: tuple[str, float]

    @property
    def eligible(self) -> bool:
        """Whether it harms nowhere, as far as can be told, and surely gains."""
        return self.harm is None and self.doubt is None and self.surely > 0

    @property
    def verdict(self) -> str:
        """What keeps it from being chosen, in a word or two."""
        if self.harm is not None:
            return "harms"
        if self.doubt is not None:
            return "may harm"
        return "gains" if self.surely > 0 else "no gain"


@dataclass(frozen=True)
class Choice:
    """What the rule chooses, and why.

    Args:
        chosen: name of the policy; ``None``: adapt nothing.
        judgements: of all policies.
        tolerated: the harm that is tolerated, in units of the error.
        left_out: by family of shifts what is chosen without it (``None``: nothing), and what that
            gains on it: an estimate for a family that the choice has not seen.
    """

    chosen: str | None
    judgements: Mapping[str, Judgement]
    tolerated: float
    left_out: Mapping[str, tuple[str | None, float]]


@dataclass(frozen=True, kw_only=True)
class HarmlessRule:
    r"""Chooses what gains most on average among what harms nowhere; else nothing.

    A policy is compared with the source sample by sample. Its harm under one condition is the mean
    difference of both errors; under several it is the mean of these. Limits of a harm are one-sided
    with ``confidence``: :math:`h + z s`, with the standard error :math:`s` over *samples*: the
    differences of one sample under several conditions are no independent ones, and count together
    (a cluster-robust error). A policy is chosen only if

    1. under no condition a harm above the tolerance is shown: no lower limit exceeds it;
    2. in no group of conditions such a harm is possible: no upper limit exceeds it. Groups are each
       family of shifts, clean samples, each stream, each size of batches;
    3. it surely gains: the lower limit of its mean gain under shift is positive.

    Of these the one with the largest mean gain is taken, the first of equal ones. As *every* group
    must pass, a policy that harms one of them passes with a probability of at most
    ``1 - confidence``, without a correction for their number (Berger, 1982). With too few samples
    nothing passes, and nothing is adapted. A policy's judgement depends on no other policy.

    Limits of means of samples are normal ones: they need no random numbers, and these are means of
    hundreds. Where hardly a sample changes they, as a bootstrap, would be too narrow, so each
    condition gets one further sample, which loses as much as any sample changes: with no change in
    ``N`` samples the limit is :math:`(1 + z) / (N + 1)` of that, about the rule of three,
    :math:`3 / N`.

    Args:
        tolerance: harm that is tolerated, as a share of the source's error, mean over all
            conditions.
        confidence: of each limit.

    Raises:
        ValueError: the tolerance is negative, or the confidence not in [0.5, 1).

    >>> rule, condition = HarmlessRule(), Condition("fog", "equal", 100)
    >>> ids, source = np.arange(400), np.repeat([0.0, 1.0], 200)
    >>> better = {condition: np.repeat([0.0, 1.0], [300, 100])}
    >>> rule.choose(Errors({condition: ids}, {condition: source}, {"better": better})).chosen
    'better'
    """

    tolerance: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.tolerance < 0 or not 0.5 <= self.confidence < 1:
            raise ValueError(
                f"Expected tolerance >= 0 and confidence in [0.5, 1), got {self.tolerance} and "
                f"{self.confidence}."
            )

    def choose(self, errors: Errors) -> Choice:
        """Judge all policies, and choose one or none.

        Args:
            errors: of the source and of each policy.

        Raises:
            ValueError: errors are missing, not as many as samples, or of the source not finite.
        """
        _check(errors)
        tolerated = self.tolerance * _mean_of(errors.source.values())
        every = [*errors.source]
        judged = {name: self._judged(errors, name, every, tolerated) for name in errors.policies}
        families = dict.fromkeys(c.shift for c in every if c.shift != "clean")
        left_out = {family: self._without(errors, family, tolerated) for family in families}
        return Choice(_best(judged), judged, tolerated, left_out)

    def _without(self, errors: Errors, family: str, tolerated: float) -> tuple[str | None, float]:
        """Return what is chosen without a family of shifts, and what it gains on it."""
        others = [c for c in errors.source if c.shift != family]
        judged = {n: self._judged(errors, n, others, tolerated) for n in errors.policies if others}
        chosen = _best(judged)
        if chosen is None:
            return None, 0.0
        own = [c for c in errors.source if c.shift == family]
        return chosen, _mean_of(errors.source[c] - errors.policies[chosen][c] for c in own)

    def _judged(
        self, errors: Errors, name: str, conditions: Sequence[Condition], tolerated: float
    ) -> Judgement:
        own = errors.policies[name]
        for condition in conditions:
            if not np.isfinite(own[condition]).all():
                limit = str(condition), math.inf
                return Judgement(-math.inf, -math.inf, 0.0, (condition, math.inf), limit, limit)
        harms = {c: own[c] - errors.source[c] for c in conditions}
        most = max((float(np.abs(harm).max()) for harm in harms.values()), default=0.0)

        def upper(of: Iterable[Condition], sign: int = 1) -> float:
            parts = [(errors.samples[c], sign * harms[c]) for c in of]
            return upper_limit(parts, most, self.confidence)

        groups: dict[str, list[Condition]] = {}
        for condition in conditions:
            for group in condition.groups:
                groups.setdefault(group, []).append(condition)
        limits = {group: upper(members) for group, members in groups.items()}
        largest = max(limits.items(), key=lambda pair: pair[1])
        shown = {c: float(h.mean()) for c, h in harms.items() if -upper([c], -1) > tolerated}
        shifted = [c for c in conditions if c.shift != "clean"]
        return Judgement(
            gain=-_mean_of(harms[c] for c in shifted),
            surely=-upper(shifted) if shifted else 0.0,
            clean=-_mean_of(harms[c] for c in conditions if c.shift == "clean"),
            harm=max(shown.items(), key=lambda pair: pair[1]) if shown else None,
            doubt=largest if largest[1] > tolerated else None,
            limit=largest,
        )


def upper_limit(
    parts: Sequence[tuple[NDArray[np.int64], Array]], most: float, confidence: float
) -> float:
    """Return the upper confidence limit of a mean harm under several conditions.

    Args:
        parts: of each condition the samples ``(N,)`` and their harms ``(N,)``.
        most: the harm of one further sample in each of them.
        confidence: of the limit, one-sided.

    >>> round(upper_limit([(np.arange(99), np.zeros(99))], most=1.0, confidence=0.95), 3)
    0.026
    """
    harms = [np.append(harm, most) for _, harm in parts]
    means = [float(harm.mean()) for harm in harms]
    samples = np.concatenate([np.append(own, -1) for own, _ in parts])
    shares = [
        (harm - mean) / (len(harm) * len(parts)) for harm, mean in zip(harms, means, strict=True)
    ]
    _, place = np.unique(samples, return_inverse=True)
    clusters = np.bincount(place, np.concatenate(shares))
    n = len(clusters)
    error = math.sqrt(float(np.square(clusters).sum()) * n / max(n - 1, 1))
    return statistics.fmean(means) + statistics.NormalDist().inv_cdf(confidence) * error


def _best(judged: Mapping[str, Judgement]) -> str | None:
    good = {name: each.gain for name, each in judged.items() if each.eligible}
    return max(good, key=lambda name: good[name], default=None)


def _mean_of(values: Iterable[Array]) -> float:
    """Return the mean over conditions of the mean over samples; of none 0."""
    means = [float(each.mean()) for each in values]
    return statistics.fmean(means) if means else 0.0


def _check(errors: Errors) -> None:
    sizes = {condition: len(samples) for condition, samples in errors.samples.items()}
    for name, own in [("the source", errors.source), *errors.policies.items()]:
        found = {condition: len(values) for condition, values in own.items()}
        if found != sizes or 0 in found.values():
            raise ValueError(
                f"Expected an error of {name} for each sample of each condition, at least one, got "
                f"{found} for {sizes}."
            )
    if not all(np.isfinite(values).all() for values in errors.source.values()):
        raise ValueError(
            "Expected finite errors of the source, got others: leave out samples that it cannot "
            "predict."
        )
