"""Lift and drag computed into a file: right, interrupted, continued, and read back."""

import math
import sys
from pathlib import Path
from typing import Any

import compute_airfoils
import neuralfoil
import numpy as np
import pytest
import torch
from compute_airfoils import compute, main

from it3_lightning.data import AirfoilDataModule
from it3_lightning.data.airfoils import Polars, ProfileSet


def forces(parameters: list[list[float]], angle: float) -> Polars:
    return compute_airfoils.analysed(
        ProfileSet(angle=angle), torch.tensor(parameters, dtype=torch.float64)
    )


def test_a_symmetric_profile_has_no_lift_at_no_angle_and_camber_lifts() -> None:
    flat = forces([[0.0, 0.4, 0.12], [0.04, 0.4, 0.12]], angle=0.0)
    assert flat.lift[0].item() == pytest.approx(0.0, abs=1e-9)
    assert 0.3 < flat.lift[1].item() < 0.6  # thin airfoil theory: 0.46 for camber 0.04 at 0.4
    steep = forces([[0.0, 0.4, 0.12]], angle=5.0)
    assert steep.lift.item() == pytest.approx(2 * math.pi * math.radians(5), rel=0.1)
    assert (flat.drag > 0).all()
    assert (flat.confidence > 0.8).all()


SOLVE = neuralfoil.get_aero_from_coordinates


class Solver:
    """Counts calls of NeuralFoil, and is interrupted at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.calls, self.stop = 0, stop
        monkeypatch.setattr(neuralfoil, "get_aero_from_coordinates", self)
        monkeypatch.setattr(compute_airfoils, "CHUNK", 4)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return SOLVE(*args, **kwargs)


def same(first: Polars, second: Polars) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True)
    )


def test_an_interrupted_computation_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = ProfileSet(count=10)
    whole = compute(drawn, tmp_path / "whole")
    Solver(monkeypatch, stop=6)
    with pytest.raises(KeyboardInterrupt):
        compute(drawn, tmp_path / "stopped")
    (file,) = (tmp_path / "stopped").iterdir()  # and no unfinished one
    assert len(np.load(file)["lift"]) == 4
    solver = Solver(monkeypatch)
    assert same(compute(drawn, tmp_path / "stopped"), whole)
    assert solver.calls == 6
    assert same(compute(drawn, tmp_path / "stopped"), whole)
    assert solver.calls == 6


def test_an_interruption_while_writing_leaves_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, save, writes = ProfileSet(count=10), np.savez, []

    def interrupted(stream: Any, **arrays: Any) -> None:
        writes.append(len(arrays["lift"]))
        if len(writes) == 2:
            stream.write(b"half a file")
            raise KeyboardInterrupt
        save(stream, **arrays)

    Solver(monkeypatch)
    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute(drawn, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]
    assert len(compute(drawn, tmp_path)) == 10
    assert writes == [4, 8, 8, 10]


def test_settings_have_files_of_their_own(tmp_path: Path) -> None:
    sets = [ProfileSet(count=3), ProfileSet(count=3, angle=4.0), ProfileSet(count=3, seed=1)]
    lifts = [compute(drawn, tmp_path).lift for drawn in sets]
    assert len(list(tmp_path.iterdir())) == 3
    assert (lifts[1] < lifts[0]).all()
    assert not torch.equal(sets[0].parameters(), sets[2].parameters())
    assert torch.equal(sets[0].parameters(), ProfileSet(count=3).parameters())


def test_a_complete_file_needs_no_solver_and_a_missing_one_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = compute(ProfileSet(count=2), tmp_path)
    monkeypatch.setitem(sys.modules, "neuralfoil", None)
    assert same(compute(ProfileSet(count=2), tmp_path), known)
    with pytest.raises(ImportError, match=r"pip install 'it3_lightning\[airfoils\]'"):
        compute(ProfileSet(count=3), tmp_path)


def test_the_data_module_reads_what_the_script_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"--root={tmp_path}", "--profiles=150", "--angle=4"])
    assert "150 profiles in" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "neuralfoil", None)
    data = AirfoilDataModule(tmp_path, profiles=150, angle=4.0, test_size=20, val_size=20)
    data.prepare_data()
    data.setup("fit")
    assert len(list(tmp_path.iterdir())) == 1
