"""A callback that adapts as calibration chose: what it takes from a checkpoint, what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toy import (
    LitNet,
    adapting,
    differing,
    everything,
    loader,
    net,
    predicted,
    quiet,
    seeded,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException

from it3_lightning import IT3TestTimeCallback, Tent, TestTimeCallback
from it3_lightning.calibration import Calibration, fingerprint

PUBLISHED = {"class_path": "it3_lightning.methods.Idempotence", "init_args": {"reliability": None}}
STEP = {"objective": PUBLISHED, "optimizer": "sgd", "lr": 0.05}
TENT = {"objective": {"class_path": "it3_lightning.methods.Tent", "init_args": {}}, "lr": 0.1}
NOTHING = {"steps": 0, "measure": False}
NONE = r"No policy has been chosen for this module\. Run it3 calibrate"


def policy(module: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": "chosen", "weights": fingerprint(module), "arguments": arguments}


def with_policy(arguments: dict[str, Any]) -> Any:
    module = net()
    module.it3_calibration.policy = policy(module, arguments)
    return module


def written(file: Path, module: Any, arguments: dict[str, Any]) -> Path:
    """A checkpoint with a policy, as plain data."""
    calibration = Calibration()
    calibration.policy = policy(module, arguments)
    torch.save({"it3": {"calibration": calibration.state_dict()}}, file)
    return file


def test_a_calibrated_callback_predicts_as_the_policy_says() -> None:
    callback = IT3TestTimeCallback(policy="calibrated")
    found = predicted(with_policy(STEP), callback)
    assert torch.equal(found, predicted(net(), adapting()))
    assert not torch.equal(found, predicted(net()))
    assert callback.settings.lr == 0.05


def test_a_policy_that_adapts_nothing_is_no_callback_bit_for_bit() -> None:
    module = with_policy(NOTHING)
    plain, before = predicted(module), everything(module)
    found = predicted(module, IT3TestTimeCallback(policy="calibrated"))
    assert differing(before, everything(module)) == []
    assert torch.equal(found, plain)


def test_each_run_asks_the_module_it_has() -> None:
    callback = TestTimeCallback(policy="calibrated")
    first = predicted(with_policy(STEP), callback)
    second = predicted(with_policy(NOTHING), callback)
    assert torch.equal(second, predicted(net()))
    assert torch.equal(first, predicted(with_policy(STEP), callback))


def test_a_policy_comes_with_the_checkpoint_of_a_run(tmp_path: Path) -> None:
    module, path = with_policy(STEP), tmp_path / "model.ckpt"
    trainer = quiet()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    fresh = net()
    seeded(fresh, seed=1)
    run = quiet(callbacks=[IT3TestTimeCallback(policy="calibrated")])
    found: Any = run.predict(fresh, loader(), ckpt_path=path, weights_only=True)
    assert torch.equal(torch.cat(found), predicted(net(), adapting()))


def test_a_module_without_priors_follows_the_file(tmp_path: Path) -> None:
    module = seeded(LitNet())
    path = written(tmp_path / "plain.ckpt", module, TENT)
    callback = TestTimeCallback.from_checkpoint(path, stages=["predict"])
    assert isinstance(callback.settings.objective, Tent)
    assert callback.stages == ("predict",)
    explicit = predicted(seeded(LitNet()), TestTimeCallback(Tent(), lr=0.1))
    assert torch.equal(predicted(module, callback), explicit)
    assert not torch.equal(explicit, predicted(seeded(LitNet())))


def test_without_a_policy_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=NONE):
        predicted(net(), IT3TestTimeCallback(policy="calibrated"))
    with pytest.raises(MisconfigurationException, match=NONE):
        predicted(LitNet(), TestTimeCallback(policy="calibrated"))
    torch.save({"state_dict": {}}, tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"with a policy, got one without: .*none\.ckpt"):
        IT3TestTimeCallback.from_checkpoint(tmp_path / "none.ckpt")


def test_a_policy_for_other_weights_is_refused(tmp_path: Path) -> None:
    module = with_policy(STEP)
    path = written(tmp_path / "own.ckpt", module, STEP)
    with torch.no_grad():
        module.net.head.bias += 1e-3
    for callback in (
        IT3TestTimeCallback(policy="calibrated"),
        IT3TestTimeCallback.from_checkpoint(path),
    ):
        with pytest.raises(MisconfigurationException, match="'chosen' was chosen for other weig"):
            predicted(module, callback)


# What nobody said


def test_without_settings_the_policy_of_the_checkpoint_is_followed() -> None:
    callback = IT3TestTimeCallback()
    found = predicted(with_policy(STEP), callback)
    assert torch.equal(found, predicted(net(), adapting()))
    assert callback.summary.policy == "chosen"
    assert str(callback.summary).startswith("calibrated policy 'chosen': 12 samples, ")


def test_without_settings_and_a_policy_nothing_is_adapted_and_the_run_says_so() -> None:
    callback, module = IT3TestTimeCallback(), net()
    with pytest.warns(UserWarning, match=r"Nothing was adapted\. No policy has been chosen"):
        found = predicted(module, callback)
    assert torch.equal(found, predicted(net()))
    measured = IT3TestTimeCallback(steps=0)
    predicted(net(), measured)
    assert torch.equal(callback.summary.distances[0], measured.summary.distances[0])
    assert str(callback.summary).startswith("12 samples, 0 moved the weights")
    assert callback.summary.policy == ""


def test_without_settings_a_policy_for_other_weights_is_not_followed() -> None:
    module = with_policy(STEP)
    with torch.no_grad():
        module.net.head.bias += 1e-3
    plain = predicted(module)
    with pytest.warns(UserWarning, match="'chosen' was chosen for other weights than these"):
        assert torch.equal(predicted(module, IT3TestTimeCallback()), plain)


def test_a_callback_without_settings_follows_each_module_and_forgets_the_former() -> None:
    callback = IT3TestTimeCallback()
    predicted(with_policy(STEP), callback)
    with pytest.warns(UserWarning, match="Nothing was adapted"):
        assert torch.equal(predicted(net(), callback), predicted(net()))
    assert callback.summary.policy == ""
    assert torch.equal(predicted(with_policy(STEP), callback), predicted(net(), adapting()))


@pytest.mark.parametrize(
    "said", [{"steps": 1}, {"norm_stats": "source"}, {"prediction": "second"}, {"measure": False}]
)
def test_any_argument_that_says_how_to_adapt_goes_before_a_policy(said: dict[str, Any]) -> None:
    callback = IT3TestTimeCallback(**said)
    found = predicted(with_policy({"steps": 0, "prediction": "mean"}), callback)
    assert torch.equal(found, predicted(net(), IT3TestTimeCallback(**said)))
    assert (callback.settings.steps, callback.summary.policy) == (1, "")


def test_arguments_that_do_not_say_how_to_adapt_leave_it_to_the_policy() -> None:
    callback = IT3TestTimeCallback(stages=["predict"], independent_ranks=True)
    assert torch.equal(predicted(with_policy(STEP), callback), predicted(net(), adapting()))


def test_what_says_how_to_adapt_beside_a_policy_is_refused() -> None:
    for given, name in (
        ({"lr": 0.1}, "lr"),
        ({"steps": 1}, "steps"),
        ({"objective": Tent()}, "method"),
        ({"gate": 0.9}, "gate"),
        ({"grad_clip": 1.0}, "grad_clip"),
        ({"prediction": "second"}, "prediction"),
    ):
        with pytest.raises(ValueError, match=f"says how to adapt, and so does {name}. Leave out"):
            IT3TestTimeCallback(policy="calibrated", **given)
    with pytest.raises(ValueError, match="policy 'calibrated' or None, got 'best'"):
        IT3TestTimeCallback(policy="best")


@pytest.mark.parametrize("wrong", [{"name": "x"}, {"name": 1, "weights": "", "arguments": {}}])
def test_a_damaged_policy_is_refused(wrong: dict[str, Any]) -> None:
    calibration = Calibration()
    with pytest.raises(ValueError, match="a calibration with a policy of"):
        calibration.load_state_dict({**calibration.state_dict(), "policy": wrong})
    with pytest.raises(ValueError, match="a calibration with a policy as a dict"):
        calibration.load_state_dict({**calibration.state_dict(), "policy": "best"})
