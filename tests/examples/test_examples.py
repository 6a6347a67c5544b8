"""The examples run as they are, and do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
OTHERS = {  # have tests of their own
    EXAMPLES / f"{name}.py"
    for name in ("serve", "sequence_memory", "ten_minutes", "what_the_distance_tells")
}


@pytest.mark.parametrize(
    "path", sorted({*EXAMPLES.glob("*.py")} - OTHERS), ids=lambda path: path.stem
)
def test_example_runs_and_is_short(path: Path) -> None:
    scores = runpy.run_path(str(path))["main"](max_epochs=2)
    assert len(path.read_text().splitlines()) <= 100
    assert {name.split(",")[0].split()[0] for name in scores} == {"source", "adapted"}
    assert all(0 <= score <= 1 for score in scores.values())
