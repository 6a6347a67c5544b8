"""Every fast path against the reference, over settings and networks; and the switch of all."""

import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import torch
from helpers.adapters import any_adapter, backend_of
from helpers.fast import needs_fast_paths, taken
from helpers.reference import forward_predict
from helpers.zoo import KINDS, rows
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, fast
from it3_lightning.engine.fast import grad_sample, stacked_weights, vmap
from it3_lightning.methods import Idempotence

# the first steps of Adam are as long for gradients that are all rounding: short ones are exact
SETTINGS: dict[str, dict[str, Any]] = {
    "one step of adam": {"lr": 1e-3},
    "one step of sgd": {"optimizer": "sgd", "lr": 0.05},
    "one step of polyak": {"optimizer": "polyak", "lr": 0.5},
    "one live step": {"lr": 1e-3, "anchor": "live"},
    "steps of adam": {"lr": 1e-3, "steps": 3},
    "steps of polyak": {"optimizer": "polyak", "lr": 0.5, "steps": 3},
    "ema": {"lr": 1e-3, "steps": 3, "anchor": "ema", "ema_decay": 0.7},
    "live": {"lr": 1e-3, "steps": 3, "anchor": "live", "optimizer": "sgd"},
    "filtered": {"lr": 1e-3, "steps": 3, "objective": Idempotence("l2", 0.45)},
    "clipped": {"lr": 1e-3, "steps": 3, "grad_clip": 1e-3},
    "norm layers": {"lr": 1e-3, "parameters": "norm"},
}
NORMED = ("batch norm", "group norm", "layer norm", "transformer", "vit")
CASES = [(k, s) for k in KINDS for s in SETTINGS if s != "norm layers" or k in NORMED]


def run(kind: str, way: str, given: dict[str, Any]) -> list[tuple[Adaptation, dict[str, Tensor]]]:
    """Adapt to two batches: what is found out on the first is relied on in the second."""
    net: nn.Module = KINDS[kind].build()
    adapter = any_adapter(net, way, enters=KINDS[kind].enters, **given)

    def answer(x: Any) -> tuple[Tensor, Any]:
        weights = {name: weight[None] + 0 for name, weight in net.named_parameters()}
        return forward_predict(net, x, None), weights

    found, inputs = [], KINDS[kind].batch(4)
    for batch in (inputs, rows(inputs, [2, 0, 3, 1])):
        with adapter.adapted(batch, answer) as adaptation:
            found.append((adaptation, adaptation.answers))
    if way != "batch":
        assert backend_of(adapter) == taken(way)
    return found


def assert_equal_to_the_reference(kind: str, way: str, given: dict[str, Any]) -> None:
    with fast.disabled():
        expected = run(kind, "loop" if way == "vectorised" else way, given)
    for (ours, weights), (theirs, their_weights) in zip(
        run(kind, way, given), expected, strict=True
    ):
        assert theirs.cache_hits == 0
        assert theirs.outputs is not None
        assert theirs.source_outputs is not None
        moved = (theirs.outputs - theirs.source_outputs).abs().max()
        assert moved > 1e-6
        assert ours.reason is theirs.reason is None
        for name in ("outputs", "source_outputs", "distance_source", "distance_adapted"):
            actual, reference = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(actual, reference, rtol=0, atol=1e-10)
        assert ours.reliable is not None
        assert theirs.reliable is not None
        assert torch.equal(ours.reliable, theirs.reliable)
        assert weights.keys() == their_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, their_weights[name], rtol=0, atol=1e-10)


@needs_fast_paths
@pytest.mark.parametrize("way", ["batch", "vectorised"])
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_fast_paths_compute_what_the_reference_computes(
    kind: str, settings: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SETTINGS[settings]
    assert_equal_to_the_reference(kind, way, given)
    if given.get("steps", 1) == 1:  # and large weights, in pieces
        monkeypatch.setattr(stacked_weights, "_LARGE", 1)
        monkeypatch.setattr(vmap, "_LARGE", 1)
        monkeypatch.setattr(grad_sample, "_PIECE", 16)
        assert_equal_to_the_reference(kind, way, given)


def test_the_environment_turns_all_fast_paths_off() -> None:
    code = "from it3_lightning.engine import fast; print(fast.enabled(), fast.path('vmap'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "IT3_FAST": "0"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["False", "None"]


@needs_fast_paths
def test_fast_paths_are_turned_off_by_name_one_within_another() -> None:
    modules = {name: fast.path(name) for name in ("activation_cache", "grad_sample", "vmap")}
    assert modules["grad_sample"] is grad_sample
    assert modules["vmap"] is vmap
    with fast.disabled("vmap"), fast.disabled("grad_sample"):
        assert [fast.path(name) for name in modules] == [modules["activation_cache"], None, None]
        assert fast.enabled()
        with fast.disabled():
            assert not any(map(fast.enabled, [None, *modules]))
    with suppress(KeyboardInterrupt), fast.disabled():
        raise KeyboardInterrupt
    assert all(map(fast.enabled, [None, *modules]))
    with pytest.raises(ValueError, match=r"vmapp.*vmap"), fast.disabled("vmapp"):
        pass


def test_what_is_made_while_fast_paths_are_off_takes_none() -> None:
    with fast.disabled():
        assert not fast.enabled()
        assert fast.path("activation_cache") is None
        adaptations = [run("mlp", "batch", {})[0][0], run("mlp", "vectorised", {})[0][0]]
    assert [adaptation.cache_hits for adaptation in adaptations] == [0, 0]
