"""The benchmark of what is logged: what it holds against what, by a clock of its own; no times."""

from typing import Any

import logged
import pytest
from costs.networks import small_cnn
from lightning.pytorch import Trainer
from torch import Tensor

from it3_lightning import IT3TestTimeCallback


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[logged.Row]:
    """Rows by a clock that goes on with every pass, and by a second around the steps of a run."""
    now = [0.0]
    forward, test = logged.Timed.forward, Trainer.test

    def passing(self: logged.Timed, images: Tensor) -> Tensor:
        now[0] += 1
        return forward(self, images)

    def starting(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        now[0] += 1
        return test(self, *args, **kwargs)

    monkeypatch.setattr(logged.Timed, "forward", passing)
    monkeypatch.setattr(Trainer, "test", starting)
    monkeypatch.setitem(logged.BATCHES, "tiny CNN", (lambda: small_cnn(2, 4), 2, 2))
    return list(logged.rows("tiny CNN", rounds=2, clock=lambda: now[0]))


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


def test_what_is_logged_and_not_taken_is_no_match() -> None:
    row = logged.Row("a case", 0.5, 1.0, (0.5, 0.4, 0.6))
    assert row.cells == ["a case", "0.5", "1", "0.50", "0.45 to 0.55", "no"]
    assert logged.Row("a case", 1.0, 1.0, (0.95, 1.0, 1.1)).cells[-1] == "yes"


def test_the_ways_are_those_that_the_callback_promises_the_time_of() -> None:
    made = {name: IT3TestTimeCallback(**given) for name, given in logged.CASES.items()}
    assert [made[name].settings.steps for name in made] == [0, 0, 0, 1, 1]
    assert made["second prediction"].prediction == "second"
    assert made["batch statistics"].settings.norm_stats == "batch"
    assert made["one step, scope `sample`"].settings.scope == "sample"
