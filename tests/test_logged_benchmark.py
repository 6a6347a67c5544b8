"""The benchmark of what is logged: what it holds against what, by a clock of its own; no times."""

import logged
import pytest
import torch
from costs.networks import small_cnn
from lightning.pytorch import Trainer
from torch import nn

from it3_lightning import IT3TestTimeCallback


class Clock:
    """Goes on by a second with every convolution, and by nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, layer: nn.Module, *_: object) -> None:
        """Count a pass."""
        self.now += isinstance(layer, nn.Conv2d)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[logged.Row]:
    """Rows by a clock that tells passes, of runs whose loaders take a second each."""
    clock = Clock()
    test = Trainer.test

    def slow(self: Trainer, *args: object, **kwargs: object) -> object:
        clock.now += 1  # around the steps
        return test(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "test", slow)
    monkeypatch.setitem(logged.BATCHES, "tiny CNN", (lambda: small_cnn(2, 4), 2, 2))
    handle = nn.modules.module.register_module_forward_hook(clock.tick)
    try:
        return list(logged.rows("tiny CNN", rounds=2, clock=clock))
    finally:
        handle.remove()


def test_what_is_logged_is_what_runs_take_less_what_is_around_the_steps(
    rows: list[logged.Row],
) -> None:
    assert [row.case.partition(": ")[2] for row in rows] == list(logged.CASES)
    for row in rows:
        assert row.ratios == (1.0, 1.0)
        assert row.logged == row.taken > 0
    source, _, second, step, _ = (row.logged for row in rows)
    assert second == 2 * source
    assert step > second


def test_what_is_logged_and_not_taken_is_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    row = logged.Row("a case", 0.5, 1.0, (0.5, 0.4, 0.6))
    assert row.cells == ["a case", "0.5", "1", "0.50", "0.45 to 0.55", "no"]
    assert logged.Row("a case", 1.0, 1.0, (0.95, 1.0, 1.1)).cells[-1] == "yes"


def test_the_ways_are_those_that_the_callback_promises_the_time_of() -> None:
    made = {name: IT3TestTimeCallback(**given) for name, given in logged.CASES.items()}
    assert [made[name].settings.steps for name in made] == [0, 0, 0, 1, 1]
    assert made["second prediction"].prediction == "second"
    assert made["batch statistics"].settings.norm_stats == "batch"
    assert made["one step, scope `sample`"].settings.scope == "sample"
    assert torch.get_num_threads() >= 1
