"""The soak benchmark on a few dozen batches: counts and bits, and what it finds; no times."""

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import soak
import torch
from costs.engines import Ours
from costs.networks import small_cnn
from torch import Tensor, nn

BATCHES, SMALLEST = 40, small_cnn(2, 4)
FLAT = soak.Soak("engine, a case", 40, (soak.Mark(9.0, 100, 10, 1.0, 1.0),) * 10, 0.5, ())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What the command prints and leaves behind."""
    folder, printed = tmp_path_factory.mktemp("soak"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(soak, "small_cnn", lambda *_: SMALLEST)
        soak.main(["--batches", str(BATCHES), "--size", "2", "--output", str(folder)])
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return printed.getvalue(), rows


def test_no_run_keeps_objects_or_changes_its_module(run: tuple[str, list[dict[str, Any]]]) -> None:
    cases = [f"engine, {name}" for name in soak.ENGINE] + [f"Trainer, {n}" for n in soak.TRAINER]
    assert [row["case"] for row in run[1]] == cases
    for row in run[1]:
        assert len(row["marks"]) == 10
        assert row["left"] == []
        assert set(row["faults"]) <= {"time", "memory", "objects"}, row["case"]  # of few batches
        for kind in ("objects", "tensors"):  # what is made once, however late, is no leak
            counts = [mark[kind] for mark in row["marks"][-5:]]
            assert min(b - a for a, b in pairwise(counts)) <= 0, (row["case"], kind, counts)


def test_every_run_moves_weights_and_only_a_gate_holds_samples_back(
    run: tuple[str, list[dict[str, Any]]],
) -> None:
    finite = 1 - 2 / (2 * BATCHES)  # a batch is not
    for row in run[1]:
        name = row["case"].partition(", ")[2]
        if name == "no callback":
            assert row["moved"] is None
        elif name == "gate":
            assert 0 < row["moved"] < finite
        else:
            alone = "sample" in name  # its mate is adapted to
            most = finite + alone / (2 * BATCHES)
            least = most - 0.05 * alone  # predictions that agree to the last bit move nothing
            assert least - 1e-9 <= row["moved"] <= most + 1e-9


def test_what_it_prints_fits_a_hundred_columns(run: tuple[str, list[dict[str, Any]]]) -> None:
    lines = [line.rstrip() for line in run[0].splitlines()]
    assert max(map(len, lines)) <= 100
    for row in run[1]:
        (line,) = (each for each in lines if re.match(rf" {row['case']} +\d", each))
        assert " bitwise " in line
    assert f"13 runs of {BATCHES} batches" in run[0]


def test_what_grows_is_named() -> None:
    assert FLAT.faults == []
    for grown, fault in (
        ({"mib": 11.1}, "memory"),
        ({"objects": 140}, "objects"),
        ({"tensors": 46}, "tensors"),
        ({"ms": 1.3}, "time"),
    ):
        marks = (*FLAT.marks[:-1], replace(FLAT.marks[-1], **grown))
        assert replace(FLAT, marks=marks).faults == [fault]
    busy = replace(FLAT.marks[-1], ms=1.9, plain=1.8)  # a machine that others use too
    assert replace(FLAT, marks=(*FLAT.marks[:-1], busy)).faults == []
    bad = [replace(FLAT, left=("a weight",)), replace(FLAT, moved=0.0)]
    assert [each.faults for each in bad] == [["module"], ["nothing moved"]]
    assert soak.verdict([FLAT]).endswith("bitwise what they were.")
    assert soak.verdict([FLAT, bad[0]]).endswith("not flat: engine, a case (module).")


def test_an_engine_that_keeps_a_tensor_a_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []

    def adapt(self: Ours, images: Tensor) -> Any:
        kept.append(images)
        return own(self, images)

    own = Ours.adapt
    monkeypatch.setattr(Ours, "adapt", adapt)
    found = soak.under_engine("episodic", SMALLEST, BATCHES, 2)
    assert found.added.tensors == len(kept) - BATCHES // 10
    assert {"objects", "tensors"} <= set(found.faults)


def leave_weight(net: nn.Linear) -> None:
    net.weight.data[0, 0] += 1e-7


def leave_mode(net: nn.Linear) -> None:
    net.train()


def leave_hook(net: nn.Linear) -> None:
    net.register_forward_hook(lambda *_: None)


def leave_attribute(net: nn.Linear) -> None:
    vars(net)["left"] = 1


@pytest.mark.parametrize("leave", [leave_weight, leave_mode, leave_hook, leave_attribute])
def test_what_is_left_in_a_module_is_named(leave: Any) -> None:
    net = nn.Linear(2, 2).eval()
    nn.init.ones_(net.weight)
    before = soak.identity(net)
    net(torch.ones(1, 2))
    assert soak.left_in(net, before) == ()
    leave(net)
    assert soak.left_in(net, before) == (("weight",) if leave is leave_weight else ("layer ''",))


def test_tenths_need_batches_that_divide(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--batches", "45"])
    assert "expected --batches that divide into tenths, got 45" in capsys.readouterr().err
