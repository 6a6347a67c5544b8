"""Scope ``"sample"``: what a step asks by ``self(...)`` is answered with each sample's weights."""

from collections import UserDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers.fast import needs_fast_paths
from helpers.reference import adapt_stream
from helpers.toy import (
    Batch,
    IT3Net,
    adapting,
    differing,
    doubles,
    everything,
    loader,
    net,
    quiet,
    samples,
    seeded,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader as GraphLoader

from it3_lightning import (
    ClassPrior,
    FeatureInjection,
    ForwardArgument,
    Idempotence,
    IT3Mixin,
    IT3Predictor,
    IT3TestTimeCallback,
    Settings,
    ValuePrior,
)
from it3_lightning.integration.batches import inputs_of
from it3_lightning.networks import GraphNet
from it3_lightning.tasks import IT3Regressor

BACKENDS = ["loop", "vectorised"]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def each(backend: str = "loop", **settings: Any) -> IT3TestTimeCallback:
    return adapting(scope="sample", backend=backend, **settings)


def together(model: Any, callback: IT3TestTimeCallback, data: Any = None) -> list[Any]:
    """What the step returned for batches of four."""
    predicted: Any = quiet(callbacks=[callback]).predict(model, data or loader())
    return list(predicted)


def alone(model: Any, **settings: Any) -> Tensor:
    """What scope ``"batch"`` predicts in batches of one."""
    callback = adapting(**settings)
    predicted: Any = quiet(callbacks=[callback]).predict(model, loader(batch=1))
    return torch.cat(list(predicted))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def ones(x: Tensor) -> list[Tensor]:
    """Each sample in a batch of its own."""
    return [x[index : index + 1] for index in range(len(x))]


def called(model: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a module's forward with other weights, in evaluation mode."""
    return functional_call(model.eval(), weights, args, kwargs)


def own_weights(model: Any, **settings: Any) -> list[dict[str, Tensor]]:
    """The weights adapted to each image alone, in plain torch."""

    def predict(net: Any, x: Tensor, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net.predict_with(x, prior)
        return outputs

    records = adapt_stream(
        model,
        ones(samples()[0]),
        predict=predict,
        to_label=lambda y: y.softmax(1),
        lr=0.05,
        **{"parameters": lambda name: not name.startswith("it3_"), **settings},
    )
    return [record.weights for record in records]


# The usual step


SETTINGS: list[dict[str, Any]] = [
    {},
    {"steps": 3, "optimizer": "adam", "lr": 0.01},
    {"steps": 2, "anchor": "ema", "ema_decay": 0.8},
    {"anchor": "live"},
    {"grad_clip": 0.01},
    {"parameters": ["net.head.*"]},
    {"parameters": "norm", "measure": False},
    {"prediction": "second"},
    {"prediction": "second", "parameters": ["net.head.*"], "steps": 2},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s.values())) or "-")
def test_each_sample_is_answered_as_if_it_had_come_alone(
    settings: dict[str, Any], backend: str
) -> None:
    model, expected = net(), alone(net(), **settings)
    predicted = torch.cat(together(model, each(backend, **settings)))
    close(predicted, expected)
    source = torch.cat(together(model, adapting(steps=0)))
    assert (predicted - source).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", ["first", "second"])
def test_distances_are_those_of_samples_that_come_alone(prediction: Any) -> None:
    single, callback = adapting(prediction=prediction), each(prediction=prediction)
    quiet(callbacks=[single]).predict(net(), loader(batch=1))
    together(net(), callback)
    close(callback.summary.distances[0], single.summary.distances[0])
    adapted = single.summary.distance_adapted
    assert callback.summary.distance_adapted == pytest.approx(adapted, abs=1e-9)


# What a step may ask


def asking(ask: Callable[[Any, Tensor], Any], kind: type[IT3Net] = IT3Net) -> Any:
    """A module whose step asks this."""

    class Asks(kind):  # type: ignore[misc, valid-type]
        def predict_step(self, batch: Batch, batch_idx: int) -> Any:
            return ask(self, batch[0])

    return net(Asks)


def counting() -> tuple[type[IT3Net], list[int]]:
    """A module that notes how many samples each of its forward passes has."""
    passes: list[int] = []

    class Counts(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            passes.append(len(x))
            return super().forward(x)

    return Counts, passes


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, x: m(x),
        lambda m, x: m(x.clone()),
        lambda m, x: m(x=x),
        lambda m, x: m.forward(x),
        lambda m, x: m.it3_forward(x),
        lambda m, x: m.predict_with(x, None),
        lambda m, x: (m(x), m(x), m(x.clone()))[2],
    ],
    ids=["plain", "clone", "keyword", "forward", "it3_forward", "neutral", "often"],
)
def test_question_about_the_batch_costs_no_pass_of_its_own(ask: Any) -> None:
    kind, passes = counting()
    close(torch.cat(together(asking(ask, kind), each())), alone(net()))
    assert set(passes) == {1}
    assert len(passes) - 4 * 12 in (0, 2)  # two to step by, the answer, its distance; a trial


@needs_fast_paths
def test_what_comes_before_the_prior_is_computed_once() -> None:
    class Counts(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            passes.append(len(input))
            return super().forward(input)

    passes: list[int] = []
    model = net()
    model.net.conv.__class__ = Counts
    close(torch.cat(together(model, each())), alone(net()))
    # of the four passes of each of 12 samples, the anchor's two begin behind the convolution
    assert len(passes) - 2 * 12 in range(5)  # and some for a trial


def test_same_question_gets_the_same_answer_whatever_was_done_to_the_first() -> None:
    def ask(module: Any, x: Tensor) -> Any:
        first = module(x)
        copy = first.clone()
        first.zero_()
        return copy, module(x)

    for first, second in together(asking(ask), each("vectorised")):
        assert torch.equal(first, second)
        assert first.abs().max() > 0


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda x: x.flip(-1),
    "normalised": lambda x: (x - 0.1) / 2,
    "cropped": lambda x: nn.functional.pad(x[..., 1:, 1:], (1, 0, 1, 0)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parameters", ["all", ["net.head.*"]], ids=["all", "head"])
@pytest.mark.parametrize("view", VIEWS)
def test_other_inputs_are_answered_with_weights_adapted_to_those_of_the_batch(
    view: str, parameters: Any, backend: str
) -> None:
    everywhere = parameters == "all"
    model = asking(lambda m, x: (m(VIEWS[view](x)), m(x)))
    weights = own_weights(
        model,
        parameters=lambda n: n.startswith("net.head") or (everywhere and not n.startswith("it3_")),
    )
    answers = together(model, each(backend, parameters=parameters))
    views, plain = (torch.cat(parts) for parts in zip(*answers, strict=True))
    for index, (x, own) in enumerate(zip(ones(samples()[0]), weights, strict=True)):
        close(views[index], called(model, own, VIEWS[view](x))[0])
        close(plain[index], called(model, own, x)[0])


def test_inputs_changed_in_place_are_other_inputs() -> None:
    def ask(module: Any, x: Tensor) -> Any:
        x.sub_(0.5)
        return module(x)

    model = asking(ask)
    weights = own_weights(model)
    answers = torch.cat(together(model, each()))
    for index, (x, own) in enumerate(zip(ones(samples()[0]), weights, strict=True)):
        close(answers[index], called(model, own, x - 0.5)[0])


def test_inputs_that_it3_inputs_prepares_cost_no_pass_of_their_own() -> None:
    kind, passes = counting()

    class Prepared(kind):  # type: ignore[misc, valid-type]
        def it3_inputs(self, batch: Any) -> Any:
            return batch[0] / 2

        def predict_step(self, batch: Batch, batch_idx: int) -> Any:
            return self(batch[0] / 2)

    class Halved(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 2)

    close(torch.cat(together(net(Prepared), each())), alone(net(Halved)))
    assert len(passes) - 4 * 12 in (0, 2)


def test_second_prediction_of_other_inputs_sees_the_first_of_the_batch() -> None:
    model = asking(lambda m, x: m(x.flip(-1)))
    answers = torch.cat(together(model, each(prediction="second")))
    for index, (x, own) in enumerate(zip(ones(samples()[0]), own_weights(model), strict=True)):
        prior = called(model, own, x).softmax(1)
        with model.it3_given(prior):
            close(answers[index], called(model, own, x.flip(-1))[0])


@pytest.mark.parametrize("prediction", ["first", "second"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_prior_that_the_step_gives_counts(prediction: Any, backend: str) -> None:
    given = torch.eye(3)[[0, 1, 2, 0]]

    def ask(module: Any, x: Tensor) -> Any:
        with module.it3_given(given):
            inside = module(x)
        return module.predict_with(x, given), inside, module.predict_with(x, None)

    model = asking(ask)
    answers = together(model, each(backend, prediction=prediction))
    with_prior, inside, neutral = (torch.cat(parts) for parts in zip(*answers, strict=True))
    assert torch.equal(with_prior, inside)
    for index, (x, own) in enumerate(zip(ones(samples()[0]), own_weights(model), strict=True)):
        with model.it3_given(given[index % 4][None]):
            close(with_prior[index], called(model, own, x)[0])
        close(neutral[index], called(model, own, x)[0])


class TakesPrior(IT3Net):
    """Its own forward takes the prior."""

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        shift = 0 if prior is None else (prior * torch.arange(1.0, 4.0)).sum(1)[:, None]
        return super().forward(x) + shift * torch.tensor([1.0, -1.0, 0.5])

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
        given = torch.eye(3)[[0, 1, 2, 0]]
        return torch.stack([self(batch[0]), self.predict_with(batch[0], given)], 1)


@pytest.mark.parametrize("neutral", ["none", "zeros", "uniform"])
@pytest.mark.parametrize("prediction", ["first", "second"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_that_takes_the_prior_gets_it(prediction: Any, neutral: Any, backend: str) -> None:
    def made() -> Any:
        prior = ClassPrior(3, neutral=neutral)
        return net(TakesPrior, prior=prior, conditioning=ForwardArgument())

    model, given = made(), torch.eye(3)[[0, 1, 2, 0]]
    answers = torch.cat(together(model, each(backend, prediction=prediction)))
    for index, (x, own) in enumerate(zip(ones(samples()[0]), own_weights(model), strict=True)):
        first = called(model, own, x)
        with model.it3_given(first.softmax(1)):
            second = called(model, own, x)
        close(answers[index, 0], (first if prediction == "first" else second)[0])
        with model.it3_given(given[index % 4][None]):
            close(answers[index, 1], called(model, own, x)[0])


class Two(IT3Net):
    """Takes two images and a word."""

    def forward(self, x: Tensor, other: Tensor, mode: str = "sum") -> Tensor:  # type: ignore[override]
        mixed = 2 * x + other
        return super().forward(mixed if mode == "sum" else -mixed)


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda m, x, y: m(x, y), lambda own, x, y: own(x, y)),
        (lambda m, x, y: m(x, other=y, mode="sum"), lambda own, x, y: own(x, y)),
        (lambda m, x, y: m(y, x), lambda own, x, y: own(y, x)),
        (lambda m, x, y: m(x, y, mode="minus"), lambda own, x, y: own(x, y, "minus")),
    ],
    ids=["plain", "keywords", "swapped", "other mode"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tuple_of_inputs_and_other_arguments(ask: Any, expected: Any, backend: str) -> None:
    class Asks(Two):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            return ask(self, *batch[0])

    def predict(net: Any, x: Tensor, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net.predict_with((x[:, :1], x[:, 1:]), prior)
        return outputs

    x, y = samples()[0], samples(seed=1)[0]
    whole: Any = [((x[i : i + 4], y[i : i + 4]), None) for i in (0, 4, 8)]
    model = net(Asks)
    answers = torch.cat(together(model, each(backend), DataLoader(whole, batch_size=None)))
    records = adapt_stream(
        model,
        ones(torch.cat([x, y], 1)),
        predict=predict,
        to_label=lambda y: y.softmax(1),
        lr=0.05,
        parameters=lambda name: not name.startswith("it3_"),
    )
    for index, record in enumerate(records):
        own = partial(called, model, record.weights)
        close(answers[index], expected(own, x[index : index + 1], y[index : index + 1])[0])


class Labelled(IT3Net):
    """Takes the labels, too, and returns its loss, as some libraries do."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}

    def it3_forward(self, inputs: Any) -> Tensor:
        logits: Tensor = self(inputs)["logits"]
        return logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
        return self(batch[0], labels=batch[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_given_to_forward_give_a_loss_and_never_reach_adaptation(backend: str) -> None:
    images, labels = samples()
    answers = together(net(Labelled), each(backend))
    logits = torch.cat([answer["logits"] for answer in answers])
    close(logits, alone(net()))
    for index, answer in enumerate(answers):
        rows = slice(4 * index, 4 * index + 4)
        close(answer["loss"], nn.functional.cross_entropy(logits[rows], labels[rows]))
    scrambled: Any = DataLoader(TensorDataset(images, labels.roll(1)), batch_size=4)
    others = together(net(Labelled), each(backend), scrambled)
    assert torch.equal(torch.cat([answer["logits"] for answer in others]), logits)


@pytest.mark.filterwarnings("ignore:.*cannot be vectorised")
@pytest.mark.parametrize("backend", ["loop", "vectorised", "auto"])
@pytest.mark.parametrize("of_nodes", [False, True], ids=["graphs", "nodes"])
def test_each_graph_of_a_batch_is_answered_as_if_it_had_come_alone(
    backend: str, of_nodes: bool
) -> None:
    class Regressor(IT3Regressor):
        def forward(self, graphs: Any) -> Any:
            passes.append(graphs.num_graphs)
            outputs = super().forward(graphs)
            return (outputs, outputs[graphs.batch]) if of_nodes else (outputs,)

        def it3_forward(self, inputs: Any) -> Tensor:
            outputs: Tensor = self(inputs)[0]
            return outputs

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            outputs: Tensor = self(inputs_of(batch))[-1]
            return outputs

    def made() -> Any:
        prior, conditioning = ValuePrior(mean=0.0, std=1.0), FeatureInjection("network.context")
        network = GraphNet(hidden=6, depth=2, kernels=2)
        return seeded(Regressor(network, prior=prior, conditioning=conditioning))

    passes: list[int] = []
    graphs: Any = [path_graph(nodes) for nodes in (2, 3, 5, 4)]
    single: Any = quiet(callbacks=[adapting()]).predict(made(), GraphLoader(graphs, batch_size=1))
    passes.clear()
    answers = together(made(), each(backend), GraphLoader(graphs, batch_size=3))
    assert len(torch.cat(answers)) == (14 if of_nodes else 4)
    close(torch.cat(answers), torch.cat(single))
    if backend == "loop":
        assert len(passes) - 4 * 4 in (0, 2)


def path_graph(nodes: int) -> Data:
    """A path with random features and a target."""
    draw = torch.Generator().manual_seed(nodes)
    here = torch.arange(nodes - 1)
    edges = torch.stack([torch.cat([here, here + 1]), torch.cat([here + 1, here])])
    x = torch.randn(nodes, 4, generator=draw, dtype=torch.float64)
    attributes = torch.randn(edges.shape[1], 2, generator=draw, dtype=torch.float64)
    return Data(x=x, edge_index=edges, edge_attr=attributes, y=torch.ones(1, 1))


def test_forward_asked_twice_by_it3_forward_answers_each_view() -> None:
    class Averages(IT3Net):
        def it3_forward(self, inputs: Any) -> Tensor:
            both: Tensor = (self(inputs) + self(inputs.flip(-1))) / 2
            return both

        def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
            return self(batch[0]), self(batch[0].flip(-1)), self.it3_forward(batch[0])

    model = net(Averages)
    answers = together(model, each())
    one, two, mean = (torch.cat(parts) for parts in zip(*answers, strict=True))
    for index, (x, own) in enumerate(zip(ones(samples()[0]), own_weights(model), strict=True)):
        close(one[index], called(model, own, x)[0])
        close(two[index], called(model, own, x.flip(-1))[0])
    close(mean, (one + two) / 2)


class Own(IT3Net):
    """Predicts with a prior in its own way, not through ``forward``."""

    def predict_with(self, inputs: Any, prior: Tensor | None) -> Tensor:
        with self.it3_given(prior):
            outputs: Tensor = self.net(inputs)
            return outputs

    def forward(self, x: Tensor) -> Any:
        return {"twice": 2 * self.net(x)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_whose_predict_with_does_without_forward_is_answered(backend: str) -> None:
    answers = together(net(Own), each(backend))
    close(torch.cat([answer["twice"] for answer in answers]), 2 * alone(net()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_hooks_of_the_module_see_each_answer_once(backend: str) -> None:
    seen: list[int] = []

    def before(module: Any, args: Any) -> Any:
        return args[0] / 2

    def after(module: Any, args: Any, output: Tensor) -> Any:
        seen.append(len(output))
        return output + 1

    def hooked() -> Any:
        model = net()
        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)
        return model

    expected = alone(hooked())
    seen.clear()
    close(torch.cat(together(hooked(), each(backend))), expected)
    if backend == "loop":  # its passes see single samples, those that samples share see all four
        assert seen.count(4) == 3 + 1  # and one tells whether what the hook gives holds samples


# Inputs whose samples are not the rows of the first tensor


class Reads(LightningModule):
    """Sequences ``(T, B, 3)`` in a mapping, with weights ``(T,)`` of their times."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, inputs: Any) -> Tensor:
        features = (self.dense(inputs["x"]) * inputs["t"][:, None, None]).sum(0)
        logits: Tensor = self.head(features.tanh())
        return logits

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch)


class IT3Reads(IT3Mixin, Reads):
    def it3_inputs(self, batch: Any) -> Any:
        return batch


class Told(IT3Reads):
    def it3_sample_dims(self, inputs: Any) -> Any:
        return {"x": 1, "t": None}


def reads(kind: type[IT3Reads]) -> Any:
    return seeded(kind(prior=ClassPrior(3), conditioning=FeatureInjection("dense", hidden=4)))


def sequences(time: int, size: int, kind: Any = dict) -> Any:
    generator = torch.Generator().manual_seed(time)
    x = torch.randn(time, size, 3, generator=generator)
    return kind(x=x, t=torch.linspace(0.1, 2, time))


def read(model: Any, batch: Any, **settings: Any) -> Tensor:
    callback = adapting(**settings)
    data: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    predicted: Any = quiet(callbacks=[callback]).predict(model, data)
    return torch.cat(list(predicted))


@pytest.mark.filterwarnings("ignore:The network cannot be vectorised")  # of a UserDict
@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("time", "size"), [(5, 3), (4, 4), (3, 1), (3, 0)])
def test_module_says_which_dimensions_hold_samples(
    kind: Any, backend: str, time: int, size: int
) -> None:
    model, batch = reads(Told), sequences(time, size, kind)
    parts = [kind(x=batch["x"][:, i : i + 1], t=batch["t"]) for i in range(size)]
    expected = [read(model, part) for part in parts]
    found = read(model, batch, scope="sample", backend=backend)
    close(found, torch.cat([torch.empty(0, 3), *expected]))
    if size:
        settings = Settings(
            scope="sample",
            objective=Idempotence(reliability=None),
            optimizer="sgd",
            lr=0.05,
        )
        close(IT3Predictor(model, settings)(batch).outputs, found)


@pytest.mark.parametrize(("time", "size"), [(5, 3), (4, 4)])
def test_inputs_that_the_rule_does_not_fit_are_refused(time: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"it3_sample_dims\(inputs\)"):
        read(reads(IT3Reads), sequences(time, size), scope="sample", backend="loop")


@pytest.mark.parametrize("settings", [{}, {"scope": "sample", "backend": "loop"}, {"steps": 0}])
def test_mapping_of_any_type_is_adapted_to_as_a_dict(settings: Any) -> None:
    model = reads(Told)
    expected = read(model, sequences(5, 3), **settings)
    assert torch.equal(read(model, sequences(5, 3, UserDict), **settings), expected)


class Yields(IT3Net):
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        yield self(batch[0])


class Maps(IT3Net):
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return map(self, [batch[0]])


@pytest.mark.parametrize("kind", [Yields, Maps])
@pytest.mark.parametrize(
    "settings", [{}, {"scope": "sample", "backend": "loop"}, {"prediction": "mean"}]
)
def test_step_that_yields_sees_the_adapted_weights(kind: type[IT3Net], settings: Any) -> None:
    expected = together(net(), adapting(**settings))
    found = [next(output) for output in together(net(kind), adapting(**settings))]
    assert all(map(torch.equal, found, expected))


# What a step may not do


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (
            lambda m, x: m.net(x),
            MisconfigurationException,
            r"(?s)predict_step of Asks never called self.*wrong:.*self.net\(x\).*right:.*self\(x\)",
        ),
        (lambda m, x: m(x[:2]), ValueError, "Asks was called with 2 samples in a batch of 4"),
        (lambda m, x: m(torch.cat([x, x])), ValueError, "with 8 samples in a batch of 4"),
        (lambda m, _: m("image.png"), ValueError, "with 0 samples in a batch of 4"),
    ],
    ids=["never", "half", "twice", "none"],
)
def test_step_is_told_what_cannot_be_answered(
    ask: Any, error: type[Exception], message: str
) -> None:
    model = asking(ask).eval()
    quiet().test(model, loader(), verbose=False)  # Lightning leaves attributes of its own
    before = everything(model)
    with pytest.raises(error, match=message):
        together(model, each())
    assert differing(before, everything(model)) == []


def test_module_without_forward_is_refused_before_any_batch() -> None:
    class NoForward(IT3Net):
        forward = LightningModule.forward

        def it3_forward(self, inputs: Any) -> Tensor:
            outputs: Tensor = self.net(inputs)
            return outputs

        def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
            steps.append(batch_idx)
            return self.it3_forward(batch[0])

    steps: list[int] = []
    with pytest.raises(MisconfigurationException, match="NoForward never called self"):
        together(net(NoForward), each())
    assert steps == []


def test_layer_that_the_step_runs_by_itself_is_told_once() -> None:
    model = asking(lambda m, x: (m(x), m.net.dense(m.net.conv(x).flatten(1))))
    with pytest.warns(UserWarning, match="predict_step of Asks ran 'net.conv' by itself") as caught:
        answers = together(model, each())
    assert len([w for w in caught if "by itself" in str(w.message)]) == 1
    close(torch.cat([first for first, _ in answers]), alone(net()))


def test_parameters_of_the_module_itself_adapt_without_a_warning() -> None:
    class Scaled(IT3Net):
        def __init__(self, **args: Any) -> None:
            super().__init__(**args)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    close(torch.cat(together(net(Scaled), each("vectorised"))), alone(net(Scaled)))
