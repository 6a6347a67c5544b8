"""Every kind of target from end to end: label space, training, adaptation, and a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.prior_cases import CASES, module
from helpers.reference import adapt_stream
from helpers.toy import differing, everything, quiet
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from it3_lightning import Idempotence, IT3Predictor, IT3TestTimeCallback, Settings
from it3_lightning.priors import Prior
from it3_lightning.utils.specs import built, spec

every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_targets_and_outputs_are_brought_into_label_space(name: str) -> None:
    case, prior = CASES[name], CASES[name].prior()
    model, batch = module(name), case.samples()
    target = model.it3_target(batch)
    known = None if case.known is None else case.known(target)
    found = prior.known(target)
    assert (found is None) == (known is None)
    if found is not None and known is not None:
        assert torch.equal(found, known)
    torch.testing.assert_close(prior.from_target(target), case.encode(target))
    outputs = model.it3_forward(model.it3_inputs(batch)).detach()
    labels = prior.from_output(outputs)
    torch.testing.assert_close(labels, case.label(outputs))
    assert labels.shape[1:] == prior.from_target(target).shape[1:]


@every_case
def test_outputs_come_back_from_label_space(name: str) -> None:
    case, prior = CASES[name], CASES[name].prior()
    first, second = (module(name).it3_forward(case.samples(seed=s)[0]).detach() for s in (0, 1))
    labels = case.label(first)
    again = prior.to_output(labels, first)
    assert again.shape == first.shape
    torch.testing.assert_close(case.label(again), labels)
    mean = prior.mean_output(first, second)
    assert mean.shape == first.shape
    torch.testing.assert_close(case.label(mean), (labels + case.label(second)) / 2)


@every_case
def test_perturbed_priors_keep_their_shape_and_weights_of_samples_are_positive(name: str) -> None:
    case, prior = CASES[name], CASES[name].prior()
    given = prior.from_target(module(name).it3_target(case.samples()))
    torch.manual_seed(0)
    blurred = prior.perturb(given)
    assert blurred.shape == given.shape
    assert not torch.equal(blurred, given)
    weights = prior.weights(given)
    assert weights.shape == (12,)
    assert weights.min() > 0
    assert prior.perturb(given[:1]).shape == given[:1].shape


@every_case
def test_a_prior_is_made_again_from_plain_data(name: str) -> None:
    prior = CASES[name].prior()
    described = spec(prior)
    assert described["class_path"].startswith("it3_lightning.priors.")
    again: Any = built(described, Prior)
    again.load_state_dict(prior.state_dict())
    target = module(name).it3_target(CASES[name].samples())
    assert torch.equal(again.from_target(target), prior.from_target(target))
    assert again.init_args() == prior.init_args()
    parser = ArgumentParser()
    parser.add_argument("--prior", type=Prior)
    read = parser.instantiate_classes(parser.parse_string(yaml.safe_dump({"prior": described})))
    assert type(read.prior) is type(prior)
    assert read.prior.init_args() == prior.init_args()


def predicted(model: Any, name: str, **settings: Any) -> Tensor:
    given = {"objective": Idempotence(reliability=None), "optimizer": "sgd", "lr": 0.02}
    callback = IT3TestTimeCallback(**{**given, **settings})
    batches: Any = quiet(callbacks=[callback]).predict(model, CASES[name].loader(seed=1))
    return torch.cat([model.it3_outputs(b) if not isinstance(b, Tensor) else b for b in batches])


@every_case
@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_adapted_predictions_are_those_of_the_method_in_plain_torch(name: str, scope: str) -> None:
    case, model = CASES[name], module(name)
    size = 4 if scope == "batch" else 1
    batches = torch.split(case.samples(seed=1)[0], size)

    def predict(net: nn.Module, x: Tensor, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net.predict_with(x, prior)  # type: ignore[operator]
        return outputs

    expected = adapt_stream(
        model,
        batches,
        predict=predict,
        to_label=case.label,
        lr=0.02,
        parameters=lambda parameter: parameter.startswith("net"),
    )
    found = predicted(model, name, scope=scope)
    torch.testing.assert_close(
        found, torch.cat([r.outputs for r in expected]), rtol=1e-3, atol=1e-4
    )
    moved = torch.cat([r.outputs - r.y0 for r in expected]).abs().max()
    assert moved > 10 * (found - torch.cat([r.outputs for r in expected])).abs().max()
    callback = IT3TestTimeCallback(steps=0, scope=scope, objective=Idempotence(reliability=None))
    (logged,) = quiet(callbacks=[callback]).test(model, case.loader(seed=1), verbose=False)
    distance = torch.cat([r.distance_source for r in expected]).mean().item()
    assert logged["it3/distance_source"] == pytest.approx(distance, rel=1e-4)


@every_case
def test_the_laws_hold_for_every_kind_of_target(name: str) -> None:
    case, model = CASES[name], module(name)
    inputs = case.samples(seed=1)[0]
    with torch.no_grad():  # the neutral pass is the network
        own, ordinary = model.it3_forward(inputs), model.net(inputs)
        ordinary = ordinary if isinstance(ordinary, Tensor) else model.it3_outputs(ordinary)
    assert torch.equal(own, ordinary)
    batches: Any = quiet().predict(model, case.loader(seed=1))  # off is off
    plain = torch.cat([b if isinstance(b, Tensor) else model.it3_outputs(b) for b in batches])
    assert torch.equal(predicted(model, name, steps=0), plain)
    settings = Settings(  # episodic is independent, and labels have no part in it
        objective=Idempotence(reliability=None), optimizer="sgd", lr=0.02, scope="sample"
    )
    predictor = IT3Predictor(model, settings)
    alone = torch.cat([predictor(x).outputs for x in torch.split(inputs, 1)])
    torch.testing.assert_close(predictor(inputs.flip(0)).outputs.flip(0), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(predicted(model, name, scope="sample"), alone, rtol=0, atol=1e-5)


@every_case
@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_trained_tested_predicted_and_loaded_again(name: str, train: Any, tmp_path: Path) -> None:
    case, model = CASES[name], module(name, train=train)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = quiet(max_epochs=2)
    trainer.fit(model, case.loader())
    if train == "conditioning":
        assert trainer.callback_metrics["it3/label_loss"].isfinite()
    changed = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert any(key.startswith("it3_conditioning") for key in changed)
    assert any(key.startswith("net") for key in changed) == (train == "joint")
    trainer.save_checkpoint(tmp_path / "it3.ckpt")
    quiet().test(model, case.loader(seed=1), verbose=False)
    noted = everything(model)
    for scope in ("batch", "sample"):
        callback = IT3TestTimeCallback(scope=scope)
        (logged,) = quiet(callbacks=[callback]).test(model, case.loader(seed=1), verbose=False)
        assert all(torch.tensor(value).isfinite() for value in logged.values())
    assert differing(noted, everything(model)) == []
    again = module(name, train=train)
    again.load_state_dict(torch.load(tmp_path / "it3.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(predicted(again, name), predicted(model, name))
