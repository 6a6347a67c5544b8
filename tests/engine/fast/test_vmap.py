"""Vectorised samples: layers that torch.func takes; what it cannot take is looped."""

import threading
import warnings
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.adapters import adapted, assert_is_reference, backend_of, by_reference, sample_adapter
from helpers.fast import needs_fast_paths
from helpers.modules import images, same, toy
from helpers.reference import adapt_stream, forward_predict, softmax_label
from helpers.zoo import KINDS, rows
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from it3_lightning.engine import Forward, SampleAdapter
from it3_lightning.engine.fast import vmap
from it3_lightning.engine.fast.vmap import release_switches, uncompiled
from it3_lightning.methods import Objective


def two_steps(net: nn.Module, forward: Forward | None = None, **given: Any) -> SampleAdapter:
    return sample_adapter(net, forward, **{"steps": 2, **given})


@needs_fast_paths
def test_recurrent_layers_of_all_kinds_are_vectorised() -> None:
    class Recurrent(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(3, 3)

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            if isinstance(self.layer, nn.RNNCellBase):
                out: Any = self.layer(x[:, 0, 0])
                out = out[0] if isinstance(out, tuple) else out
            else:
                out = self.layer(x.squeeze(1))[0][:, -1, -3:]
            logits: Tensor = self.head(out)
            return logits if prior is None else logits + prior

    layers = [
        nn.GRU(4, 3, batch_first=True),
        nn.GRU(4, 3, num_layers=2, batch_first=True, bidirectional=True),
        nn.RNN(4, 3, batch_first=True),
        nn.LSTM(4, 5, proj_size=3, batch_first=True),
        nn.LSTMCell(4, 3),
        nn.GRUCell(4, 3),
        nn.RNNCell(4, 3),
    ]
    for layer in layers:
        net, inputs = Recurrent(layer).double().eval(), images(3)
        records = by_reference(net, inputs, lr=0.01, optimizer="adam", steps=2)
        adapter = sample_adapter(net, steps=2)
        assert_is_reference(adapted(adapter, inputs), records, 1e-10)
        assert backend_of(adapter) == "vectorised"


@needs_fast_paths
@pytest.mark.parametrize("kind", ["lstm", "transformer", "vit"])
def test_no_operation_runs_sample_by_sample(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "filterwarnings", lambda *_, **__: None)  # torch's stay errors
    for dtype in (torch.float32, torch.float64):
        net, inputs = KINDS[kind].build(dtype), KINDS[kind].batch(3, dtype)
        adapter = sample_adapter(net, enters=KINDS[kind].enters, steps=2)
        adapted(adapter, inputs)
        assert backend_of(adapter) == "vectorised"


@needs_fast_paths
@pytest.mark.parametrize("large", [1, 1 << 20])
def test_passes_of_large_weights_are_counted_by_the_sample(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmap, "_LARGE", large)
    adapter = two_steps(toy())
    for _ in range(2):
        answered = 4 if large == 1 else 1  # one by one: to read the weights takes the time
        assert adapted(adapter, images(4)).forwards == 2 * 2 + answered + 1


@needs_fast_paths
def test_the_time_is_that_of_adapting_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = two_steps(toy())
    adapted(adapter, images(4))
    times = iter([10.0, 12.5])
    monkeypatch.setattr(vmap, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert adapted(adapter, images(4)).seconds == 2.5


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


@needs_fast_paths
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
    adapter = two_steps(net, backend=backend)
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


@dataclass
class Image:
    """An input as a dataclass."""

    x: Tensor


HELD: dict[str, Callable[[Tensor], Any]] = {
    "UserDict": lambda x: UserDict(x=x),
    "Image": Image,
    "PackedSequence": lambda x: pack_sequence(list(x.flatten(1)[:, :, None])),
}


@needs_fast_paths
@pytest.mark.parametrize("kind", HELD)
def test_containers_that_torch_func_does_not_open_are_named(kind: str) -> None:
    net = toy()

    def forward(held: Any, prior: Tensor | None) -> Tensor:
        if isinstance(held, PackedSequence):
            padded, _ = pad_packed_sequence(held, batch_first=True)
            x = padded.reshape(-1, 1, 4, 4)
        else:
            x = held.x if isinstance(held, Image) else held["x"]
        return forward_predict(net, x, prior)

    adapter = two_steps(net, forward)
    message = rf"tensors in tuples, lists and dicts, not in a {kind}\."
    with pytest.warns(UserWarning, match=message):
        found = adapted(adapter, HELD[kind](images(3)))
    assert backend_of(adapter) == "loop"
    expected = adapted(two_steps(toy(), backend="loop"), images(3)).outputs
    torch.testing.assert_close(found.outputs, expected, rtol=0, atol=1e-12)


@needs_fast_paths
def test_objects_that_hold_no_tensor_are_shared_by_all_samples() -> None:
    net = toy()

    def forward(inputs: Any, prior: Tensor | None) -> Tensor:
        assert inputs["mode"] == UserDict(scale="one")
        return forward_predict(net, inputs["x"], prior)

    adapter = two_steps(net, forward)
    found = adapted(adapter, {"x": images(3), "mode": UserDict(scale="one"), "none": None})
    assert backend_of(adapter) == "vectorised"
    expected = adapted(two_steps(toy(), backend="loop"), images(3)).outputs
    torch.testing.assert_close(found.outputs, expected, rtol=0, atol=1e-10)


def steep(y: Tensor, bad: Tensor) -> Tensor:
    """Add a zero of infinite slope."""
    return y + torch.where(bad, y - y.detach(), 1.0).sqrt() * bad


BAD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "output": (lambda y, bad: y * torch.where(bad, torch.inf, 1.0), "non-finite output"),
    "loss": (lambda y, bad: torch.where(bad, 1e99 * 1e99 * y, y), "non-finite loss"),
    "gradient": (steep, "non-finite gradient or weights"),
    "output after the step": (lambda y, bad: torch.where(bad, 1e140 * y, y), "non-finite output"),
}


@needs_fast_paths
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", BAD)
def test_of_a_sample_that_is_skipped_it_is_said_why(kind: str, steps: int) -> None:
    net, x = nn.Linear(2, 2).double(), torch.tensor([[1.0, 2.0], [9.0, 1.0], [0.0, 1.0]]).double()
    spoilt, reason = BAD[kind]

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        return spoilt(net(x), x[:, :1] == 9)

    made: dict[str, Any] = {"objective": Squares(), "optimizer": "sgd", "lr": 0.1, "steps": steps}
    for backend in ("loop", "vectorised"):
        adapter = sample_adapter(net, forward, backend=backend, to_label=lambda y: y, **made)
        adapted(adapter, x[[0, 2]])
        found = adapted(adapter, x)
        assert backend_of(adapter) == backend
        assert found.skipped.tolist() == [False, True, False]
        assert found.reason == reason
        assert found.outputs is not None
        assert torch.equal(found.outputs[1:2], forward(x[1:2], None)) or kind == "output"
        for distance in (found.distance_source, found.distance_adapted):
            assert distance is not None
            assert distance.isnan().tolist() == [False, True, False]
        assert found.reliable is not None
        assert found.reliable.tolist() == [True, False, True]


class Squares:
    """Lowers the mean square of the outputs."""

    needs_batch = False

    def __call__(self, y0: Tensor, second: Any) -> Objective:
        measure = y0.square().mean(1)
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))


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


@needs_fast_paths
@pytest.mark.parametrize("kind", MIXING)
def test_an_optimizer_that_mixes_elements_is_looped(kind: str) -> None:
    net, inputs = toy(), images(4)
    adapter = two_steps(net, optimizer=MIXING[kind], backend="auto")
    with pytest.warns(UserWarning, match="may mix the samples' weights"):
        found = adapted(adapter, inputs)
    assert backend_of(adapter) == "loop"
    expected = adapted(two_steps(toy(), optimizer=MIXING[kind], backend="loop"), inputs)
    assert same([(found.outputs, expected.outputs)])


@needs_fast_paths
def test_wrong_numbers_are_noticed() -> None:
    net = toy()

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        inside = torch._C._functorch.is_functorch_wrapped_tensor(x)
        logits = forward_predict(net, x, prior)
        return logits * (1.01 if inside and prior is not None else 1.0)

    adapter = two_steps(net, forward)
    with pytest.warns(UserWarning, match="outputs differ by .*, where .* may be rounding"):
        adapted(adapter, images())
    assert backend_of(adapter) == "loop"


def test_compiled_code_runs_as_written_until_the_outermost_user_is_done() -> None:
    def stance() -> str:
        return str(eval_frame._stance.stance)

    before, other = stance(), []
    with uncompiled():
        with uncompiled():
            assert stance() == "force_eager"
        assert stance() == "force_eager"
        thread = threading.Thread(target=lambda: other.append(run_within()))
        thread.start()
        thread.join()
        assert stance() == "force_eager"  # this thread still needs it
    assert other == ["force_eager"]
    assert stance() == before


def test_compiled_code_runs_again_where_turning_it_off_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, off = eval_frame._stance, vmap._COMPILED.off

    def interrupted(holder: object) -> bool:
        off(holder)
        raise KeyboardInterrupt

    monkeypatch.setattr(vmap._COMPILED, "off", interrupted)
    with pytest.raises(KeyboardInterrupt), uncompiled():
        pass
    assert eval_frame._stance == before


def run_within() -> str:
    with uncompiled():
        return str(eval_frame._stance.stance)


def test_what_an_interruption_left_off_is_let_go_by_the_holder() -> None:
    before = eval_frame._stance
    lost = uncompiled()
    lost.__enter__()  # and its end never comes
    assert eval_frame._stance != before
    release_switches(object())
    assert eval_frame._stance == before
