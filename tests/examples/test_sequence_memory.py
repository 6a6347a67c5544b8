"""The example of sequence memory: its task is what it says, its figure and table are written."""

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "sequence_memory.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the script defines."""
    return runpy.run_path(str(EXAMPLE))


def test_each_key_is_shown_once_and_asked_for_once(example: dict[str, Any]) -> None:
    keys, shown, asked = example["recall"](4, 9, torch.Generator().manual_seed(0))
    for row in range(4):
        values = dict(zip(keys[row, :9].tolist(), shown[row, :9].tolist(), strict=True))
        assert len(values) == 9
        assert [values[key] for key in keys[row, 9:].tolist()] == asked[row].tolist()
    assert (shown[:, 9:] == example["VALUES"]).all()  # nothing is shown with a question


def test_it_trains_measures_and_draws_every_layer(
    example: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "figure.png"
    losses = example["main"](["--steps=2", "--seeds=2", "--batch=4", f"--figure={figure}"])
    assert set(losses) == {"attention", "TTT-Linear", "TTT-MLP"}
    for by_length in losses.values():
        assert set(by_length) == {8, 16, 32, 64, 128}
        assert all(2 < value < 4 for values in by_length.values() for value in values)
        assert all(len(set(values)) == 2 for values in by_length.values())  # seeds differ
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| TTT-MLP |" in printed
    assert len(EXAMPLE.read_text().splitlines()) <= 200


def test_recall_is_learned_from_the_context(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = example["trained"]
    monkeypatch.setitem(train.__globals__, "TRAINED", (8,))
    model = train("TTT-Linear", 0, 100)
    assert example["measured"](model, 64)[8] < 2.0 < math.log(example["VALUES"])  # chance
