"""Several benchmarks in one table: the numbers of their own results, line by line."""

import json
from pathlib import Path
from typing import Any

import pytest

from it3_lightning.benchmark.overview import overview
from it3_lightning.cli import main


def entry(training: str, row: str, **streams: tuple[float, float, float | None]) -> dict[str, Any]:
    """One line of a results.json: clean and shifted score, and gain, by stream."""
    cells = {
        stream: {
            "clean": {"mean": clean, "std": 0.1},
            "shifted": {"mean": shifted, "std": 0.2},
            "gain": None if gain is None else {"mean": gain, "std": 0.3},
        }
        for stream, (clean, shifted, gain) in streams.items()
    }
    return {"training": training, "row": row, **cells, "ms_per_sample": 0.0}


def written(folder: Path, metric: str, decimals: int, *table: dict[str, Any]) -> Path:
    folder.mkdir()
    content = {"metric": metric, "decimals": decimals, "table": table}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two benchmarks, one with two streams and one more way to predict."""
    return [
        written(
            tmp_path / "digits",
            "test_acc",
            1,
            entry("ordinary", "source", equal=(97, 77, None), unequal=(96, 76, None)),
            entry("post-hoc", "source", equal=(97, 77, None), unequal=(96, 76, None)),
            entry("post-hoc", "batch statistics", equal=(97, 80, None), unequal=(96, 79, None)),
            entry("post-hoc", "adapted", equal=(97, 81, 1.0), unequal=(96, 78, -1.0)),
        ),
        written(
            tmp_path / "boston",
            "test_mae",
            3,
            entry("ordinary", "source", equal=(2.5, 3.9, None)),
            entry("post-hoc", "source", equal=(2.5, 3.9, None)),
            entry("post-hoc", "adapted", equal=(2.4, 3.8, 0.0125)),
        ),
    ]


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_line_for_each_benchmark_and_stream(folders: list[Path]) -> None:
    ordinary, posthoc = overview(folders).split("**post-hoc**")
    assert ordinary.startswith("**ordinary**")
    head, _, *lines = cells(posthoc)
    assert head == ["benchmark", "score", "clean", "source", "batch statistics", "adapted"]
    assert lines == [
        ["digits", "test_acc", "97.0 ± 0.1", "77.0 ± 0.2", "80.0 ± 0.2", "+1.0 ± 0.3"],
        ["digits, unequal", "test_acc", "96.0 ± 0.1", "76.0 ± 0.2", "79.0 ± 0.2", "-1.0 ± 0.3"],
        ["boston", "test_mae", "2.500 ± 0.100", "3.900 ± 0.200", "", "+0.013 ± 0.300"],
    ]
    assert len({len(line) for line in posthoc.strip().splitlines()}) == 1  # aligned


def test_the_command_prints_the_tables(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", *map(str, folders)])
    assert capsys.readouterr().out.strip() == overview(folders)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected results.json in .*Run it3 benchmark"):
        overview([tmp_path])
