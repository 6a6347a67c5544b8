"""Conditionings of every kind: copies, attaching, settings."""

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.conditionings import CLASSES, attached, priors
from helpers.modules import same
from torch import Tensor, nn

from it3_lightning.conditioning import (
    Conditioning,
    FeatureInjection,
    ForwardArgument,
    InputConcat,
)
from it3_lightning.priors import ClassPrior, MaskPrior, Prior


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


CONDITIONINGS: dict[str, Any] = {
    "injection": lambda: FeatureInjection("layer"),
    "concat": lambda: InputConcat("layer"),
    "argument": lambda: ForwardArgument(),
}


class Model(nn.Module):
    """Owns its conditioning and its prior, as a conditioned module does."""

    def __init__(self, conditioning: Conditioning) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)
        self.takes = nn.Linear(CLASSES, 8)
        self.it3_prior = ClassPrior(CLASSES, neutral="uniform")
        self.it3_conditioning = attached(conditioning, self, self.it3_prior)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        features: Tensor = self.layer(x)
        return features if prior is None else features + self.takes(prior)

    def conditioned(self, x: Tensor, prior: Tensor | None) -> Tensor:
        with self.it3_conditioning.given(prior):
            output: Tensor = self(x)
        return output


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_a_copy_is_conditioned_by_its_own_conditioning(kind: str, copied: Any) -> None:
    model, x, prior = Model(CONDITIONINGS[kind]()), torch.randn(5, 4), priors(5)
    given, neutral = model.conditioned(x, prior), model.conditioned(x, None)
    twin = copied(model)
    assert same([(twin.conditioned(x, prior), given), (twin.conditioned(x, None), neutral)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # the original does not reach the copy
    assert same([(twin.conditioned(x, prior), given), (twin.conditioned(x, None), neutral)])
    with pytest.raises(RuntimeError, match="never ran"), model.it3_conditioning.given(prior):
        twin(x)
    twin.it3_conditioning.attach(twin, twin.it3_prior)  # once more is not twice
    assert same([(twin.conditioned(x, prior), given)])


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_attaching_twice_is_attaching_once(kind: str) -> None:
    model, x, prior = Model(CONDITIONINGS[kind]()), torch.randn(5, 4), priors(5)
    before = model.conditioned(x, prior)
    model.it3_conditioning.attach(model, model.it3_prior)
    assert torch.equal(model.conditioned(x, prior), before)


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_one_conditioning_serves_one_network(kind: str) -> None:
    conditioning = CONDITIONINGS[kind]()
    Model(conditioning)
    with pytest.raises(ValueError, match="attached to another network already"):
        Model(conditioning)


def test_a_layer_that_is_gone_is_missed_by_the_forward_pass() -> None:
    conditioning, network = InputConcat("layer"), nn.Identity()
    Model(conditioning)
    conditioning.attach(network, ClassPrior(CLASSES))
    with pytest.raises(RuntimeError, match="never ran"), conditioning.given(priors(5)):
        network(torch.randn(5, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FeatureInjection([]),
        lambda: FeatureInjection(["a", "a"]),
        lambda: FeatureInjection(["a", "b"], mode=["add"]),
        lambda: FeatureInjection("a", mode="mix"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="Expected"):
        make()


@pytest.mark.parametrize(
    "conditioning",
    [
        FeatureInjection(["a", "b"], mode=["film", "add"], channels=7, hidden=5),
        InputConcat("a"),
        ForwardArgument("label", layer="net"),
    ],
)
def test_init_args_make_an_equal_conditioning(conditioning: Conditioning) -> None:
    again = type(conditioning)(**conditioning.init_args())
    assert again.init_args() == conditioning.init_args()
    assert again.layers == conditioning.layers


@pytest.mark.parametrize("kind", ["injection", "concat"])
def test_a_layer_that_is_compiled_later_keeps_its_conditioning(kind: str) -> None:
    model, x, prior = Model(CONDITIONINGS[kind]()), torch.randn(3, 4), priors(3)
    expected = model.conditioned(x, prior)
    model.layer = torch.compile(model.layer, backend="eager")  # type: ignore[assignment]
    model.it3_conditioning.attach(model, model.it3_prior)  # as a Trainer's run does again
    torch.testing.assert_close(model.conditioned(x, prior), expected)
    model.layer = nn.Linear(4, 8)
    with pytest.raises(ValueError, match="its layer was replaced since"):
        model.it3_conditioning.attach(model, model.it3_prior)


@pytest.mark.parametrize("kind", [*CONDITIONINGS])
def test_a_detached_one_leaves_no_hook_and_its_place_to_another(kind: str) -> None:
    model, x = Model(CONDITIONINGS[kind]()), torch.randn(3, 4)
    model.it3_conditioning.detach(model)
    layers = [*model.modules()]
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    names = [*hooks, *(f"{name}_with_kwargs" for name in hooks)]
    assert not any(getattr(layer, name) for layer in layers for name in names)
    other = FeatureInjection("layer")
    model.it3_conditioning = attached(other, model, model.it3_prior)
    for weight in other.parameters():
        nn.init.normal_(weight)
    prior = model.it3_prior.from_target(torch.tensor([0, 1, 2]))
    assert not torch.equal(model.conditioned(x, prior), model.layer(x))
    torch.testing.assert_close(model(x), model.layer(x))


class Maps(nn.Module):
    """A convolution on maps, and a forward that may take a prior and puts it out."""

    def __init__(self, conditioning: Conditioning, prior: Prior) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 5, 1)
        self.it3_prior = prior
        self.it3_conditioning = attached(conditioning, self, prior)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        features: Tensor = self.layer(x)
        return (
            features
            if prior is None
            else torch.cat([features, prior.expand(-1, -1, *x.shape[2:])], dim=1)
        )


@pytest.mark.parametrize("neutral", ["zeros", "uniform", "constant"])
@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_positions_without_a_prior_see_the_neutral_one(kind: str, neutral: Any) -> None:
    model = Maps(CONDITIONINGS[kind](), MaskPrior(CLASSES, neutral=neutral))
    x, present = torch.randn(2, 2, 4, 4), torch.rand(2, 4, 4) < 0.5
    prior = torch.randn(2, CLASSES, 4, 4).softmax(1)
    found = {}
    for name, (given, at) in {
        "all": (prior, None),
        "none": (None, None),
        "some": (prior, present),
    }.items():
        with model.it3_conditioning.given(given, at):
            found[name] = model(x)
    if kind == "argument":  # what broadcasts over positions
        flag = found["some"][:, -1]
        assert torch.equal(flag, present.float())
        fill = {"zeros": 0.0, "uniform": 1 / CLASSES, "constant": -1.0}[neutral]
        expected = torch.where(present[:, None], prior, fill)
        assert torch.equal(found["some"][:, 5:-1], expected)
        return
    expected = torch.where(present[:, None], found["all"], found["none"])
    torch.testing.assert_close(found["some"], expected)
    assert not torch.allclose(found["all"], found["none"])
