"""The context of a batch, beside each sample's prior: against the same in plain torch."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.by_hand import ONE_HOT, X, Y, agree, by_hand, step_once
from helpers.reference import _source, adapt_stream
from helpers.toy import (
    IT3Net,
    adapting,
    differing,
    doubles,
    ending,
    everything,
    loader,
    net,
    parts,
    quiet,
    samples,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import (
    ClassPrior,
    DualPass,
    FeatureInjection,
    ForwardArgument,
    Idempotence,
    InputConcat,
    IT3Predictor,
    IT3TestTimeCallback,
    Settings,
    TestTimeCallback,
)
from it3_lightning.callbacks.checks import check_trainer
from it3_lightning.integration.checkpoints import plain
from it3_lightning.methods import Tent


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


class Estimate:
    """Of what the contexts of this file are the mean: see the fixture."""

    by: Any = "mean"


@pytest.fixture(params=["mean", "em"])
def estimate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the contexts of a test be means, and then by EM."""
    monkeypatch.setattr(Estimate, "by", request.param)
    return str(request.param)


def module(kind: Any = IT3Net, **args: Any) -> Any:
    prior = ClassPrior(3, context="batch", frequencies=Estimate.by)
    return net(kind, prior=prior, **args)


def logs(frequencies: Tensor) -> Tensor:
    return torch.log((3 * frequencies + 0.02) / 1.02)


def beside(prior: Tensor, rows: Tensor | None = None) -> Tensor:
    """Join the mean of the rows, by default of all, to each: its logarithm."""
    rows = prior if rows is None else rows
    mean = rows.mean(0) if Estimate.by == "mean" else em(rows)[0]
    return torch.cat([prior, logs(mean).expand(len(prior), -1)], 1)


def em(rows: Tensor, mean: Tensor | None = None, before: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return frequencies and adjusted rows by EM, where a mean counts as samples before."""
    frequencies = torch.full((3,), 1 / 3)
    for _ in range(20):
        joint = rows * frequencies
        adjusted = joint / joint.sum(1, keepdim=True)
        total = adjusted.sum(0) + (0 if mean is None else before * mean)
        frequencies = total / (len(rows) + before)
    joint = rows * frequencies
    return frequencies, joint / joint.sum(1, keepdim=True)


def predict(model: Any, x: Tensor, prior: Tensor | None) -> Tensor:
    """Predict by the embedder that is given both, and no code of the context's."""
    if prior is None:
        return model.net(x)  # type: ignore[no-any-return]
    embedder = model.it3_conditioning.embedders["net-dense"]
    added = embedder.last(embedder.first(beside(prior)).relu())
    hook = model.net.dense.register_forward_hook(lambda _, __, features: features + added)
    try:
        return model.net(x)  # type: ignore[no-any-return]
    finally:
        hook.remove()


def softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(1)


# The prior


def test_context_is_the_mean_of_the_finite_priors_with_gradients_to_each() -> None:
    prior = ClassPrior(3, context="batch", frequencies="mean")
    rows = torch.rand(5, 3)
    rows[1, 2], rows[3, 0] = torch.nan, torch.inf
    rows.requires_grad_()
    context = prior.context_of(rows)
    torch.testing.assert_close(context, rows[[0, 2, 4]].mean(0, keepdim=True))
    (gradient,) = torch.autograd.grad(context[0, 1], rows)
    expected = torch.zeros(5, 3)
    expected[[0, 2, 4], 1] = 1 / 3
    torch.testing.assert_close(gradient, expected)
    joined = prior.joined(rows)
    assert torch.equal(joined[:, :3].nan_to_num(9.0), rows.nan_to_num(9.0))
    torch.testing.assert_close(joined[:, 3:], logs(context).expand(5, 3))
    same = prior.joined(rows, torch.full((1, 3), 1 / 3))[:, 3:]
    torch.testing.assert_close(same, torch.zeros(5, 3), rtol=0, atol=1e-15)
    assert prior.context_of(rows[[1, 3]]).tolist() == [[0.0, 0.0, 0.0]]
    assert prior.joined(rows[:0]).shape == (0, 6)


def test_context_by_em_is_the_frequencies_that_em_finds_in_the_finite_priors() -> None:
    prior = ClassPrior(3, context="batch", frequencies="em")
    rows = torch.tensor([[2.0, 1.0, 1.0], [5.0, 4.0, 1.0], [1.0, 1.0, 4.0], [6.0, 3.0, 1.0]])
    rows = torch.cat([rows / rows.sum(1, keepdim=True), torch.full((1, 3), torch.nan)])
    rows.requires_grad_()
    found, (frequencies, adjusted) = prior.context_of(rows), em(rows[:4])
    torch.testing.assert_close(found, frequencies[None])
    assert found.max() > rows[:4].mean(0).max() + 0.05
    torch.testing.assert_close(prior.context_rows(rows)[:4], adjusted)
    gradients = [torch.autograd.grad(each, rows)[0][:4] for each in (found[0, 0], frequencies[0])]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(prior.joined(rows[:4])[:, 3:], logs(frequencies).expand(4, 3))
    assert prior.context_of(rows[4:]).tolist() == [[0.0, 0.0, 0.0]]
    assert ClassPrior(3, context="batch", frequencies="mean").context_rows(rows) is rows


def test_unknown_frequencies_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected frequencies 'mean' or 'em', got 'map'"):
        ClassPrior(3, context="batch", frequencies="map")  # type: ignore[arg-type]
    assert ClassPrior(3, context="batch").frequencies == "em"


def test_a_prior_without_a_context_is_as_wide_as_its_classes() -> None:
    assert (ClassPrior(3).input_channels, ClassPrior(3).context_channels) == (3, 0)
    prior = ClassPrior(3, context="batch", neutral="uniform")
    assert (prior.channels, prior.input_channels) == (3, 6)
    assert prior.neutral_input(2, torch.zeros(1)).tolist() == [[1 / 3] * 3 + [0.0] * 3] * 2


def test_unknown_context_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected context 'batch', 'stream' or None, got 'epoch'"):
        ClassPrior(3, context="epoch")  # type: ignore[arg-type]


# The network


class Takes(IT3Net):
    """Has a forward that takes a prior."""

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        outputs: Tensor = self.net(x)
        return outputs if prior is None else outputs + prior[:, :3] - prior[:, 3:].square()


@pytest.mark.parametrize("neutral", ["zeros", "uniform"])
@pytest.mark.parametrize("conditioning", ["injection", "concat"])
def test_neutral_pass_is_the_network_bit_for_bit(conditioning: str, neutral: Any) -> None:
    made = FeatureInjection("net.dense", mode="film") if conditioning == "injection" else None
    prior = ClassPrior(3, context="batch", neutral=neutral)
    model: Any = net(prior=prior, conditioning=made or InputConcat("net.conv"))
    if conditioning == "injection" or neutral == "zeros":
        assert torch.equal(model.predict_with(X, None), model.net(X))
    if neutral == "uniform":
        told_nothing = model.predict_with(X, prior.neutral_input(6, X)[:, :3])
        torch.testing.assert_close(told_nothing, model.predict_with(X, None), rtol=0, atol=1e-12)
    assert not torch.equal(model.predict_with(X, ONE_HOT), model.predict_with(X, None))


def test_every_conditioning_sees_the_context_beside_the_prior() -> None:
    model = module()
    torch.testing.assert_close(model.predict_with(X, ONE_HOT), predict(model, X, ONE_HOT))
    with model.it3_conditioning.given(ONE_HOT, context=ONE_HOT.mean(0, keepdim=True)):
        assert torch.equal(model(X), model.predict_with(X, ONE_HOT))
    takes = module(Takes, conditioning=ForwardArgument())
    found, mean = takes.predict_with(X, ONE_HOT), ONE_HOT.mean(0)
    torch.testing.assert_close(found, takes.net(X) + ONE_HOT - logs(mean).square())
    concat = module(conditioning=InputConcat("net.conv"))
    maps = beside(ONE_HOT)[:, :, None, None].expand(-1, -1, *X.shape[2:])
    extra = concat.it3_conditioning.extra["net-conv"](maps)
    hook = concat.net.conv.register_forward_hook(lambda _, __, out: out + extra)
    expected = concat.net(X)
    hook.remove()
    torch.testing.assert_close(concat.predict_with(X, ONE_HOT), expected)


# Training


@pytest.mark.usefixtures("estimate")
def test_training_shows_the_context_of_the_first_predictions() -> None:
    dual = DualPass(perturb_prior=False, perturb_inputs=lambda x: x + 1, third_pass=True)

    def loss(f: Any) -> Tensor:
        shown, plain = f(X + 1, None).softmax(1).detach(), f(X, None).softmax(1).detach()
        label = beside(ONE_HOT, shown)
        passes = f(X, None), f(X + 1, label), f(X, beside(plain))
        return sum(F.cross_entropy(outputs, Y) for outputs in passes)  # type: ignore[return-value]

    agree(step_once(module(dual_pass=dual), (X, Y)), by_hand(module(), loss))


@pytest.mark.usefixtures("estimate")
def test_post_hoc_training_sees_the_context_of_the_samples_drawn() -> None:
    dual = DualPass(unequal_share=1.0, norm_stats="batch", own_share=0.5, perturb_prior=False)
    torch.manual_seed(7)
    torch.rand(())
    strength = torch.empty(()).uniform_(math.log(0.01), math.log(10.0)).exp().item()
    frequencies = torch.distributions.Dirichlet(torch.full((3,), strength)).sample()
    rows = torch.multinomial(frequencies[Y] + 1e-6, 6, replacement=True)
    chosen = (torch.rand(6) < 0.5)[:, None]

    def loss(f: Any) -> Tensor:
        own = f(X[rows], None).softmax(1).detach()
        shown = torch.where(chosen, own, ONE_HOT[rows])
        return F.cross_entropy(f(X[rows], beside(shown, own)), Y[rows])

    recorded = step_once(module(dual_pass=dual, train="conditioning"), (X, Y))
    expected = by_hand(module(), loss)
    torch.testing.assert_close(recorded.loss, expected.loss.detach())
    for name, gradient in recorded.grads.items():
        if name.startswith("it3_"):
            torch.testing.assert_close(gradient, expected.grads[name])


def test_single_pass_shows_the_context_to_those_that_see_a_prior() -> None:
    dual = DualPass(passes="single", perturb_prior=False)
    torch.manual_seed(7)
    present = (torch.rand(6) >= 0.5)[:, None]

    def loss(f: Any) -> Tensor:
        shown = f(X, beside(ONE_HOT, f(X, None).softmax(1).detach()))
        return F.cross_entropy(torch.where(present, shown, f(X, None)), Y)

    agree(step_once(module(dual_pass=dual), (X, Y)), by_hand(module(), loss))


# Test time


@pytest.mark.usefixtures("estimate")
@pytest.mark.parametrize("norm_stats", ["source", "batch"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_and_predictions_are_those_of_plain_torch(norm_stats: Any, optimizer: Any) -> None:
    model = module().eval()
    images = list(torch.split(samples()[0], 4))
    records = adapt_stream(
        model,
        images,
        predict=predict,
        to_label=softmax,
        lr=0.05,
        steps=2,
        optimizer=optimizer,
        norm_stats=norm_stats,
        parameters=lambda name: name.startswith("net."),
    )
    settings = {"steps": 2, "norm_stats": norm_stats, "optimizer": optimizer}
    predictor = IT3Predictor(
        model, Settings(objective=Idempotence(reliability=None), lr=0.05, **settings)
    )
    for x, record in zip(images, records, strict=True):
        found = predictor(x)
        torch.testing.assert_close(found.outputs, record.outputs)
        torch.testing.assert_close(found.distance, record.distance_source)
        torch.testing.assert_close(found.distance_adapted, record.distance_after)
    batches: Any = quiet(callbacks=[adapting(**settings)]).predict(model, loader())
    torch.testing.assert_close(torch.cat(batches), torch.cat([r.outputs for r in records]))


@pytest.mark.usefixtures("estimate")
@pytest.mark.parametrize("prediction", ["second", "mean"])
def test_second_predictions_see_the_context_of_their_batch(prediction: Any) -> None:
    model = module().eval()
    callback = IT3TestTimeCallback(steps=0, prediction=prediction)
    batches: Any = quiet(callbacks=[callback]).predict(model, loader())
    answers = IT3Predictor(model, Settings(steps=0), prediction=prediction)
    for x, found in zip(torch.split(samples()[0], 4), batches, strict=True):
        with torch.no_grad():
            first = model.net(x).softmax(1)
            second = predict(model, x, first).softmax(1)
        expected = second if prediction == "second" else (first + second) / 2
        torch.testing.assert_close(found.softmax(1), expected)
        torch.testing.assert_close(answers(x).outputs.softmax(1), expected)


def test_a_prediction_does_not_depend_on_other_batches() -> None:
    model, callback = module(), adapting(steps=2, prediction="second")
    together: Any = quiet(callbacks=[callback]).predict(model, loader())
    alone = TensorDataset(*(tensor[4:8] for tensor in samples()))
    second: Any = quiet(callbacks=[callback]).predict(model, DataLoader(alone, 4))
    assert torch.equal(second[0], together[1])


@pytest.mark.usefixtures("estimate")
def test_a_sample_that_is_not_finite_has_no_part_in_the_context() -> None:
    images, labels = samples(5)
    images[2, 0, 1, 1] = torch.nan
    model, kept = module().eval(), [0, 1, 3, 4]
    callback = adapting(prediction="second")
    data = DataLoader(TensorDataset(images, labels), 5)
    with pytest.warns(UserWarning, match="non-finite output"):
        batches: Any = quiet(callbacks=[callback]).predict(model, data)
    (found,) = batches
    with torch.no_grad():
        expected = predict(model, images[kept], model.net(images[kept]).softmax(1))
    torch.testing.assert_close(found[kept], expected)
    assert found[2].isnan().all()
    assert callback.summary.skipped == 5


@pytest.mark.parametrize("norm_stats", ["source", "batch"])
def test_samples_within_the_gate_stay_in_the_context(norm_stats: Any) -> None:
    model = module().eval()
    images = samples()[0]
    (record,) = adapt_stream(
        model, [images], predict=predict, to_label=softmax, lr=0.0, steps=0, norm_stats=norm_stats
    )
    limit = record.distance_source.median().item()
    settings = Settings(
        objective=Idempotence(reliability=None),
        gate=limit,
        lr=0.05,
        optimizer="sgd",
        norm_stats=norm_stats,
    )
    found = IT3Predictor(model, settings)(images)
    assert int(found.gated.sum()) == 6
    source = _source(model, norm_stats)
    weights = {n: p.requires_grad_() for n, p in source.named_parameters() if n.startswith("net.")}
    first = predict(source, images, None).softmax(1)
    second = predict(_source(model, norm_stats), images, first).softmax(1)
    loss = (first - second).square().sum(1)[record.distance_source > limit].mean()
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(weights.values(), gradients, strict=True):
            if gradient is not None:
                parameter -= 0.05 * gradient
        torch.testing.assert_close(found.outputs, predict(source, images, None))


@pytest.mark.usefixtures("estimate")
def test_the_gate_is_calibrated_in_the_company_of_the_batch() -> None:
    class Validated(IT3Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    model, gated = module(Validated).eval(), adapting(gate=0.5)
    quiet(callbacks=[gated]).validate(model, loader(count=20, seed=1), verbose=False)
    images = list(torch.split(samples(20, seed=1)[0], 4))
    records = adapt_stream(
        model, images, predict=predict, to_label=softmax, lr=0.0, steps=0, norm_stats="source"
    )
    found = model.it3_calibration.quantile(
        0.5, by="Idempotence, distance 'l2', norm_stats 'source'"
    )
    distances = torch.cat([record.distance_source for record in records]).quantile(0.5)
    assert found == pytest.approx(distances.item(), rel=1e-6)
    quiet(callbacks=[gated]).predict(model, loader())
    assert 0 < gated.summary.gated < 12


# What it refuses, and what is kept


@pytest.mark.parametrize("steps", [0, 1])
def test_single_samples_have_no_batch(steps: int) -> None:
    message = "scope='sample' adapts to each sample as if it had come alone"
    callback = adapting(scope="sample", steps=steps)
    with pytest.raises(MisconfigurationException, match=message):
        quiet(callbacks=[callback]).predict(module(), loader())
    with pytest.raises(MisconfigurationException, match=message):
        IT3Predictor(module(), Settings(scope="sample", steps=steps))
    tent = TestTimeCallback(
        Tent(), scope="sample", reset="batch", norm_stats="source", prediction="second"
    )
    with pytest.raises(MisconfigurationException, match=message):
        quiet(callbacks=[tent]).predict(module(), loader())


def test_batches_of_one_have_no_company() -> None:
    with pytest.raises(MisconfigurationException, match=r"is of several samples.*batch_size=1"):
        quiet(callbacks=[adapting()]).predict(module(), loader(batch=1))


def test_what_asks_for_no_second_prediction_is_not_concerned() -> None:
    tent = TestTimeCallback(Tent(), scope="sample", reset="batch", norm_stats="source")
    first: Any = quiet(callbacks=[tent]).predict(module(), loader(batch=1))
    again: Any = quiet(callbacks=[tent]).predict(module(), loader())
    torch.testing.assert_close(torch.cat(first), torch.cat(again))


def described(prior: ClassPrior) -> dict[str, Any]:
    """Describe prior and conditioning as a command line does."""
    return {name: plain(part) for name, part in parts(prior=prior).items()}


def test_a_checkpoint_makes_the_same_module_again(tmp_path: Path) -> None:
    path, trainer = tmp_path / "context.ckpt", quiet()

    class Keeps(IT3Net):
        def __init__(self, **args: Any) -> None:
            super().__init__(**args)
            self.save_hyperparameters()

    model = Keeps(**described(ClassPrior(3, context="batch")))
    trainer.fit(model, loader())
    trainer.save_checkpoint(path)
    again = Keeps.load_from_checkpoint(path, weights_only=True)
    assert again.it3_prior is not None
    assert again.it3_prior.context == "batch"
    assert torch.equal(model.eval().predict_with(X, ONE_HOT), again.eval().predict_with(X, ONE_HOT))
    with pytest.raises(RuntimeError, match=r"first.weight.*\[4, 6\].*\[4, 3\]"):
        Keeps.load_from_checkpoint(path, **described(ClassPrior(3)), weights_only=True)


def test_context_is_copied_with_its_module() -> None:
    model = module()
    twin = copy.deepcopy(model)
    nn.init.zeros_(model.it3_conditioning.embedders["net-dense"].last.weight)
    assert torch.equal(twin.predict_with(X, ONE_HOT), module().predict_with(X, ONE_HOT))


# Along a stream


def streaming(window: int = 5, frequencies: Any = "mean", **args: Any) -> Any:
    prior = ClassPrior(3, context="stream", window=window, frequencies=frequencies)
    return net(prior=prior, **args).eval()


class Stream:
    """The running mean in plain torch: of a batch, or of each sample by itself."""

    def __init__(self, window: int, *, alone: bool, by_em: bool = False) -> None:
        self.window, self.alone, self.by_em = window, alone, by_em
        self.mean, self.count = torch.zeros(3), 0

    def beside(self, prior: Tensor) -> Tensor:
        size = 1 if self.alone else len(prior)
        before = min(self.count, max(self.window - size, 0))
        if self.by_em:
            parts = prior.split(1) if self.alone else [prior]  # type: ignore[no-untyped-call]
            found = torch.stack([em(part, self.mean, before)[0] for part in parts])
            return torch.cat([prior, logs(found).expand(len(prior), -1)], 1)
        own = prior if self.alone else prior.sum(0, keepdim=True)
        context = (before * self.mean + own) / (before + size)
        return torch.cat([prior, logs(context).expand(len(prior), -1)], 1)

    def predict(self, model: Any, x: Tensor, prior: Tensor | None) -> Tensor:
        if prior is None:
            return model.net(x)  # type: ignore[no-any-return]
        embedder = model.it3_conditioning.embedders["net-dense"]
        added = embedder.last(embedder.first(self.beside(prior)).relu())
        hook = model.net.dense.register_forward_hook(lambda _, __, features: features + added)
        outputs: Tensor = model.net(x)
        hook.remove()
        return outputs

    def follow(self, first: Tensor) -> None:
        if self.by_em:
            size = 1 if self.alone else len(first)
            before = min(self.count, max(self.window - size, 0))
            parts = first.split(1) if self.alone else [first]  # type: ignore[no-untyped-call]
            first = torch.cat([em(part, self.mean, before)[1] for part in parts])
        before = min(self.count, max(self.window - len(first), 0))
        self.mean = (before * self.mean + first.sum(0)) / (before + len(first))
        self.count += len(first)


def expected_along(
    model: Any, batches: list[Tensor], stream: Stream, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Adapt to batches in turn; return the first predictions and the distances."""
    outputs, distances = [], []
    for x in batches:
        parts = x.split(1) if stream.alone else [x]  # type: ignore[no-untyped-call]
        records = [
            adapt_stream(
                model,
                [part],
                predict=stream.predict,
                to_label=softmax,
                lr=0.05,
                parameters=lambda name: name.startswith("net."),
                **settings,
            )[0]
            for part in parts
        ]
        found = torch.cat([record.outputs for record in records])
        outputs.append(found)
        distances.append(torch.cat([record.distance_source for record in records]))
        stream.follow(found.softmax(1))
    return torch.cat(outputs), torch.cat(distances)


@pytest.mark.parametrize(
    ("scope", "backend", "size"),
    [
        ("batch", "auto", 1),
        ("batch", "auto", 4),
        ("batch", "auto", 6),
        ("sample", "loop", 1),
        ("sample", "loop", 4),
        ("sample", "vectorised", 4),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("frequencies", ["mean", "em"])
def test_the_context_of_a_stream_is_a_running_mean(
    scope: Any, backend: Any, size: int, steps: int, frequencies: Any
) -> None:
    model = streaming(frequencies=frequencies)
    batches = list(torch.split(samples()[0], size))
    stream = Stream(5, alone=scope == "sample", by_em=frequencies == "em")
    outputs, distances = expected_along(model, batches, stream, steps=steps)
    settings = {"scope": scope, "backend": backend, "steps": steps}
    predictor = IT3Predictor(
        model,
        Settings(objective=Idempotence(reliability=None), optimizer="sgd", lr=0.05, **settings),
    )
    for _ in range(2):
        found = [predictor(x) for x in batches]
        torch.testing.assert_close(torch.cat([f.outputs for f in found]), outputs)
        torch.testing.assert_close(torch.cat([f.distance for f in found]), distances)
        predictor.restart()
    callback = adapting(**settings)
    quiet().predict(model, loader())
    before = everything(model)
    for data in (loader(batch=size), [loader(batch=size)] * 2):
        answers: Any = quiet(callbacks=[callback]).predict(model, data)
        assert differing(before, everything(model)) == []
        for run in answers if isinstance(data, list) else [answers]:
            torch.testing.assert_close(torch.cat(run), outputs)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_second_predictions_see_the_context_of_the_stream(scope: Any) -> None:
    model, images = streaming(), samples()[0]
    stream, expected = Stream(5, alone=scope == "sample"), []
    with torch.no_grad():
        for x in torch.split(images, 2):
            first = model.net(x).softmax(1)
            expected.append(stream.predict(model, x, first))
            stream.follow(first)
    callback = adapting(scope=scope, steps=0, prediction="second")
    found: Any = quiet(callbacks=[callback]).predict(model, loader(batch=2))
    torch.testing.assert_close(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize(("scope", "kept"), [("batch", [0, 1, 4, 5]), ("sample", [0, 1, 3, 4, 5])])
def test_what_is_skipped_does_not_count_in_the_stream(scope: Any, kept: list[int]) -> None:
    images = samples(6)[0]
    images[2, 0, 0, 0] = torch.nan
    settings = Settings(objective=Idempotence(reliability=None), scope=scope, steps=1, lr=0.05)
    odd, clean = IT3Predictor(streaming(), settings), IT3Predictor(streaming(), settings)
    found = [odd(x) for x in torch.split(images, 2)]
    assert found[1].skipped.any()
    for rows in ([0, 1], kept[2:-2], kept[-2:]):
        expected = clean(images[rows]) if rows else None
    assert expected is not None
    torch.testing.assert_close(found[2].distance, expected.distance)


@pytest.mark.parametrize("error", [ValueError("a step"), KeyboardInterrupt()])
@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_a_stream_that_is_cut_short_leaves_nothing_behind(scope: Any, error: Any) -> None:
    class Fails(IT3Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            outputs = self(batch[0])
            if batch_idx == 1:
                raise error
            return outputs

    model = net(Fails, prior=ClassPrior(3, context="stream")).eval()
    with ending(error):
        quiet().predict(model, loader())
    before = everything(model)
    with ending(error):
        quiet(callbacks=[adapting(scope=scope)]).predict(model, loader())
    assert differing(before, everything(model)) == []
    assert model.it3_prior.carried is None


def test_a_stream_goes_on_where_no_distance_is_asked_for() -> None:
    found = [
        quiet(callbacks=[adapting(measure=measure, prediction="second")]).predict(
            streaming(), loader()
        )
        for measure in (True, False)
    ]
    torch.testing.assert_close(*(torch.cat(batches) for batches in found))  # type: ignore[arg-type]


def test_training_for_a_stream_sees_as_many_samples_as_count_there() -> None:
    dual = DualPass(perturb_prior=False)

    def loss(f: Any) -> Tensor:
        own = f(X, None).softmax(1).detach()
        label = beside(ONE_HOT, own[:4])
        return F.cross_entropy(f(X, None), Y) + F.cross_entropy(f(X, label), Y)

    prior = ClassPrior(3, context="stream", frequencies="mean", window=4)
    model = net(prior=prior, dual_pass=dual)
    agree(step_once(model, (X, Y)), by_hand(module(), loss))


def test_what_a_stream_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="a window of at least 1 sample, got 0"):
        ClassPrior(3, context="stream", window=0)
    trainer = quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "world_size", 2)
        with pytest.raises(MisconfigurationException, match="2 processes would each carry their"):
            check_trainer(trainer, streaming(), Settings(), False, second=True)
        check_trainer(trainer, streaming(), Settings(), False, second=False)
        check_trainer(trainer, streaming(), Settings(), True, second=True)
        check_trainer(trainer, module(), Settings(), False, second=True)
