r"""Conformal martingale: a bet along a stream that its distances are not those of source data.

Let :math:`s_n` be the :math:`n`-th distance of a stream, and :math:`r_n` its rank from above in a
reference: the distances of validation samples and all :math:`s_1, ..., s_n` themselves, :math:`m`
together; where distances are equal, in random order. If the stream is exchangeable with the
validation samples, then :math:`r_n` is uniform on :math:`1, ..., m` and independent of all other
ranks (Vovk et al., 2003), however few validation samples there are: ranks in a reference that stays
as it is would share its errors. A reference of more than ``MOST`` distances loses one at random for
each that joins; the rank of the one that joined says nothing of what is left, so that ranks stay
independent.

A bet :math:`j` is a distribution on [0, 1], of which a rank pays the mean density over its cell:

.. math:: f_j(r_n) = m \left(G_j(r_n / m) - G_j((r_n - 1) / m)\right), \qquad
    \frac{1}{m} \sum_{r = 1}^{m} f_j(r) = 1,

:math:`G_\kappa(p) = p^\kappa` (Fedorova et al., 2012) for distances larger than those of the
reference and :math:`1 - (1 - p)^\kappa` for smaller ones. Nobody knows when a shift begins, so a
reserve :math:`R_n = 1 / \log_2(n + 2)` is spent in equal parts on the :math:`J` bets, a little at
every sample, which is a mixture over strength, side and beginning of the shift:

.. math:: A_{j, n} = \left(A_{j, n-1} + \frac{R_{n-1} - R_n}{J}\right) f_j(r_n), \qquad
    W_n = R_n + \sum_j A_{j, n}, \qquad W_0 = 1.

The wealth :math:`W_n` is a martingale, so that it ever reaches :math:`1 / \delta` with a
probability of at most :math:`\delta` (Ville, 1939); a shift after :math:`n` samples has about
:math:`\ln n + 2 \ln \ln n` to make up for.

V. Vovk, I. Nouretdinov, A. Gammerman: Testing exchangeability on-line, ICML 2003. V. Fedorova et
al.: Plug-in martingales for testing exchangeability on-line, ICML 2012. The gate is after Y. Bar,
S. Shaer, Y. Romano: Protected test-time adaptation via online entropy matching, NeurIPS 2024.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Self

STRENGTHS = (0.25, 0.5, 0.75)
"""Exponents of the bets, each on large and on small distances."""
MOST = 10_000
"""Distances in a reference."""


@dataclass(frozen=True)
class ConformalMartingale:
    """The wealth of a bet along a stream, and what it takes to go on; never changed in place.

    Args:
        reference: distances that the next one is ranked among, ascending.
        count: of the stream's distances so far.
        stakes: wealth in each of the bets.
        highest: wealth there has ever been, 1 at first.
        seed: of the order of equal distances, and of what a full reference loses.

    >>> clean = ConformalMartingale.of(range(100))
    >>> clean.after([50, 20, 80]).highest
    1.0
    >>> round(clean.after([100, 101, 102]).wealth, 2)  # the largest of all, three times
    2125.12
    """

    reference: array[float]
    count: int = 0
    stakes: tuple[float, ...] = (0.0,) * (2 * len(STRENGTHS))
    highest: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, distances: Iterable[float], *, seed: int = 0) -> Self:
        """Return the beginning of a stream.

        Args:
            distances: of validation samples; those that are not finite do not count.
            seed: see above; where there are more than ``MOST``, also of which are kept.
        """
        known = sorted(filter(math.isfinite, map(float, distances)))
        kept = sorted(Random(seed).sample(known, MOST)) if len(known) > MOST else known
        return cls(array("d", kept), seed=seed)

    @property
    def wealth(self) -> float:
        """The wealth after the last distance."""
        return _reserve(self.count) + sum(self.stakes)

    def after(self, distances: Iterable[float]) -> Self:
        """Return what the bet comes to; distances that are not finite do not count."""
        reference, count, stakes = array("d", self.reference), self.count, self.stakes
        highest = self.highest
        for distance in filter(math.isfinite, map(float, distances)):
            drawn = partial(_drawn, f"{self.seed} {count}")  # however a stream comes in batches
            rank = joined(reference, distance, drawn)
            new = (_reserve(count) - _reserve(count + 1)) / len(stakes)
            paid = payoffs(rank, len(reference))
            stakes = tuple((s + new) * f for s, f in zip(stakes, paid, strict=True))
            count += 1
            highest = max(highest, _reserve(count) + sum(stakes))
            if len(reference) > MOST:
                reference.pop(drawn("lost", 0, MOST))
        return replace(self, reference=reference, count=count, stakes=stakes, highest=highest)


def joined(reference: array[float], distance: float, drawn: Callable[[str, int, int], int]) -> int:
    """Let a distance join others, ascending, and return its rank from above.

    Args:
        reference: the others.
        distance: that joins.
        drawn: draws a place among equal ones, given for what, and the first and the last place.

    >>> others = array("d", [1.0, 3.0])
    >>> joined(others, 2.0, lambda what, first, last: first), others.tolist()
    (2, [1.0, 2.0, 3.0])
    """
    first, last = bisect_left(reference, distance), bisect_right(reference, distance)
    place = first if first == last else drawn("place", first, last)
    reference.insert(place, distance)
    return len(reference) - place


def payoffs(rank: int, count: int) -> list[float]:
    """Return what each bet pays for a rank: 1 on average over all of them.

    Args:
        rank: from above, 1 to ``count``.
        count: of the ranks.

    >>> [round(f, 3) for f in payoffs(1, 4)]  # the largest of four: on large ones, on small ones
    [2.828, 2.0, 1.414, 0.278, 0.536, 0.776]
    """
    below, upto = (rank - 1) / count, rank / count
    large = [count * (upto**k - below**k) for k in STRENGTHS]
    return large + [count * ((1 - below) ** k - (1 - upto) ** k) for k in STRENGTHS]


def _drawn(seed: str, what: str, first: int, last: int) -> int:
    """Return a whole number between two, both included."""
    return Random(f"{seed} {what}").randint(first, last)


def _reserve(count: int) -> float:
    """Return the part of the wealth that is not yet spent on bets."""
    return 1 / math.log2(count + 2)
