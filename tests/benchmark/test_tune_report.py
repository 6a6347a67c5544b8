"""Report of tuning: every candidate in order, with the reason."""

from pathlib import Path

import pytest
from helpers.benchmark_runs import candidate, toy_tuned

from it3_lightning.benchmark.report import show_tuning, tuning_markdown


def test_the_report_ranks_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = toy_tuned(
        (candidate(1e-3), 0.0, 2.0), (candidate(2e-3), -9.0, 5.0), (candidate(3e-3), 0.0, 0.1)
    )
    show_tuning(tuned, tmp_path)
    lines = (tmp_path / "tuning.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| sharpened")]
    assert [row.rsplit("| ", 1)[1] for row in rows] == ["chosen |", "harms |", "no gain |"]
    assert rows[1].startswith(
        "| sharpened objective, all, 1 step of adam 0.002, episodic "
        "| +5.0 ± 0.0 | -9.0 ± 0.0 | -9.0 |"
    )
    assert "clean 91.0 ± 1.4, shifts 61.0 ± 1.4" in tuning_markdown(tuned)
    printed = capsys.readouterr().out
    assert "Chosen: sharpened objective, all, 1 step of adam 0.001, episodic." in printed
    assert "it3_lightning.IT3TestTimeCallback" in printed
