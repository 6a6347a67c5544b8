"""Two CPU processes: each adapts to its own batches, logs are reduced and gradients shared."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import post_hoc, stream
from torch.utils.data import DataLoader, Subset
from toy import adapting, doubles, loader, net, quiet

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What came of a run on two processes: its numbers, and the batches each process saw."""
    folder = tmp_path_factory.mktemp("two")
    paths = os.pathsep.join((str(HERE), str(HERE.parent)))
    subprocess.run(
        [sys.executable, str(HERE / "distributed_run.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        timeout=120,
        capture_output=True,
    )
    batches = [torch.load(path) for path in sorted(folder.glob("?-?.pt"))]
    return torch.load(folder / "main.pt"), batches


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def test_each_process_adapts_to_its_own_batches_as_one_process_does(run: Any) -> None:
    assert sorted(torch.cat([batch["numbers"] for batch in run[1]]).tolist()) == list(range(12))
    for batch in run[1]:
        numbers = batch["numbers"].tolist()
        alone: Any = DataLoader(Subset(stream(bad=2).dataset, numbers), batch_size=3)
        callback = adapting()
        if 2 in numbers:
            with pytest.warns(UserWarning, match="non-finite output"):
                (expected,) = quiet(callbacks=[callback]).predict(net(), alone) or []
        else:
            (expected,) = quiet(callbacks=[callback]).predict(net(), alone) or []
        torch.testing.assert_close(batch["logits"], expected, equal_nan=True)


def test_logs_are_reduced_over_processes_of_which_one_skipped_a_batch(run: Any) -> None:
    logged, means, count = run[0]["logged"], 0.0, 0
    assert logged["it3/skipped"] == 3
    assert logged["it3/reliable"] == pytest.approx(9 / 12)
    for batch in run[1]:
        numbers = batch["numbers"].tolist()
        if 2 not in numbers:
            callback = adapting()
            alone: Any = DataLoader(Subset(stream().dataset, numbers), batch_size=3)
            quiet(callbacks=[callback]).predict(net(), alone)
            means, count = means + 3 * callback.summary.distance_adapted, count + 3
    assert count == 9
    assert logged["it3/distance_adapted"] == pytest.approx(means / count)


def test_carried_weights_are_refused_on_two_processes(run: Any) -> None:
    assert "2 processes would each carry their own" in run[0]["refused"]


def test_post_hoc_step_on_two_processes_is_that_on_a_batch_twice_as_large(run: Any) -> None:
    alone = post_hoc()
    quiet().fit(alone, loader(16, 16))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(run[0]["state"][name], value, msg=name)
