"""Scalars for TensorBoard: a run for each row, a step for each seed; nothing without it."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest
from helpers.benchmark_runs import toy_results

from it3_lightning.benchmark.report import show, write_scalars


class Writer:
    """Stands in for TensorBoard's: a file with a line for each scalar."""

    def __init__(self, folder: str, filename_suffix: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{len(list(Path(folder).iterdir()))}{filename_suffix}"
        self._file = Path(folder) / name

    def __enter__(self) -> Self:
        self._file.touch()
        return self

    def __exit__(self, *_: object) -> None: ...

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        with self._file.open("a") as stream:
            stream.write(f"{tag} {value:.1f} {step}\n")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)


@pytest.mark.usefixtures("installed")
def test_each_row_is_a_run_with_its_scores_and_gains_and_is_written_anew(tmp_path: Path) -> None:
    other = tmp_path / "tensorboard" / "ordinary, Tent" / "events.out.tfevents.of.another"
    other.parent.mkdir(parents=True)
    other.touch()
    for _ in range(2):
        show(toy_results(), tmp_path)
    files = [f for f in (tmp_path / "tensorboard").rglob("*.it3") if f.is_file()]
    assert {file.parent.name for file in files} == {
        *("ordinary, source", "ordinary, batch statistics", "ordinary, Tent")
    }
    assert len(files) == 3
    assert other.exists()
    text = next(file for file in files if "Tent" in file.parent.name).read_text()
    assert text.splitlines() == [
        "equal/clean 89.0 0",
        "equal/noise 63.0 0",
        "equal/clean 91.0 1",
        "equal/noise 65.0 1",
        "gain/equal 4.0 0",
    ]


def test_without_tensorboard_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert not write_scalars(toy_results(), tmp_path)
    assert list(tmp_path.iterdir()) == []
