"""What is found before training: a wrong metric, missing loaders, settings that data ignore."""

from pathlib import Path
from typing import Any

import pytest
from helpers.benchmark_runs import benchmark, digits, make_model
from torch.utils.data import DataLoader

from it3_lightning.benchmark import Tuning, models
from it3_lightning.benchmark.scoring import dry_run
from it3_lightning.benchmark.tune_rules import Grid
from it3_lightning.data import DigitsDataModule
from it3_lightning.data.base import Split, Stream


class Deaf(DigitsDataModule):
    """Loaders of its own, which do not follow what is asked for."""

    missing = 0

    def test_dataloader(self) -> list[DataLoader[Any]]:
        before: tuple[Stream, Split] = self.stream, self.evaluate_on
        self.stream, self.evaluate_on = "equal", "test"
        try:
            found = super().test_dataloader()
        finally:
            self.stream, self.evaluate_on = before
        return found[: len(found) - self.missing]


def deaf(**own: Any) -> Deaf:
    data = Deaf(shifts=("contrast",), train_size=200, test_size=120, severity=4)
    vars(data).update(own)
    return data


@pytest.fixture(autouse=True)
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be trained."""
    monkeypatch.setattr(models, "_train_models", lambda *_: pytest.fail("trained"))


def test_a_metric_that_is_not_logged_is_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no 'test_accuracy', but test_loss.*test_acc"):
        benchmark(tmp_path, metric="test_accuracy").run(make_model, digits())
    assert not (tmp_path / "run.json").exists()


def test_a_shift_that_has_no_loader_is_named_before_training(tmp_path: Path) -> None:
    wrong = r"Expected a test loader for each of clean, contrast, got 1 of Deaf"
    with pytest.raises(ValueError, match=wrong):
        benchmark(tmp_path).run(make_model, deaf(missing=1))


@pytest.mark.parametrize("stream", ["unequal", "correlated"])
def test_a_stream_that_data_ignore_is_named_before_training(stream: str, tmp_path: Path) -> None:
    wrong = rf"with stream='{stream}' than with stream='equal', got the same of Deaf"
    with pytest.raises(ValueError, match=wrong):
        benchmark(tmp_path, streams=("equal", f"{stream}/7")).run(make_model, deaf())


def test_a_continual_stream_that_data_ignore_is_named_before_training(tmp_path: Path) -> None:
    data = deaf(shifts=("contrast", "fog"))
    with pytest.raises(ValueError, match=r"each of clean, continual, got 3 of Deaf"):
        benchmark(tmp_path, streams=("continual",)).run(make_model, data)


def test_validation_samples_that_data_do_not_give_are_named_before_tuning(tmp_path: Path) -> None:
    grid = Grid(shares=(), lrs=(1e-3,), forms=("published",), parameters=("all",))
    wrong = r"evaluate_on='validation' than with evaluate_on='test', got the same of Deaf"
    with pytest.raises(ValueError, match=wrong):
        Tuning(grid=grid).run(benchmark(tmp_path), make_model, deaf())


def test_what_follows_its_settings_is_left_as_it_is() -> None:
    data = digits()
    data.stream, data.evaluate_on = "correlated", "validation"
    dry_run(benchmark(Path()), make_model(), data)
    assert (data.stream, data.evaluate_on) == ("correlated", "validation")
