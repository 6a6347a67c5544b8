"""Evidence under a Trainer: source data are measured in a validation, and kept with weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.method_runs import Validates
from helpers.reference import softmax_label
from helpers.toy import differing, everything, loader, parts, quiet, samples, seeded
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import (
    EATA,
    Idempotence,
    IT3Mixin,
    IT3Predictor,
    IT3TestTimeCallback,
    Tent,
    TestTimeCallback,
)
from it3_lightning.engine import BatchAdapter, Settings, SourceMoments, adapter

STILL: dict[str, Any] = {"norm_stats": "evidence", "steps": 0, "reset": "batch"}
SCOPES = ("batch", "sample")


class IT3Validates(IT3Mixin, Validates):
    """The same with priors."""


def plain() -> Any:
    module: Any = seeded(Validates()).eval()
    quiet().predict(module, loader(4))  # a Trainer leaves something of its own
    return module


def conditioned() -> Any:
    module: Any = seeded(IT3Validates(**parts())).eval()
    quiet().predict(module, loader(4))
    return module


def shifted() -> Tensor:
    return 2 * samples(8, seed=5)[0] + 1


def served(x: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=4)


def predicted(module: Any, callback: TestTimeCallback, x: Tensor | None = None) -> Tensor:
    given = served(shifted() if x is None else x)
    outputs: Any = quiet(callbacks=[callback]).predict(module, given)
    return torch.cat(outputs)


def by_engine(module: Any, scope: Any) -> Tensor:
    """Return what the engine predicts, which is tested against the formulas."""
    moments, settings = SourceMoments(), Settings(scope=scope, **STILL)

    def forward(x: Tensor, _: Any) -> Tensor:
        outputs: Tensor = module(x)
        return outputs

    measuring = adapter(module, forward, softmax_label, Settings(steps=0), moments=moments)
    assert isinstance(measuring, BatchAdapter)
    for x in samples(12)[0].chunk(3):
        measuring.fit_moments(x)
    found = []
    by = adapter(module, forward, softmax_label, settings, moments=moments)
    for x in shifted().chunk(2):
        with by.adapted(x) as adaptation:
            assert adaptation.outputs is not None
            found.append(adaptation.outputs)
    return torch.cat(found)


def measured(module: Any, data: Any = None, **given: Any) -> TestTimeCallback:
    callback = TestTimeCallback(Tent(), **{**STILL, **given})
    quiet(callbacks=[callback]).validate(module, data or loader(12), verbose=False)
    return callback


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("make", [plain, conditioned])
def test_predictions_are_those_of_the_engine_and_nothing_is_left_behind(
    make: Any, scope: Any
) -> None:
    module = make()
    before = everything(module)
    callback = measured(module, scope=scope)
    assert differing(before, everything(module)) == []
    found = predicted(module, callback)
    assert differing(before, everything(module)) == []
    torch.testing.assert_close(found, by_engine(module, scope), rtol=0, atol=1e-5)
    assert (found - module(shifted())).abs().max() > 0.01


@pytest.mark.parametrize("scope", SCOPES)
def test_labels_are_never_used(scope: Any) -> None:
    images, labels = samples(12)
    found = []
    for given in (labels, labels.flip(0)):
        module = plain()
        data = DataLoader(TensorDataset(images, given), batch_size=4)
        found.append(predicted(module, measured(module, data, scope=scope)))
    assert torch.equal(*found)


@pytest.mark.parametrize("scope", SCOPES)
def test_moments_travel_in_the_checkpoint_of_the_module(scope: Any, tmp_path: Path) -> None:
    module = conditioned()
    callback = measured(module, scope=scope)
    expected = predicted(module, callback)
    trainer = quiet(callbacks=[callback])
    trainer.validate(module, loader(12), verbose=False)
    trainer.save_checkpoint(tmp_path / "it3.ckpt")
    other = IT3Validates.load_from_checkpoint(
        tmp_path / "it3.ckpt", weights_only=True, **parts()
    ).eval()
    again = predicted(other, TestTimeCallback(Tent(), scope=scope, **STILL))
    assert torch.equal(again, expected)
    served_alone = IT3Predictor(other, Settings(scope=scope, objective=Idempotence(), **STILL))
    outputs = torch.cat([served_alone(x).outputs for x in shifted().chunk(2)])
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        other.net.head.bias.add_(1)
    with pytest.raises(MisconfigurationException, match=r"evidence.* has seen with other weights"):
        predicted(other, callback)
    with pytest.raises(MisconfigurationException, match="has seen none with these weights"):
        IT3Predictor(other, Settings(objective=Idempotence(), **STILL))


def test_an_untouched_module_has_its_moments_kept_in_the_callback() -> None:
    module = plain()
    callback, fresh = measured(module), TestTimeCallback(Tent(), **STILL)
    checkpoint: dict[str, Any] = {}
    callback.on_save_checkpoint(quiet(), module, checkpoint)
    fresh.on_load_checkpoint(quiet(), module, checkpoint)
    assert torch.equal(predicted(module, fresh), predicted(module, callback))


def test_moments_are_those_of_the_last_validation_of_a_fit() -> None:
    module = conditioned().train()
    callback = IT3TestTimeCallback(**STILL)
    trainer = quiet(callbacks=[callback], max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, loader(12), loader(12))
    module.eval()
    torch.testing.assert_close(
        predicted(module, callback), by_engine(module, "batch"), rtol=0, atol=1e-5
    )


def test_a_method_and_the_evidence_learn_of_the_same_source_data() -> None:
    module = plain()
    given: dict[str, Any] = {"norm_stats": "evidence", "reset": "batch", "lr": 0.01}
    callback = TestTimeCallback(EATA(), **given)
    with pytest.raises(MisconfigurationException, match="EATA must have seen source data"):
        predicted(module, callback)
    quiet(callbacks=[callback]).validate(module, loader(12), verbose=False)
    checkpoint: dict[str, Any] = {}
    callback.on_save_checkpoint(quiet(), module, checkpoint)
    assert len(checkpoint["it3_source"]) == 2
    fresh = TestTimeCallback(EATA(), **given)
    fresh.on_load_checkpoint(quiet(), module, checkpoint)
    assert torch.equal(predicted(module, fresh), predicted(module, callback))


def test_without_source_data_it_is_refused_before_any_batch() -> None:
    module = plain()
    said = r"norm_stats='evidence' must have seen source data, and has seen nothing yet\. Run Trai"
    with pytest.raises(MisconfigurationException, match=said):
        predicted(module, TestTimeCallback(Tent(), **STILL))
    assert "predict_step" not in vars(module)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="evidence' sees source data in stage 'validate'"):
        TestTimeCallback(Tent(), stages=["validate", "test"], **STILL)
    with pytest.raises(ValueError, match="gate is calibrated on the validation data that norm_st"):
        IT3TestTimeCallback(gate=0.9, norm_stats="evidence")
    module = conditioned()
    module.it3_calibration.moments = {}
    state = module.it3_calibration.state_dict()
    with pytest.raises(ValueError, match="calibration with moments as a dict, got 3"):
        module.it3_calibration.load_state_dict({**state, "moments": 3})


def test_networks_without_batch_norm_are_as_they_are_which_is_said() -> None:
    module = plain()
    module.net.bn = nn.GroupNorm(1, module.net.bn.num_features)
    expected = module(shifted()).detach()
    with pytest.warns(UserWarning, match="norm_stats='evidence' has no effect"):
        found = predicted(module, TestTimeCallback(Tent(), parameters="all", **STILL))
    torch.testing.assert_close(found, expected)


def test_layers_that_cannot_be_seen_are_named() -> None:
    module = plain()
    layer = module.net.bn
    module.net.bn = nn.Identity()
    module.net.unused = layer
    with pytest.warns(UserWarning, match="has seen no BatchNorm layer"):
        measured(module)


def test_it_is_a_line_in_a_configuration() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=TestTimeCallback)
    given = {"class_path": "it3_lightning.TestTimeCallback", "init_args": STILL}
    given["init_args"] = {**STILL, "scope": "sample"}
    made = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
    assert (made.settings.norm_stats, made.settings.scope) == ("evidence", "sample")
