"""Settings of a benchmark: refused before any work where they make no sense."""

from pathlib import Path

import pytest
from helpers.benchmark_runs import benchmark


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": ()}, "at least one seed"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"streams": ("odd",)}, "equal, unequal"),
        ({"streams": ()}, r"streams: \[equal\]"),
        ({"streams": ("equal/0",)}, "as in 'equal/16', got 'equal/0'"),
        ({"streams": ("equal/",)}, "as in 'equal/16', got 'equal/'"),
        ({"rates": (0.0,)}, "rates > 0"),
        ({"alone": 0}, "alone >= 1"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(tmp_path, **arguments)


def test_a_negative_number_of_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"distance_samples >= 0, got -1"):
        benchmark(tmp_path, distance_samples=-1)
