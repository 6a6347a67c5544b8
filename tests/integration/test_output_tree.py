"""What ``forward`` returns: answers have its structure and types, whatever that is."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers.toy import Batch, IT3Net, adapting, doubles, loader, net, quiet
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from it3_lightning import LAME, IT3TestTimeCallback, TestTimeCallback

BACKENDS = ["loop", "vectorised"]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def each(backend: str = "loop", **settings: Any) -> IT3TestTimeCallback:
    return adapting(scope="sample", backend=backend, **settings)


def together(model: Any, callback: TestTimeCallback) -> list[Any]:
    """What the step returned for batches of four."""
    predicted: Any = quiet(callbacks=[callback]).predict(model, loader())
    return list(predicted)


def alone(model: Any) -> Tensor:
    """What scope ``"batch"`` predicts in batches of one."""
    predicted: Any = quiet(callbacks=[adapting()]).predict(model, loader(batch=1))
    return torch.cat(list(predicted))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Output:
    logits: Tensor
    extra: dict[str, Tensor]
    name: str = "toy"


@dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor
    pair: Pair


class Result(Mapping[str, Tensor]):
    """A mapping of its own."""

    def __init__(self, **items: Tensor) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Tensor:
        return self.items_[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.items_ = {**self.items_, key: value}

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


STRUCTURES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict": (lambda y: {"logits": y, "label": y.argmax(1)}, lambda r: r["logits"]),
    "ordered": (lambda y: OrderedDict(b=y.exp(), a=y), lambda r: r["a"]),
    "tuple": (lambda y: (y, [y.exp(), None], "name"), lambda r: r[0]),
    "named tuple": (lambda y: Pair(y, y.exp()), lambda r: r.logits),
    "dataclass": (lambda y: Output(y, {"exp": y.exp()}), lambda r: r.logits),
    "frozen": (lambda y: Frozen(y, Pair(y.exp(), y[:, :1])), lambda r: r.logits),
    "mapping": (lambda y: Result(logits=y, half=y / 2), lambda r: r["logits"]),
    "halves": (lambda y: {"y": y, "half": y.bfloat16(), "big": y.argmax(1)}, lambda r: r["y"]),
}


def structured(name: str) -> tuple[Any, list[Any]]:
    make, pick = STRUCTURES[name]

    class Structured(IT3Net):
        def forward(self, x: Tensor) -> Any:
            return make(super().forward(x))

        def it3_forward(self, inputs: Any) -> Tensor:
            return pick(self(inputs))

        def predict_step(self, batch: Batch, batch_idx: int) -> int:  # type: ignore[override]
            kept.append(self(batch[0]))
            return batch_idx

    kept: list[Any] = []
    return net(Structured), kept


def tensors(value: Any) -> list[Any]:
    """What is in a structure, depth first."""
    if isinstance(value, Tensor | str | None):
        return [value]
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    elif not isinstance(value, tuple | list):
        value = [getattr(value, field) for field in value.__dataclass_fields__]
    return [leaf for item in value for leaf in tensors(item)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_answer_has_the_structure_and_types_that_forward_returns(name: str, backend: str) -> None:
    make, pick = STRUCTURES[name]
    model, answers = structured(name)
    together(model, each(backend))
    for answer, expected in zip(answers, torch.split(alone(net()), 4), strict=True):
        close(pick(answer), expected)
        built = make(pick(answer))
        assert type(answer) is type(built)
        for leaf, same in zip(tensors(answer), tensors(built), strict=True):
            if isinstance(same, Tensor):
                assert leaf.dtype == same.dtype
                torch.testing.assert_close(leaf, same, rtol=0, atol=1e-9)
                assert not leaf.requires_grad
            else:
                assert leaf == same


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalar_in_the_answer_is_the_mean_over_the_samples(backend: str) -> None:
    class WithLoss(IT3Net):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return {"logits": logits, "penalty": logits.square().mean(), "two": torch.tensor(2)}

        def it3_forward(self, inputs: Any) -> Tensor:
            logits: Tensor = self(inputs)["logits"]
            return logits

    for answer in together(net(WithLoss), each(backend)):
        assert answer["penalty"].shape == ()
        close(answer["penalty"], answer["logits"].square().mean())
        assert torch.equal(answer["two"], torch.tensor(2))
    source = together(net(WithLoss), each(steps=0))
    plain: Any = quiet().predict(net(WithLoss), loader())
    for ours, theirs in zip(source, plain, strict=True):
        assert torch.equal(ours["penalty"], theirs["penalty"])


def returning(make: Callable[[Tensor], Any]) -> Any:
    class Returning(IT3Net):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return logits, make(logits)

        def it3_forward(self, inputs: Any) -> Tensor:
            logits: Tensor = self(inputs)[0]
            return logits

    return net(Returning)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda y: y.new_zeros(3, 8), ValueError, r"shape \(3, 8\) for 1 sample"),
        (lambda y: torch.distributions.Normal(y, 1.0), TypeError, "returned a Normal, of which"),
        (lambda y: y.detach().sum().item(), ValueError, "differs outside of tensors, such as"),
        (
            lambda y: (100 * y).sum().long(),
            ValueError,
            "an integer without a dimension of samples",
        ),
    ],
    ids=["no samples", "distribution", "number", "integer"],
)
def test_answer_that_cannot_be_told_by_sample_is_refused(
    make: Any, error: type[Exception], message: str
) -> None:
    model = returning(make)
    with pytest.raises(error, match=message):
        together(model, each())
    assert {"predict_step", "forward", "it3_given"} & set(vars(model)) == set()
    together(model, each(steps=0))  # then it is all the module's own


# Which of them is the prediction


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """Mapping and dataclass at once, as in Hugging Face's transformers."""

    loss: Any = None
    logits: Any = None
    states: Any = None

    def __post_init__(self) -> None:
        for name in ("loss", "logits", "states"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


PREDICTIONS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "logits": (lambda y: {"logits": y, "label": y.argmax(1)}, lambda r: r["logits"]),
    "out": (lambda y: OrderedDict(aux=y.exp(), out=y), lambda r: r["out"]),
    "prediction": (lambda y: {"prediction": y, "x": y.exp()}, lambda r: r["prediction"]),
    "only one": (lambda y: (y, None, y.mean()), lambda r: r[0]),
    "named tuple": (lambda y: Pair(y, y.exp()), lambda r: r.logits),
    "dataclass": (lambda y: Output(y, {"exp": y.exp()}), lambda r: r.logits),
    "frozen": (lambda y: Frozen(y, Pair(y.exp(), y[:, :1])), lambda r: r.logits),
    "model output": (lambda y: ModelOutput(logits=y, states=y.exp()), lambda r: r["logits"]),
}


def picked(make: Callable[[Tensor], Any], **methods: Any) -> tuple[Any, list[Any]]:
    class Returns(IT3Net):
        def forward(self, x: Tensor) -> Any:
            return make(super().forward(x))

        def predict_step(self, batch: Batch, batch_idx: int) -> int:  # type: ignore[override]
            kept.append(self(batch[0]))
            return batch_idx

    kept: list[Any] = []
    return net(type("Returns", (Returns,), methods)), kept


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("prediction", ["first", "second", "mean"])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_prediction_is_found_in_every_structure(name: str, prediction: Any, scope: Any) -> None:
    make, pick = PREDICTIONS[name]
    model, answers = picked(make)
    settings = {"scope": scope, "prediction": prediction, "backend": "loop"}
    together(model, adapting(**settings))
    for answer, expected in zip(answers, together(net(), adapting(**settings)), strict=True):
        close(pick(answer), expected)
        assert type(answer) is type(make(expected))
        if isinstance(answer, ModelOutput):
            assert answer.logits is answer["logits"]


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_the_module_says_which_tensor_is_its_prediction(scope: Any) -> None:
    def it3_outputs(self: Any, returned: Any) -> Tensor:
        found: Tensor = returned[1]["scores"]
        return found

    model, answers = picked(lambda y: (y.exp(), {"scores": y}), it3_outputs=it3_outputs)
    settings = {"scope": scope, "prediction": "mean", "backend": "loop"}
    together(model, adapting(**settings))
    for answer, expected in zip(answers, together(net(), adapting(**settings)), strict=True):
        close(answer[1]["scores"], expected)


def test_a_method_that_predicts_answers_in_the_structure_of_forward() -> None:
    class Both(IT3Net):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return {"logits": logits, "size": x.flatten(1)}

    def predicted_by(kind: Any) -> Any:
        return together(net(kind), TestTimeCallback(LAME()))

    for answer, expected in zip(predicted_by(Both), predicted_by(IT3Net), strict=True):
        assert torch.equal(answer["logits"], expected)
        assert answer["size"].shape == (4, 16)


@pytest.mark.parametrize(
    ("make", "methods", "message"),
    [
        (lambda y: (y, y.exp()), {}, r"(?s)a tuple of .*def it3_outputs.*return returned\[0\]"),
        (lambda y: {"n": y.mean()}, {}, r"(?s)a dict of 'n' \(\).*it3_outputs"),
        (
            lambda y: {"scores": y, "logits": y.exp()},
            {"it3_forward": lambda self, x: self(x)["scores"]},
            r"(?s)takes its prediction .* in it3_forward.*right:  def it3_outputs",
        ),
        (
            lambda y: {"scores": y},
            {"it3_outputs": lambda _, returned: returned["scores"] + 0},
            "Expected it3_outputs.returned. to return one of the tensors",
        ),
    ],
)
def test_outputs_of_which_none_can_be_told_are_refused(
    make: Any, methods: Any, message: str
) -> None:
    model, _ = picked(make, **methods)
    with pytest.raises(MisconfigurationException, match=message):
        together(model, adapting(prediction="mean"))


@pytest.mark.parametrize("method", [None, LAME()])
@pytest.mark.parametrize(
    "settings", [{"prediction": "mean"}, {"scope": "sample", "backend": "vectorised"}, {}]
)
def test_forward_called_by_its_name_is_a_call(settings: Any, method: Any) -> None:
    class ByName(IT3Net):
        def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
            return self.forward(batch[0])

    if method is not None and settings:
        settings = {}
    callbacks = [
        adapting(**settings) if method is None else TestTimeCallback(method) for _ in range(2)
    ]
    expected = together(net(), callbacks[0])
    for answer, same in zip(together(net(ByName), callbacks[1]), expected, strict=True):
        assert torch.equal(answer, same)
