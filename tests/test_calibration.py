"""Quantiles of distances: numpy's, kept with the weights, and by what they were measured."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toy import IT3Net, LitNet, net, parts, quiet
from lightning.fabric.utilities.exceptions import MisconfigurationException

from it3_lightning import Idempotence
from it3_lightning.calibration import (
    Calibration,
    calibration_of,
    fingerprint,
    gate_of,
    measured_by,
)
from it3_lightning.engine import Settings
from it3_lightning.methods import MEMO, Entropy
from it3_lightning.methods.terms import l2


def distances(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 3


def taken(values: torch.Tensor, by: str = "l2") -> Calibration:
    calibration = Calibration()
    calibration.take(values, by=by)
    return calibration


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 4321])
def test_quantiles_are_those_of_numpy(count: int) -> None:
    values = distances(count)
    calibration = taken(values)
    for level in (0.0, 0.001, 0.25, 0.5, 0.9, 0.95, 0.999, 1.0):
        expected = np.quantile(values.numpy(), level)
        assert calibration.quantile(level, by="l2") == pytest.approx(expected, rel=1e-5)


def test_levels_between_those_that_are_kept_are_interpolated() -> None:
    calibration = taken(torch.linspace(0, 1, 100_001))
    assert calibration.quantile(0.95432, by="l2") == pytest.approx(0.95432, abs=1e-6)


def test_distances_that_are_not_finite_do_not_count() -> None:
    values = torch.tensor([3.0, float("nan"), 1.0, float("inf"), 2.0])
    assert taken(values).quantile(0.5, by="l2") == 2
    assert taken(values).quantile(1.0, by="l2") == 3


def test_where_nothing_could_be_measured_nothing_is_known() -> None:
    calibration = taken(torch.ones(3))
    calibration.take(torch.full((2,), float("nan")), by="l2")
    assert calibration.by == ""
    with pytest.raises(MisconfigurationException, match="they have not been measured"):
        calibration.quantile(0.5, by="l2")


def test_distances_measured_by_something_else_are_refused() -> None:
    calibration = taken(torch.ones(3), by="Idempotence, distance 'js'")
    message = "measured by Entropy; they were measured by Idempotence, distance 'js'. Run Trainer"
    with pytest.raises(MisconfigurationException, match=message):
        calibration.quantile(0.5, by="Entropy")


def test_distances_measured_with_other_weights_are_refused() -> None:
    calibration = Calibration()
    calibration.take(torch.ones(3), by="l2", weights="a")
    assert calibration.quantile(0.5, by="l2", weights="a") == 1
    with pytest.raises(MisconfigurationException, match="these weights; they were measured with o"):
        calibration.quantile(0.5, by="l2", weights="b")


def kept_as(**changes: Any) -> dict[str, Any]:
    return {**taken(torch.ones(3)).state_dict(), **changes}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("junk", "as a mapping, got str"),
        (kept_as(by=None), "names as strings, got by None"),
        (kept_as(weights=3), "got by 'l2', weights 3"),
        (kept_as(quantiles=[1.0]), r"finite quantiles \(N,\), got \[1.0\]"),
        (kept_as(quantiles=torch.ones(0)), "finite quantiles"),
        (kept_as(quantiles=torch.ones(2, 2)), "finite quantiles"),
        (kept_as(quantiles=torch.ones(2, dtype=torch.long)), "finite quantiles"),
        (kept_as(quantiles=torch.tensor([1.0, float("nan")])), "finite quantiles"),
        ({"by": "l2", "weights": ""}, "finite quantiles .*got None"),
    ],
)
def test_what_was_kept_otherwise_is_refused_and_changes_nothing(state: Any, message: str) -> None:
    calibration = taken(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        calibration.load_state_dict(state)
    assert calibration.quantile(0.5, by="l2") == 1


def test_quantiles_among_the_weights_of_another_kind_are_refused() -> None:
    calibration = Calibration()
    for state in ({}, {"name": torch.ones(3)}, {"name": torch.ones(3, dtype=torch.uint8)}):
        with pytest.raises(ValueError, match="Expected a calibration with"):
            calibration.take_former(state)


# What distances are measured by


def squared(p: Any, q: Any, scale: float = 1.0) -> Any:
    return scale * (p - q).square().sum(1)


class Scaled:
    """A distance with a parameter."""

    def __init__(self, scale: Any) -> None:
        self.scale = scale

    def __call__(self, p: Any, q: Any) -> Any:
        return squared(p, q) * self.scale


def made(scale: float) -> Any:
    """Return a function of the same name as all others that are made here."""

    def own(p: Any, q: Any) -> Any:
        return squared(p, q, scale)

    return own


def made_class(scale: float) -> Any:
    """Return an instance of a class of the same name as all others that are made here."""

    class Own:
        def __call__(self, p: Any, q: Any) -> Any:
            return squared(p, q, scale)

    return Own()


DISTANCES: dict[str, tuple[Any, Any, Any]] = {  # the second is as the first, the third is not
    "partial": (
        partial(squared, scale=2.0),
        partial(squared, scale=2.0),
        partial(squared, scale=3.0),
    ),
    "lambda": (lambda p, q: squared(p, q), lambda p, q: squared(p, q), lambda p, q: squared(q, p)),
    "constant in a lambda": (
        lambda p, q: 2 * squared(p, q),
        lambda p, q: 2 * squared(p, q),
        lambda p, q: 3 * squared(p, q),
    ),
    "closure": (made(2.0), made(2.0), made(3.0)),
    "instance": (Scaled(2.0), Scaled(2.0), Scaled(3.0)),
    "instance with a tensor": (
        Scaled(torch.ones(2)),
        Scaled(torch.ones(2)),
        Scaled(torch.tensor([1.0, 2.0])),
    ),
    "instance with an array": (
        Scaled(np.arange(5000)),
        Scaled(np.arange(5000)),
        Scaled(np.where(np.arange(5000) == 2500, 0, np.arange(5000))),
    ),
    "instance of a local class": (made_class(2.0), made_class(2.0), made_class(3.0)),
    "method": (Scaled(2.0).__call__, Scaled(2.0).__call__, Scaled(3.0).__call__),
    "module": (
        torch.nn.PairwiseDistance(1.0),
        torch.nn.PairwiseDistance(1.0),
        torch.nn.PairwiseDistance(2.0),
    ),
    "partial of a built-in": (
        partial(torch.cosine_similarity, dim=1),
        partial(torch.cosine_similarity, dim=1),
        partial(torch.cosine_similarity, dim=2),
    ),
    "method of a test-time method": (Idempotence("js"), Idempotence("js"), Idempotence("l1")),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_that_differ_in_a_parameter_have_other_names(name: str) -> None:
    first, same, other = (measured_by(Idempotence(d), "source") for d in DISTANCES[name])
    assert first == same
    assert first != other


def test_what_a_distance_is_measured_by_is_its_name() -> None:
    assert measured_by(Idempotence("js", reliability=0.1, balance=1.0), "source") == (
        "Idempotence, distance 'js', norm_stats 'source'"
    )
    assert measured_by(Entropy(), "batch") == "Entropy, norm_stats 'batch'"
    assert measured_by(Idempotence(squared), "source").startswith("Idempotence, distance 'squared#")
    assert measured_by(MEMO(views=3), "source") == (
        "MEMO, views 3, augment None, norm_stats 'source'"
    )


def test_a_name_is_the_same_in_another_process() -> None:
    code = (
        "from functools import partial; from it3_lightning import Idempotence; "
        "from it3_lightning.calibration import measured_by; "
        "from it3_lightning.methods.terms import l2; "
        "print(measured_by(Idempotence(partial(l2)), 'source'), end='')"
    )
    here = measured_by(Idempotence(partial(l2)), "source")
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        )
        assert run.stdout == here


class Slots:
    """A distance that has a parameter, and no way to see it."""

    __slots__ = ("scale",)

    def __call__(self, p: Any, q: Any) -> Any:
        return squared(p, q)


def test_a_distance_that_cannot_be_told_from_others_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"cannot tell .*Slots.* from others"):
        measured_by(Idempotence(Slots()), "source")


# Which weights


def test_every_weight_and_statistic_has_a_part_in_the_fingerprint() -> None:
    model = net()
    before = fingerprint(model)
    assert fingerprint(net()) == before
    state = model.state_dict()
    assert {"net.bn.running_var", "it3_conditioning.embedders.net-dense.last.bias"} <= state.keys()
    for name, value in state.items():
        if value.is_floating_point():
            kept = value.clone()
            value.view(-1)[0].add_(1)
            assert fingerprint(model) != before, name
            value.copy_(kept)
    assert fingerprint(model) == before


def test_a_fingerprint_covers_tensors_of_every_kind() -> None:
    kinds = [torch.bfloat16, torch.complex64, torch.complex128, torch.float64]
    module = torch.nn.ParameterList([torch.ones(1, dtype=kind) for kind in kinds])
    module.register_buffer("row", torch.ones(1).expand(1).clone())  # its stride is 0
    seen = {fingerprint(module)}
    for value in (*module, module.row):
        value.data.mul_(2)
        seen.add(fingerprint(module))
    assert len(seen) == 6


def test_a_fingerprint_does_not_depend_on_what_leaves_the_values_as_they_are() -> None:
    model, before = net(), fingerprint(net())
    model.net.bn.num_batches_tracked.add_(1)
    model.register_buffer("cache", torch.ones(1), persistent=False)
    model.requires_grad_(False).eval()
    assert fingerprint(model) == before
    assert fingerprint(model.double()) == before
    assert fingerprint(model.half()) != before


# In checkpoints


def saved(path: Path, model: Any) -> Path:
    trainer = quiet()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def without(path: Path, prefix: str) -> Path:
    """Write the checkpoint again without the keys that start so."""
    checkpoint = torch.load(path, weights_only=True)
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {k: v for k, v in weights.items() if not k.startswith(prefix)}
    assert len(checkpoint["state_dict"]) < len(weights)
    torch.save(checkpoint, path)
    return path


def test_checkpoint_brings_the_quantiles_back(tmp_path: Path) -> None:
    model = net()
    model.it3_calibration.take(distances(100), by="l2", weights=fingerprint(model))
    path = saved(tmp_path / "with.ckpt", model)
    loaded = IT3Net.load_from_checkpoint(path, **parts(), weights_only=True)
    assert torch.equal(loaded.it3_calibration.quantiles, model.it3_calibration.quantiles)
    assert loaded.it3_calibration.by == "l2"
    assert loaded.it3_calibration.weights == fingerprint(loaded)


def test_checkpoint_of_another_version_or_of_a_plain_module_still_loads(tmp_path: Path) -> None:
    path = without(saved(tmp_path / "without.ckpt", net()), "it3_")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["it3"]
    torch.save(checkpoint, path)
    loaded = IT3Net.load_from_checkpoint(path, **parts(), weights_only=True)
    assert torch.equal(loaded.net.head.weight, net().net.head.weight)
    assert loaded.it3_calibration.by == ""


def former(by: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What version 0.1.0 kept among the weights."""
    levels = torch.linspace(0, 1, 1001)
    letters = list(by.encode()[:128].ljust(128, b"\0"))
    return {
        "it3_calibration.quantiles": values.quantile(levels),
        "it3_calibration.name": torch.tensor(letters, dtype=torch.uint8),
    }


def test_quantiles_kept_among_the_weights_are_those_of_these_weights() -> None:
    model, by, values = net(), "Idempotence, distance 'l2', norm_stats 'source'", distances(100)
    model.load_state_dict({**model.state_dict(), **former(by, values)})
    settings = Settings()
    assert gate_of(model, settings, 0.9) == pytest.approx(np.quantile(values.numpy(), 0.9))
    model.net.head.weight.data.add_(1)
    with pytest.raises(MisconfigurationException, match="measured with others"):
        gate_of(model, settings, 0.9)


def test_former_names_that_could_mean_several_distances_are_refused() -> None:
    model, by = net(), "Idempotence, distance 'squared', norm_stats 'source'"
    model.load_state_dict({**model.state_dict(), **former(by, distances(100))})
    with pytest.raises(MisconfigurationException, match=r"they were measured by .*'squared'"):
        gate_of(model, Settings(objective=Idempotence(squared)), 0.9)


def test_checkpoint_that_lacks_more_than_the_quantiles_is_refused(tmp_path: Path) -> None:
    path = without(saved(tmp_path / "broken.ckpt", net()), "it3_conditioning.embedders.net-dense.l")
    with pytest.raises(RuntimeError, match=r"Missing key.*it3_conditioning\.embedders"):
        IT3Net.load_from_checkpoint(path, **parts(), weights_only=True)


def test_module_without_a_place_for_quantiles_is_told_of_one() -> None:
    with pytest.raises(MisconfigurationException, match="LitNet has no place for them"):
        calibration_of(LitNet())


# Distances to bet against


def test_distances_to_bet_against_are_plain_data_that_comes_back() -> None:
    calibration, values = Calibration(), torch.tensor([3.0, float("nan"), 1.0, 2.0])
    calibration.take_reference(values, by="l2", weights="a")
    calibration.take(values, by="js")  # a gate of its own
    again = Calibration()
    again.load_state_dict(calibration.state_dict())
    assert again.bet(by="l2", weights="a").reference.tolist() == [1.0, 2.0, 3.0]
    assert again.quantile(0.5, by="js") == 2
    with pytest.raises(MisconfigurationException, match="by js; they were measured by l2"):
        again.bet(by="js", weights="a")
    with pytest.raises(MisconfigurationException, match="these weights; they were measured with o"):
        again.bet(by="l2", weights="b")


def test_where_nothing_could_be_measured_there_is_no_bet() -> None:
    calibration = Calibration()
    calibration.take_reference(torch.ones(3), by="l2", weights="a")
    calibration.take_reference(torch.full((2,), float("nan")), by="l2", weights="a")
    with pytest.raises(MisconfigurationException, match="they have not been measured"):
        calibration.bet(by="l2", weights="a")


@pytest.mark.parametrize("reference", [3, {"by": "l2"}, {"distances": torch.tensor([1, 2])}])
def test_a_reference_that_is_something_else_is_refused(reference: Any) -> None:
    state = {**taken(torch.ones(3)).state_dict(), "reference": reference}
    with pytest.raises(ValueError, match=r"with (a reference as a dict|finite distances)"):
        Calibration().load_state_dict(state)
