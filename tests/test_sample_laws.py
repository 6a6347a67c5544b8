"""The laws, in scope `sample`: for each sample by itself, in both backends."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from helpers.modules import bits, changed, images, same, takes_prior, toy
from helpers.reference import adapt_stream, forward_predict, softmax_label
from helpers.zoo import KINDS, rows
from test_laws_engine import Scale, restless
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, BatchAdapter, Forward, SampleAdapter, Settings
from it3_lightning.methods import Idempotence

PUBLISHED = Idempotence("l2", None)
BACKENDS = ("vectorised", "loop")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def adapter_of(net: nn.Module, forward: Forward | None = None, **given: Any) -> SampleAdapter:
    common = {"scope": "sample", "objective": PUBLISHED, "lr": 0.01, "steps": 2}
    made = Settings(**{**common, "backend": "vectorised", **given})
    return SampleAdapter(net, forward or takes_prior(net), softmax_label, made)


def adapted(adapter: SampleAdapter, inputs: Any, answer: Any = None) -> Adaptation:
    with adapter.adapted(inputs, answer) as adaptation:
        return adaptation


def backend_of(adapter: SampleAdapter) -> str:
    assert adapter.backend_selection is not None
    return adapter.backend_selection.backend


# Nothing is left behind

EVERY: dict[str, dict[str, Any]] = {
    "vectorised": {},
    "loop": {"backend": "loop"},
    "several chunks": {"chunk_size": 4},
    "gated": {"gate": 0.02},
    "no step": {"steps": 0},
    "by name": {"parameters": ["conv.*", "bn.*"]},
}


def in_use(net: nn.Module) -> nn.Module:
    """Give a network gradients of former training, and parameters that need none."""
    for index, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
        parameter.requires_grad_(index % 3 > 0)
    return net


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("settings", EVERY)
def test_adaptation_leaves_nothing_behind(settings: str, mode: Callable[[], Any]) -> None:
    net, inputs = in_use(toy()), images()
    before, state = bits(net), torch.get_rng_state()
    with mode():
        assert adapted(adapter_of(net, **EVERY[settings]), inputs).reason is None
    assert changed(before, net) == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["lstm", "transformer", "vit", "graph"])
def test_no_kind_of_network_keeps_anything(kind: str) -> None:
    net = in_use(KINDS[kind].build())
    before = bits(net)
    adapted(adapter_of(net), KINDS[kind].batch(3))
    assert changed(before, net) == []
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    assert torch._C._get_mkldnn_enabled()


def test_a_restless_network_is_left_as_it_was() -> None:
    net = restless()  # writes buffers and attributes, draws, switches modes
    before = bits(net)
    adapter = adapter_of(net)
    with pytest.warns(UserWarning, match="cannot be vectorised"):
        adapted(adapter, images(3))
    adapted(adapter, images(3))
    assert changed(before, net) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [1, 2, 5, 8, 11, 14])
@both_backends
def test_an_error_in_a_forward_leaves_nothing_behind(
    backend: str, fails_at: int, error: type[BaseException]
) -> None:
    net, calls = in_use(toy()), [0]

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        calls[0] += 1
        output = forward_predict(net, x, prior)
        if calls[0] == fails_at:
            raise error
        return output

    before = bits(net)
    adapter = adapter_of(net, forward, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an error inside torch.func
        with suppress(error):
            adapted(adapter, images(3))
    assert calls[0] >= fails_at
    assert changed(before, net) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@both_backends
def test_an_error_in_the_body_leaves_nothing_behind(
    backend: str, error: type[BaseException]
) -> None:
    net = in_use(toy())
    before = bits(net)
    with pytest.raises(error), adapter_of(net, backend=backend).adapted(images(3)):
        raise error
    assert changed(before, net) == []


@both_backends
def test_source_weights_are_in_place_in_the_body(backend: str) -> None:
    net, inputs = toy(), images()
    expected = forward_predict(net, inputs, None)
    with adapter_of(net, backend=backend).adapted(inputs) as adaptation:
        assert torch.equal(forward_predict(net, inputs, None), expected)
    assert adaptation.outputs is not None
    assert not torch.allclose(adaptation.outputs, expected)
    assert adaptation.weights == {}


@both_backends
def test_results_carry_no_graph(backend: str) -> None:
    adaptation = adapted(adapter_of(toy(), backend=backend), images())
    tensors = [value for value in vars(adaptation).values() if isinstance(value, Tensor)]
    assert len(tensors) == 6
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in tensors)


# Off is off


@both_backends
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_changes_no_bit(kind: str, backend: str) -> None:
    net, inputs = KINDS[kind].build(), KINDS[kind].batch(4)
    with torch.no_grad():
        plain = forward_predict(net, inputs, None)
    adaptation = adapted(adapter_of(net, steps=0, backend=backend), inputs)
    assert same([(adaptation.outputs, plain), (adaptation.source_outputs, plain)])
    assert (adaptation.forwards, adaptation.backwards) == (2, 0)


# The second pass is an anchor


@both_backends
@pytest.mark.parametrize(
    ("anchor", "gradient"),
    [
        ("frozen", (-1.0, 0.0)),  # 2 (w - W - V w)(1 - V) x^2, of x = 1
        ("live", (1.0, 4.0)),  # of (v w x)^2
    ],
)
def test_gradients_flow_through_the_anchor_and_move_none_of_its_weights(
    anchor: str, gradient: tuple[float, float], backend: str
) -> None:
    net, inputs = Scale(), torch.tensor([[1.0], [3.0]])
    settings: Any = {"anchor": anchor, "optimizer": "sgd", "lr": 0.1, "backend": backend}

    def answer(x: Tensor) -> tuple[Tensor, Any]:
        outputs = forward_predict(net, x, None)
        return outputs, {"w": outputs / x, "v": forward_predict(net, 0 * x, torch.ones_like(x))}

    made = Settings(scope="sample", objective=PUBLISHED, **settings)
    adapter = SampleAdapter(net, takes_prior(net), lambda y: y, made)
    adaptation = adapted(adapter, inputs, answer)
    squares = inputs**2
    for name, source, slope in (("w", 2.0, gradient[0]), ("v", 0.5, gradient[1])):
        expected = source - 0.1 * slope * squares
        torch.testing.assert_close(adaptation.answers[name], expected)


# A bad sample harms no other

NAN, MARK = torch.nan, 1e3


class Fault:
    """Makes one sample, marked in a corner, go wrong in a given way."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.net, self.source = toy(), toy()

    def batch(self, bad: int | None) -> Tensor:
        x = images()
        if bad is not None:
            x[bad, 0, 0, 0] = NAN if self.kind == "input" else MARK
        return x

    def forward(self, x: Tensor, prior: Tensor | None) -> Tensor:
        marked = x[:, 0, 0, :1] == MARK
        clean = torch.where(marked[:, :, None, None], 0.0, x)
        logits = forward_predict(self.net, clean, prior)
        if self.kind == "second pass" and prior is not None:
            return torch.where(marked, NAN, logits)
        if self.kind == "gradient":  # adds 0, with an infinite slope
            return logits + torch.where(marked, logits - logits.detach(), 1.0).sqrt() * marked
        if self.kind == "last output" and prior is None:
            there = forward_predict(self.source, clean, None).detach()
            moved = (logits.detach() - there).abs().amax(1, keepdim=True) > 1e-9
            return torch.where(marked & moved, NAN, logits)
        return logits


FAULTS = {
    "input": "non-finite output",
    "second pass": "non-finite loss",
    "gradient": "non-finite gradient or weights",
    "last output": "non-finite output",
}


@both_backends
@pytest.mark.parametrize("gate", [None, 0.0])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_sample_gets_the_source_and_does_not_touch_the_others(
    kind: str, gate: float | None, backend: str
) -> None:
    def run(bad: int | None) -> Adaptation:
        fault = Fault(kind)
        adapter = adapter_of(fault.net, fault.forward, backend=backend, gate=gate, steps=1)
        adaptation = adapted(adapter, fault.batch(bad))
        assert backend_of(adapter) == backend
        return adaptation

    bad, good = run(2), run(None)
    assert bad.reason == FAULTS[kind]
    assert bad.skipped.tolist() == [index == 2 for index in range(6)]
    assert good.reason is None
    fault, others = Fault(kind), [0, 1, 3, 4, 5]
    source = fault.forward(fault.batch(2), None)[2:3].detach()
    assert bad.outputs is not None
    torch.testing.assert_close(bad.outputs[2:3], source, rtol=0, atol=1e-12, equal_nan=True)
    for name in ("outputs", "source_outputs", "distance_source", "distance_adapted", "reliable"):
        met, missed = getattr(bad, name), getattr(good, name)
        torch.testing.assert_close(met[others], missed[others], rtol=0, atol=1e-12)
    assert bad.distance_source is not None
    assert bad.distance_adapted is not None
    assert bad.distance_adapted[2].isnan()
    assert bad.distance_source[2].isnan()
    assert bad.reliable is not None
    assert not bad.reliable[2]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_batch_of_bad_samples_gets_the_source(steps: int) -> None:
    net, inputs = toy(), images(3) * NAN
    adapter = adapter_of(net, steps=steps)
    adaptation = adapted(adapter, inputs)
    assert adaptation.skipped.tolist() == [True] * 3
    assert adaptation.reason == "non-finite output"
    assert adaptation.outputs is not None
    assert adaptation.outputs.isnan().all()
    if steps:  # what was tried on such samples alone is not trusted
        later = adapted(adapter, images(3))
        expected = adapted(adapter_of(toy()), images(3))
        torch.testing.assert_close(later.outputs, expected.outputs)
        assert backend_of(adapter) == "vectorised"


@pytest.mark.parametrize("measure", [True, False])
def test_without_a_step_a_bad_sample_is_reported_alone(measure: bool) -> None:
    net, inputs = toy(), images()
    with torch.no_grad():
        inputs[1] = NAN
        plain = forward_predict(net, inputs, None)
    adaptation = adapted(adapter_of(net, steps=0, measure=measure), inputs)
    torch.testing.assert_close(adaptation.outputs, plain, rtol=0, atol=0, equal_nan=True)
    assert adaptation.skipped.tolist() == [False, True, False, False, False, False]
    if measure:
        assert adaptation.distance_source is not None
        assert adaptation.distance_source.isnan().tolist() == adaptation.skipped.tolist()


# Same seed, same result; dropout and the like


class Dropping(nn.Module):
    """A network with dropout that is on at test time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy()
        self.dropout = nn.Dropout(0.5).train()

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        return forward_predict(self.net, self.dropout(x), prior)


def test_dropout_goes_through_the_loop_as_each_sample_alone() -> None:
    def run(batch: Tensor, seed: int) -> Tensor | None:
        adapter = adapter_of(Dropping(), backend="auto")
        torch.manual_seed(seed)  # which building a network has drawn from
        state = torch.get_rng_state()
        with pytest.warns(UserWarning, match="cannot be vectorised.*random") as caught:
            outputs = adapted(adapter, batch).outputs
        assert len(caught) == 1
        assert same([(outputs, adapted(adapter, batch).outputs)])  # and says no more
        assert backend_of(adapter) == "loop"
        assert torch.equal(torch.get_rng_state(), state)
        return outputs

    whole, again, other = run(images(), 0), run(images(), 0), run(images(), 1)
    assert whole is not None
    assert same([(whole, again)])
    assert other is not None
    assert not torch.allclose(whole, other)
    for index in range(6):
        net = Dropping()
        torch.manual_seed(0)
        alone = Settings(objective=PUBLISHED, lr=0.01, steps=2)
        with BatchAdapter(net, takes_prior(net), softmax_label, alone).adapted(
            images()[index : index + 1]
        ) as adaptation:
            pass
        assert same([(adaptation.outputs, whole[index : index + 1])])


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second = (adapted(adapter_of(toy()), images()).outputs for _ in range(2))
    assert same([(first, second)])


# What torch.func cannot take goes through the loop, with one warning that says why


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0 * x.sum().item())


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 4, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.mean, Tensor)
        self.mean.add_(x[0].detach())
        return x + 0 * self.mean


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(1).double() * 0


CANNOT = {
    "item": (Item, r"item\(\)"),
    "branch": (Branch, "data-dependent control flow"),
    "in-place buffer": (Counts, "in-place"),
    "random": (Noise, "random"),
}


@pytest.mark.parametrize("backend", ["auto", "vectorised"])
@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_be_vectorised_is_looped_with_one_warning(kind: str, backend: str) -> None:
    layer, cause = CANNOT[kind]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.net = layer(), toy()

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            return forward_predict(self.net, self.first(x), prior)

    net, inputs = Net(), images(4)
    adapter = adapter_of(net, backend=backend)
    with pytest.warns(UserWarning, match=f"cannot be vectorised.*{cause}") as caught:
        found = adapted(adapter, inputs)
    assert len(caught) == 1
    adapted(adapter, inputs)  # and says no more
    assert adapter.backend_selection is not None
    assert adapter.backend_selection.backend == "loop"
    assert "cannot be vectorised" in str(adapter.backend_selection)
    records = adapt_stream(
        net,
        [rows(inputs, [index]) for index in range(4)],
        predict=forward_predict,
        to_label=softmax_label,
        steps=2,
        lr=0.01,
        optimizer="adam",
    )
    expected = torch.cat([record.outputs for record in records])
    torch.testing.assert_close(found.outputs, expected, rtol=0, atol=1e-10)


class Centred(torch.optim.Optimizer):
    """Subtracts the mean gradient of each tensor: mixes its elements."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * (p.grad - p.grad.mean())


class CentredSGD(torch.optim.SGD):
    """The same, by what looks like SGD."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad - p.grad.mean()
        super().step()


def hooked(parameters: Any) -> torch.optim.Optimizer:
    """SGD, with a hook that clips all gradients together."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def clip(optimizer: Any, args: Any, kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3)

    optimizer.register_step_pre_hook(clip)
    return optimizer


MIXING: dict[str, Any] = {
    "own": lambda parameters: Centred(parameters, 0.1),
    "subclass": lambda parameters: CentredSGD(parameters, lr=0.1),
    "hooked": hooked,
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
}


@pytest.mark.parametrize("kind", MIXING)
def test_an_optimizer_that_mixes_elements_is_looped(kind: str) -> None:
    net, inputs = toy(), images(4)
    adapter = adapter_of(net, optimizer=MIXING[kind], backend="auto")
    with pytest.warns(UserWarning, match="may mix the samples' weights"):
        found = adapted(adapter, inputs)
    assert backend_of(adapter) == "loop"
    expected = adapted(adapter_of(toy(), optimizer=MIXING[kind], backend="loop"), inputs)
    assert same([(found.outputs, expected.outputs)])


def test_a_batch_unlike_the_first_one_is_looped() -> None:
    net, calls = toy(), [0]

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        calls[0] += 1
        if x.shape[2] == 5:  # what torch.func cannot take comes later
            assert x.sum().item() < torch.inf
        return forward_predict(net, x[:, :, :4, :4], prior)

    adapter = adapter_of(net, forward)
    adapted(adapter, images())
    assert backend_of(adapter) == "vectorised"
    larger = torch.nn.functional.pad(images(), (0, 1, 0, 1))
    with pytest.warns(UserWarning, match=r"cannot be vectorised.*item\(\)"):
        found = adapted(adapter, larger)
    assert backend_of(adapter) == "loop"
    expected = adapted(adapter_of(toy(), backend="loop"), images())
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=0, atol=1e-10)


def test_wrong_numbers_are_noticed() -> None:
    net = toy()

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        inside = torch._C._functorch.is_functorch_wrapped_tensor(x)
        logits = forward_predict(net, x, prior)
        return logits * (1.01 if inside and prior is not None else 1.0)

    adapter = adapter_of(net, forward)
    with pytest.warns(UserWarning, match="outputs differ by .*, where .* may be rounding"):
        adapted(adapter, images())
    assert backend_of(adapter) == "loop"


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("gate", [None, 0.0])
def test_a_network_that_writes_into_its_inputs_spoils_no_pass(
    gate: float | None, backend: str
) -> None:
    net, inputs = toy(), images(4)

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        return forward_predict(net, x.mul_(1.5), prior)

    adapter = adapter_of(net, forward, backend=backend, gate=gate)
    found = adapted(adapter, inputs)
    assert torch.equal(inputs, images(4))
    if backend != "auto":
        assert backend_of(adapter) == backend
    expected = adapted(adapter_of(toy()), 1.5 * inputs)
    for name in ("outputs", "source_outputs", "distance_source", "distance_adapted"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


# What an answer is


def test_an_answer_is_made_with_the_weights_of_each_sample() -> None:
    net, inputs = toy(), images()

    def answer(x: Tensor) -> tuple[Tensor, Any]:
        logits = forward_predict(net, x, None)
        flipped = forward_predict(net, x.flip(-1), None)
        return logits, {"pair": (logits, flipped), "name": logits.argmax(1)}

    for backend in BACKENDS:
        adaptation = adapted(adapter_of(net, backend=backend), inputs, answer)
        logits, flipped = adaptation.answers["pair"]
        assert torch.equal(adaptation.answers["name"], logits.argmax(1))
        assert same([(adaptation.outputs, logits)])
        for index in range(6):
            alone = Settings(objective=PUBLISHED, lr=0.01, steps=2)
            adapter = BatchAdapter(net, takes_prior(net), softmax_label, alone)
            with adapter.adapted(inputs[index : index + 1]):
                expected = forward_predict(net, inputs[index : index + 1].flip(-1), None).detach()
            torch.testing.assert_close(flipped[index : index + 1], expected, rtol=0, atol=1e-10)


@both_backends
def test_an_answer_on_other_inputs_is_not_taken_from_the_record(backend: str) -> None:
    net, inputs = KINDS["mlp"].build(), images(4)
    settings: Any = {"parameters": ["head.*"], "backend": backend, "measure": False}

    def answer(x: Tensor) -> tuple[Tensor, Any]:
        return forward_predict(net, -x, None), None

    found = adapted(adapter_of(net, **settings), inputs, answer).outputs
    for index in range(4):
        alone = Settings(objective=PUBLISHED, lr=0.01, steps=2, parameters=["head.*"])
        adapter = BatchAdapter(net, takes_prior(net), softmax_label, alone)
        with adapter.adapted(inputs[index : index + 1]):
            expected = forward_predict(net, -inputs[index : index + 1], None).detach()
        assert found is not None
        torch.testing.assert_close(found[index : index + 1], expected, rtol=0, atol=1e-10)


# Precision


def runs_in_bfloat16(net: Any, inputs: Tensor) -> bool:
    """Whether torch itself can run a network so, which depends on the processor."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            net(inputs[:1])
    except RuntimeError as error:
        return "primitive" not in str(error)  # torch's own words, and no error of ours
    return True


@pytest.mark.parametrize("kind", ["mlp", "batch norm", "lstm", "vit"])
def test_autocast_gives_the_networks_own_data_type_in_both_backends(kind: str) -> None:
    net, inputs = KINDS[kind].build(torch.float32), KINDS[kind].batch(4, torch.float32)
    if kind == "lstm" and not runs_in_bfloat16(net, inputs):
        pytest.skip("torch has no LSTM in bfloat16 for this processor")

    def answer(x: Tensor) -> tuple[Tensor, Any]:
        outputs = forward_predict(net, x, None)
        return outputs, {"logits": outputs, "probabilities": outputs.float().softmax(1)}

    full = adapted(adapter_of(net, lr=1e-3), inputs, answer)
    assert full.outputs is not None
    with torch.autocast("cpu", torch.bfloat16):
        for backend in BACKENDS:
            adapter = adapter_of(net, lr=1e-3, backend=backend)
            found = adapted(adapter, inputs, answer)
            adapted(adapter, inputs, lambda x: (forward_predict(net, x, None), None))
            assert backend_of(adapter) == backend
            assert found.outputs is not None
            assert found.source_outputs is not None
            assert found.outputs.dtype == found.source_outputs.dtype == torch.bfloat16
            assert found.answers["logits"].dtype == torch.bfloat16
            assert found.answers["probabilities"].dtype == torch.float32
            difference = (found.outputs - full.outputs).abs().max()
            assert 0 < difference < 0.05 * full.outputs.abs().max()  # by bfloat16's rounding


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_stats": "batch"}, "each sample alone, but norm_stats='batch'"),
        ({"objective": Idempotence(balance=0.1)}, "balance terms need several"),
        ({"reset": "never"}, "its own weights, but reset='never' carries them"),
        ({"reset": 2}, "its own weights, but reset=2 carries them"),
        ({"compile": True, "backend": "loop"}, "not backend='loop'"),
        ({"scope": "batch", "compile": True}, "scope='batch' runs your network as it is"),
        ({"scope": "each"}, "scope in batch, sample, got 'each'"),
        ({"backend": "fast"}, "backend in auto, vectorised, loop, got 'fast'"),
        ({"chunk_size": 0}, "chunk_size 'auto' or N >= 1, got 0"),
        ({"chunk_size": True}, "chunk_size 'auto' or N >= 1, got True"),
        ({"memory": 0}, "memory > 0 bytes, got 0"),
        ({"gate": float("nan")}, "gate to be a distance or None, got NaN"),
    ],
)
def test_settings_refuse_what_a_single_sample_cannot_have(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"scope": "sample", **settings})


def test_a_reset_after_every_batch_is_taken() -> None:
    assert Settings(scope="sample", reset=1).episodic


def test_parameters_without_influence_are_refused_by_name() -> None:
    net = toy()
    adapter = adapter_of(net, parameters=["embed.*"])
    with pytest.raises(ValueError, match=r"influences.*embed.weight"):
        adapted(adapter, images(2))


@both_backends
def test_half_precision_moves_through_float32_masters(backend: str) -> None:
    net, inputs = toy().to(torch.bfloat16), images(4).to(torch.bfloat16)
    given: dict[str, Any] = {"steps": 20, "lr": 1e-4, "grad_clip": 1.0, "anchor": "ema"}
    found = adapted(adapter_of(net, backend=backend, **given), inputs)
    for index in range(4):
        alone = Settings(objective=PUBLISHED, **given)
        adapter = BatchAdapter(net, takes_prior(net), softmax_label, alone)
        with adapter.adapted(inputs[index : index + 1]) as expected:
            pass
        assert found.outputs is not None
        assert expected.outputs is not None
        difference = found.outputs[index : index + 1] - expected.outputs
        assert difference.abs().max() < 0.02  # units in the last place of outputs about 1
