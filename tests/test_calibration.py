"""Quantiles of distances: numpy's, kept with the weights, and by what they were measured."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toy import IT3Net, LitNet, net, parts, quiet
from lightning.fabric.utilities.exceptions import MisconfigurationException

from it3_lightning import Idempotence
from it3_lightning.calibration import Calibration, calibration_of, measured_by
from it3_lightning.methods import Entropy


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


def test_long_names_are_told_apart_by_their_beginning() -> None:
    name = "a" * 300
    assert taken(torch.ones(3), by=name).quantile(0.5, by=name) == 1


def test_what_a_distance_is_measured_by_is_its_name() -> None:
    def own(p: Any, q: Any) -> Any:
        return (p - q).square().sum(1)

    assert measured_by(Idempotence(own), "source") == (
        "Idempotence, distance 'test_what_a_distance_is_measured_by_is_its_name.<locals>.own', "
        "norm_stats 'source'"
    )
    assert measured_by(Idempotence(partial(own)), "source") == (
        "Idempotence, distance 'partial', norm_stats 'source'"
    )
    assert measured_by(Entropy(), "batch") == "Entropy, norm_stats 'batch'"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quantiles_stay_what_they_are_when_the_module_is_cast(dtype: torch.dtype) -> None:
    values = distances(1000)
    model = net()
    model.it3_calibration.take(values, by="l2")
    before = model.it3_calibration.quantile(0.95, by="l2")
    model.to(dtype)
    assert model.net.head.weight.dtype == dtype
    assert model.it3_calibration.quantile(0.95, by="l2") == before
    assert model.it3_calibration.quantiles.dtype == torch.float32


def test_module_made_without_memory_can_be_given_some() -> None:
    with torch.device("meta"):
        calibration = Calibration()
    calibration.half().to_empty(device="cpu")
    calibration.take(torch.ones(3), by="l2")
    assert calibration.quantile(0.5, by="l2") == 1
    assert calibration.quantiles.dtype == torch.float32


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
    model.it3_calibration.take(distances(100), by="l2")
    path = saved(tmp_path / "with.ckpt", model)
    loaded = IT3Net.load_from_checkpoint(path, **parts(), weights_only=True)
    assert torch.equal(loaded.it3_calibration.quantiles, model.it3_calibration.quantiles)
    assert loaded.it3_calibration.by == "l2"


@pytest.mark.parametrize("prefix", ["it3_calibration.", "it3_"], ids=["older", "plain"])
def test_checkpoint_without_quantiles_still_loads(prefix: str, tmp_path: Path) -> None:
    path = without(saved(tmp_path / "without.ckpt", net()), prefix)
    loaded = IT3Net.load_from_checkpoint(path, **parts(), weights_only=True)
    assert torch.equal(loaded.net.head.weight, net().net.head.weight)
    assert loaded.it3_calibration.by == ""


def test_checkpoint_that_lacks_more_than_the_quantiles_is_refused(tmp_path: Path) -> None:
    path = without(saved(tmp_path / "broken.ckpt", net()), "it3_conditioning.embedders.")
    with pytest.raises(RuntimeError, match=r"Missing key.*it3_conditioning\.embedders"):
        IT3Net.load_from_checkpoint(path, **parts(), weights_only=True)


def test_module_without_a_place_for_quantiles_is_told_of_one() -> None:
    with pytest.raises(MisconfigurationException, match="LitNet has no place for them"):
        calibration_of(LitNet())
