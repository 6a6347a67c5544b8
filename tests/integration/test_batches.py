"""Where batches of all shapes keep their inputs and their target."""

import copy
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from it3_lightning.integration.batches import called_on, inputs_of, target_of, with_inputs


@dataclass
class Record:
    weight: float
    image: str
    label: str


@dataclass(frozen=True)
class Frozen:
    label: str
    x: str


class Pair(NamedTuple):
    target: str
    features: str


class Unnamed(NamedTuple):
    a: str
    b: str


class Graph:
    """An object with attributes, as graph libraries have them."""

    def __init__(self) -> None:
        self.x, self.y, self.edges = "in", "out", [1]


BATCHES: dict[str, Any] = {
    "tuple": ("in", "out"),
    "list": ["in", "out"],
    "longer": ("in", "out", "more"),
    "dict": {"label": "out", "image": "in", "id": 7},
    "ordered": OrderedDict(y="out", x="in"),
    "dataclass": Record(1.0, "in", "out"),
    "frozen dataclass": Frozen("out", "in"),
    "named tuple": Pair("out", "in"),
    "named tuple by position": Unnamed("in", "out"),
    "object": Graph(),
    "namespace": SimpleNamespace(input="in", target="out"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_inputs_and_target_are_found(name: str) -> None:
    assert inputs_of(BATCHES[name]) == "in"
    assert target_of(BATCHES[name]) == "out"


@pytest.mark.parametrize("name", BATCHES)
def test_inputs_are_replaced_in_a_copy(name: str) -> None:
    batch = copy.deepcopy(BATCHES[name])
    changed = with_inputs(batch, "new")
    assert type(changed) is type(batch)
    assert (inputs_of(changed), target_of(changed)) == ("new", "out")
    assert inputs_of(batch) == "in"
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        assert list(changed)[1:] == list(batch)[1:]


def test_a_tensor_is_its_own_inputs() -> None:
    x = torch.ones(2)
    assert inputs_of(x) is x
    assert with_inputs(x, "new") == "new"


def test_inputs_alone_have_no_target() -> None:
    assert inputs_of(["in"]) == "in"
    assert with_inputs(("in",), "new") == ("new",)
    for batch in (["in"], torch.ones(2), {"image": "in"}, SimpleNamespace(x="in")):
        with pytest.raises(ValueError, match=r"Cannot find the target .* it3_target\(batch\)"):
            target_of(batch)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ((), "type tuple with 0 entries"),
        ({"voltage": 1}, "type dict with voltage"),
        (SimpleNamespace(voltage=1), "type SimpleNamespace with no fields"),
        (namedtuple("Only", "label")("out"), "type Only with label"),
        (3, "type int with no fields"),
    ],
)
def test_a_batch_without_inputs_says_what_it_has(batch: Any, got: str) -> None:
    for look in (inputs_of, lambda b: with_inputs(b, "new")):
        with pytest.raises(ValueError, match=rf"Cannot find the inputs of a batch of {got}\."):
            look(batch)


def test_a_name_goes_before_a_place() -> None:
    assert inputs_of({"y": 1, "inputs": 2, "x": 3}) == 2


TOKENS = {"input_ids": "in", "attention_mask": "mask", "labels": "out", "idx": 3}


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_arguments_of_transformers_are_inputs_together(kind: Any) -> None:
    batch = kind(TOKENS)
    assert inputs_of(batch) == {"input_ids": "in", "attention_mask": "mask"}
    assert target_of(batch) == "out"
    changed = with_inputs(batch, {"input_ids": "new", "attention_mask": "mask"})
    assert type(changed) is kind
    assert dict(changed) == {**TOKENS, "input_ids": "new"}
    assert dict(batch) == TOKENS


@pytest.mark.parametrize("name", ["pixel_values", "input_ids", "input_values", "input_features"])
def test_one_argument_of_transformers_is_an_input_by_itself(name: str) -> None:
    batch = {name: "in", "labels": "out"}
    assert inputs_of(batch) == "in"
    assert with_inputs(batch, "new") == {name: "new", "labels": "out"}
    assert inputs_of({**batch, "image": "other"}) == "other"


def test_a_batch_whose_inputs_are_not_found_names_the_methods_to_override() -> None:
    with pytest.raises(ValueError, match=r"it3_target\(batch\) .*it3_with_inputs\(batch, inputs\)"):
        with_inputs({"tokens": "in", "label": "out"}, "new")


def test_arguments_are_given_by_name_where_forward_takes_them() -> None:
    class Named(nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            return input_ids, attention_mask

    class Spread(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return inputs

    class Whole(nn.Module):
        def forward(self, batch: Any) -> Any:
            return batch

    inputs = inputs_of(TOKENS)
    assert called_on(Named(), inputs) == ("in", "mask")
    assert called_on(Spread(), inputs) == inputs
    assert called_on(Whole(), inputs) == inputs
    assert called_on(Named(), {"first": 1}) == ({"first": 1}, None)
    assert called_on(Named(), ["in", "mask"]) == ("in", "mask")
