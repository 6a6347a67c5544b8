"""Priors and conditionings as plain data, and back."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from it3_lightning.conditioning import (
    Conditioning,
    FeatureInjection,
    ForwardArgument,
    InputConcat,
)
from it3_lightning.priors import ClassPrior, MaskPrior, Prior, ValuePrior
from it3_lightning.utils.specs import built, spec

PRIOR: type[Any] = Prior
CONDITIONING: type[Any] = Conditioning


class OwnPrior(ClassPrior):
    """Defined by a user."""

    def from_target(self, target: Tensor) -> Tensor:
        return super().from_target(target) / 2


DESCRIBED: dict[str, tuple[type[Any], Any]] = {
    "it3_lightning.priors.ClassPrior": (PRIOR, ClassPrior(3, neutral="uniform")),
    "it3_lightning.priors.ValuePrior": (PRIOR, ValuePrior(2, noise=0.5)),
    "it3_lightning.priors.MaskPrior": (PRIOR, MaskPrior(4, outputs="probabilities")),
    f"{__name__}.OwnPrior": (PRIOR, OwnPrior(5)),
    "it3_lightning.conditioning.FeatureInjection": (
        CONDITIONING,
        FeatureInjection(["a", "b"], mode=["add", "film"]),
    ),
    "it3_lightning.conditioning.InputConcat": (CONDITIONING, InputConcat("stem")),
    "it3_lightning.conditioning.ForwardArgument": (CONDITIONING, ForwardArgument("label")),
}


@pytest.mark.parametrize("path", DESCRIBED)
def test_objects_become_plain_data_and_come_back(path: str) -> None:
    kind, value = DESCRIBED[path]
    data = json.loads(json.dumps(spec(value)))
    assert data["class_path"] == path
    again = built(data, kind)
    assert again is not None
    assert type(again) is type(value)
    assert again.init_args() == value.init_args()


@pytest.mark.parametrize(
    "path",
    [
        "it3_lightning.ClassPrior",
        "it3_lightning.priors.ClassPrior",
        f"{ClassPrior.__module__}.ClassPrior",
    ],
)
def test_every_path_that_exports_a_class_names_it(path: str) -> None:
    found = built({"class_path": path, "init_args": {"num_classes": 3}}, PRIOR)
    assert isinstance(found, ClassPrior)


def test_a_class_within_a_class_goes_by_where_it_is_defined() -> None:
    class Local(ClassPrior):
        pass

    data = spec(Local(4))
    assert data["class_path"].endswith("<locals>.Local")
    assert isinstance(built(data, PRIOR), Local)


def test_objects_and_nothing_pass() -> None:
    prior = ClassPrior(3)
    assert built(prior, PRIOR) is prior
    assert built(None, PRIOR) is None
    for value in (None, 3, "text", {"class_path": "x"}, ClassPrior):
        assert spec(value) is value


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (
            {"class_path": "it3_lightning.priors.ClassPrio"},
            PRIOR,
            "Unknown Prior .* Did you mean 'it3_lightning.priors.ClassPrior'.*Import its module",
        ),
        ({"class_path": "os.system", "init_args": {"command": "true"}}, PRIOR, "Unknown Prior"),
        (spec(InputConcat("stem")), PRIOR, "Unknown Prior .*InputConcat"),
        (InputConcat("stem"), PRIOR, "Expected a Prior, got InputConcat"),
        (ClassPrior(3), CONDITIONING, "Expected a Conditioning, got ClassPrior"),
        ("ClassPrior", PRIOR, "Expected a Prior, got str: 'ClassPrior'"),
    ],
)
def test_what_is_something_else_is_refused(value: Any, kind: type[Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        built(value, kind)


def test_a_prior_of_values_needs_its_state_too() -> None:
    prior = ValuePrior(mean=3.0, std=2.0)
    again = built(spec(prior), PRIOR)
    assert isinstance(again, ValuePrior)
    assert not again.fitted
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again.from_target(torch.ones(1)), prior.from_target(torch.ones(1)))
