"""Two CPU processes: each adapts to its own batches, logs are reduced and gradients shared."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import post_hoc, stream
from helpers.toy import adapting, doubles, loader, net, quiet
from torch.utils.data import DataLoader, Subset, TensorDataset

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    paths = os.pathsep.join((str(HERE), str(HERE.parent)))
    subprocess.run(
        [sys.executable, "-m", "helpers.distributed_run", str(folder)],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        timeout=120,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Its numbers, and the batches each process saw."""
    batches = [torch.load(path) for path in sorted(folder.glob("batch-?-?.pt"))]
    return torch.load(folder / "main.pt"), batches


def loader_of(bad: int, count: int = 12) -> Any:
    """Serve the same samples without their numbers."""
    images, labels, _ = stream(bad, count).dataset.tensors
    return DataLoader(TensorDataset(images, labels), batch_size=3)


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


def test_with_scope_sample_no_sample_depends_on_its_process(folder: Path, run: Any) -> None:
    batches = [torch.load(path) for path in sorted(folder.glob("sample-?-?.pt"))]
    numbers = torch.cat([batch["numbers"] for batch in batches])
    assert sorted(numbers.tolist()) == list(range(12))
    callback = adapting(scope="sample", backend="loop")
    with pytest.warns(UserWarning, match="of a sample: non-finite output"):
        (alone,) = quiet(callbacks=[callback]).test(net(), loader_of(bad=2), verbose=False)
    with pytest.warns(UserWarning, match="of a sample: non-finite output"):
        expected: Any = quiet(callbacks=[callback]).predict(net(), loader_of(bad=2))
    logits = torch.cat([batch["logits"] for batch in batches])
    torch.testing.assert_close(logits, torch.cat(expected)[numbers], equal_nan=True)
    by_sample = run[0]["by_sample"]
    assert by_sample["it3/skipped"] == alone["it3/skipped"] == 1
    assert by_sample["it3/reliable"] == pytest.approx(11 / 12)
    for name in ("it3/distance_source", "it3/distance_adapted"):
        assert by_sample[name] == pytest.approx(alone[name])


def test_gate_is_calibrated_on_the_samples_of_all_processes(folder: Path) -> None:
    callback = adapting(scope="sample", steps=0)
    with pytest.warns(UserWarning, match="non-finite output"):
        quiet(callbacks=[callback]).predict(net(), loader_of(bad=2, count=14))
    (distances,) = callback.summary.distances
    for rank in range(2):
        quantiles = torch.load(folder / f"calibrated-{rank}.pt")["quantiles"]
        expected = distances[~distances.isnan()].quantile(torch.linspace(0, 1, 1001))
        torch.testing.assert_close(quantiles.double(), expected, rtol=1e-6, atol=0)


def test_carried_weights_are_refused_on_two_processes(run: Any) -> None:
    assert "2 processes would each carry their own" in run[0]["refused"]


def test_post_hoc_step_on_two_processes_is_that_on_a_batch_twice_as_large(run: Any) -> None:
    alone = post_hoc()
    quiet().fit(alone, loader(16, 16))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(run[0]["state"][name], value, msg=name)


def test_targets_are_measured_over_the_samples_of_all_processes(run: Any) -> None:
    expected = torch.arange(12.0) ** 2
    assert run[0]["measured"]["it3_prior.mean"].item() == pytest.approx(expected.mean().item())
    spread = expected.std(correction=0).item()
    assert run[0]["measured"]["it3_prior.std"].item() == pytest.approx(spread)
