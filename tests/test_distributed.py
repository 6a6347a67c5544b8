"""Two CPU processes: each adapts to its own batches, logs are reduced and gradients shared.

``IT3_ALL_PROCESSES=1 python -m pytest tests/test_distributed.py`` also kills spawned processes.
"""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import (
    ALL_METHODS,
    ODD,
    UNEVEN,
    by_method,
    episodic,
    post_hoc,
    refused,
    stream,
    ways,
)
from helpers.toy import adapting, doubles, loader, net, quiet
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

import it3_lightning
from it3_lightning import TestTimeMethod

HERE = Path(__file__).parent


long_run = pytest.mark.skipif(
    "IT3_ALL_PROCESSES" not in os.environ, reason="takes long; IT3_ALL_PROCESSES=1 runs it"
)


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the helper as a script; what hangs is ended, and fails.

    A seed that another test has set with ``seed_everything`` is none of its business.
    """
    paths = os.pathsep.join((str(HERE), str(HERE.parent)))
    environment = {k: v for k, v in os.environ.items() if k != "PL_GLOBAL_SEED"}
    return subprocess.run(
        [sys.executable, str(HERE / "helpers" / "distributed_run.py"), *arguments],
        cwd=HERE,
        env={**environment, "PYTHONPATH": paths},
        check=False,
        timeout=600,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    done = started("ddp_fork", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What a script wrote that Lightning started twice, and how it ended."""
    folder = tmp_path_factory.mktemp("script")
    return folder, started("ddp", str(folder))


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What spawned processes wrote."""
    folder = tmp_path_factory.mktemp("spawned")
    done = started("ddp_spawn", str(folder))
    assert done.returncode == 0, done.stderr
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
    assert logged["it3/moved"] == pytest.approx(9 / 12)
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
    assert by_sample["it3/moved"] == pytest.approx(11 / 12)
    for name in ("it3/distance_source", "it3/distance_adapted"):
        assert by_sample[name] == pytest.approx(alone[name])


def test_gate_is_calibrated_on_the_samples_of_all_processes(folder: Path) -> None:
    callback = adapting(scope="sample", steps=0)
    with pytest.warns(UserWarning, match="non-finite output"):
        quiet(callbacks=[callback]).predict(net(), loader_of(bad=2, count=14))
    (distances,) = callback.summary.distances
    for rank in range(2):
        kept, bet = (torch.load(folder / f"{n}-{rank}.pt") for n in ("calibrated", "reference"))
        known = distances[~distances.isnan()]
        expected = known.quantile(torch.linspace(0, 1, 1001))
        torch.testing.assert_close(kept["quantiles"].double(), expected, rtol=1e-6, atol=0)
        reference = bet["reference"]["distances"].to(known)
        torch.testing.assert_close(reference, known.sort().values, rtol=1e-6, atol=0)


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


# Predictions that are written by each process and merged


def merged(folder: Path, name: str) -> tuple[Tensor, list[list[int]]]:
    """Return the predictions of all samples in order, and the numbers in each batch."""
    found: dict[int, Tensor] = {}
    batches: list[list[int]] = []
    for rank in range(2):
        predictions, indices = torch.load(folder / f"{name}-{rank}.pt")
        for outputs, numbers in zip(predictions, indices[0], strict=True):
            batches.append(numbers)
            found.update(zip(numbers, outputs, strict=True))
    return torch.stack([found[number] for number in sorted(found)]), batches


def alone(indices: Sequence[int] = range(ODD), **given: Any) -> Tensor:
    """Predict these samples as one batch on one process."""
    data: Any = DataLoader(Subset(stream(count=ODD).dataset, indices), batch_size=len(indices))
    (found,) = quiet(callbacks=[adapting(**given)]).predict(net(), data) or []
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_written_predictions_of_each_sample_are_those_of_one_process(
    strategy: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue("script" if strategy == "ddp" else "spawned")
    folder = made[0] if strategy == "ddp" else made
    outputs, batches = merged(folder, f"{strategy}-sample")
    assert sorted(number for batch in batches for number in batch) == list(range(ODD))
    torch.testing.assert_close(outputs, alone(scope="sample", backend="loop"))


def test_written_predictions_of_a_batch_are_those_of_one_process(script: Any) -> None:
    outputs, batches = merged(script[0], "ddp-batch")
    assert sorted(number for batch in batches for number in batch) == list(range(ODD))
    for batch in batches:
        torch.testing.assert_close(outputs[batch], alone(batch))


def test_samples_that_the_sampler_repeats_are_predicted_alike(script: Any) -> None:
    parts = [torch.load(path) for path in sorted(script[0].glob("odd-?-?.pt"))]
    numbers = torch.cat([part["numbers"] for part in parts])
    assert sorted(numbers.tolist()) == sorted([*range(ODD), 0])  # each process has seven
    logits = torch.cat([part["logits"] for part in parts])
    torch.testing.assert_close(logits, alone(scope="sample", backend="loop")[numbers])


@pytest.mark.parametrize("name", ["sample", "resumed"])
def test_the_table_of_two_processes_has_each_sample_once_in_order(name: str, script: Any) -> None:
    with (script[0] / f"table-{name}" / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["index"]) for row in rows] == list(range(ODD))
    largest, named = alone(scope="sample", backend="loop").softmax(1).max(1)
    assert [int(row["predicted_class"]) for row in rows] == named.tolist()
    shares = torch.tensor([float(row["predicted_probability"]) for row in rows])
    torch.testing.assert_close(shares, largest)


# Every method, by one run of two processes


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes predicted by each method, and how it was refused."""
    folder = tmp_path_factory.mktemp("methods")
    done = started("methods", str(folder))
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"methods-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("name", "scope"), ways())
def test_every_method_predicts_on_two_processes_as_on_one(
    name: str, scope: str, methods: list[Any]
) -> None:
    batches = [batch for found, _ in methods for batch in found[name, scope]]
    numbers = [batch.tolist() for batch, _ in batches]
    assert sorted(number for batch in numbers for number in batch) == sorted(
        [*range(UNEVEN), 0]
    )  # the sampler repeats one
    served = numbers if scope == "batch" else [list(range(UNEVEN))]
    data: Any = DataLoader(stream(count=UNEVEN).dataset, batch_sampler=served)
    torch.manual_seed(0)
    alone = by_method(name, data, {}, sees={}, **episodic(scope))
    if scope == "batch":
        expected = [outputs for _, outputs in alone]
    else:
        ((_, together),) = alone
        expected = [together[batch] for batch, _ in batches]
    for (_, outputs), its in zip(batches, expected, strict=True):
        torch.testing.assert_close(outputs, its)


MESSAGES = {
    "carried": "2 processes would each carry their own",
    "source": "must see all source data in one process, and this Trainer has 2",
}


@pytest.mark.parametrize(("name", "kind"), refused())
def test_methods_that_carry_a_state_or_see_source_data_are_refused_on_two_processes(
    name: str, kind: str, methods: list[Any]
) -> None:
    for _, errors in methods:
        assert MESSAGES[kind] in errors[name, kind]


def test_all_methods_are_among_them() -> None:
    public = [value for value in vars(it3_lightning).values() if isinstance(value, type)]
    every = {each for each in public if issubclass(each, TestTimeMethod)}
    assert every - {TestTimeMethod} == {type(make()) for make in ALL_METHODS.values()}
    assert len(ways()) > len(ALL_METHODS)  # some in both scopes


def test_carried_weights_are_refused_in_each_process_of_a_script(script: Any) -> None:
    for rank in range(2):
        refused = torch.load(script[0] / f"refused-{rank}.pt")
        assert refused.startswith("MisconfigurationException: reset='never' carries weights")
        assert "2 processes would each carry their own" in refused


def test_a_process_that_is_killed_ends_the_run_of_the_other_with_a_message(script: Any) -> None:
    done = script[1]
    assert done.returncode != 0
    ours = "of 2 processes another one has ended before" in done.stderr
    lightnings = "terminated with code -9" in done.stderr  # which kills the other at once
    assert ours or lightnings, done.stderr


@long_run
def test_a_spawned_process_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    done = started("ddp_spawn", str(tmp_path), "killed")
    assert done.returncode != 0
    assert "terminated with signal SIGKILL" in done.stderr
