"""Backend selection: which backend a batch takes, and how many samples at once."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from helpers.adapters import PUBLISHED, adapted, assert_close, sample_adapter
from helpers.fast import needs_fast_paths
from helpers.interrupting import process_state
from helpers.modules import drawn, images, toy
from helpers.reference import softmax_label
from helpers.times import Times
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, SampleAdapter, Settings, fast, per_sample
from it3_lightning.engine.fast import vmap
from it3_lightning.engine.restore import _Drawn
from it3_lightning.methods import Idempotence


def adapter_of(net: nn.Module, **given: Any) -> SampleAdapter:
    return sample_adapter(net, **{"lr": 1e-3, **given})


@needs_fast_paths
@pytest.mark.parametrize("faster", ["loop", "vectorised"])
def test_the_faster_backend_is_taken(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = Times(*((1.0, 2.0) if faster == "loop" else (2.0, 1.0)))
    monkeypatch.setattr(per_sample, "_timed", times)
    adapter = adapter_of(toy(), backend="auto")
    first = adapted(adapter, images(6))
    assert adapter.backend_selection is not None
    assert adapter.backend_selection.backend == faster
    expected = (
        f"backend {faster!r}: loop {1e3 * times.times['loop']:.3g}, vectorised "
        f"{1e3 * times.times['vectorised']:.3g} ms a sample, 6 at once"
    )
    assert str(adapter.backend_selection) == expected
    doubtful = [("vectorised", 6)] if faster == "loop" else []  # its first run may be slow
    assert times.asked == [("loop", 1), ("loop", 1), ("vectorised", 6), *doubtful]
    asked = len(times.asked)
    again = adapted(adapter, images(6))
    assert len(times.asked) == asked  # selected once
    assert first.outputs is not None
    torch.testing.assert_close(again.outputs, first.outputs)
    forwards = 4 if faster == "vectorised" else 6 * 4
    assert again.forwards == forwards


@needs_fast_paths
def test_a_much_slower_first_run_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Times(1.0, 5.0)
    monkeypatch.setattr(per_sample, "_timed", times)
    adapter = adapter_of(toy(), backend="auto")
    adapted(adapter, images(6))
    assert [name for name, _ in times.asked] == ["loop", "loop", "vectorised"]


def test_what_the_selection_runs_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples by the loop and one batch at once, and nothing is run for the choice alone."""
    monkeypatch.setattr(per_sample, "_timed", Times(2.0, 1.0))
    net, passes = toy(), []

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        passes.append(len(x))
        outputs: Tensor = net(x, prior)
        return outputs

    made = Settings(scope="sample", objective=PUBLISHED, lr=1e-3, measure=False)
    adapter = SampleAdapter(net, forward, softmax_label, made)
    adapted(adapter, images(6))
    counted = len(passes)
    adapted(adapter, images(6))
    # two samples one by one, the passes whose memory is measured, and those of a later batch; the
    # first batch also compares the gradients of a few samples, found layer by layer, with its own
    assert counted <= 2 * 3 + 2 + (len(passes) - counted) + 4


@needs_fast_paths
def test_a_much_larger_batch_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Times(1.0, 4.0)
    monkeypatch.setattr(per_sample, "_timed", times)
    adapter = adapter_of(toy(), backend="auto")
    backends = []
    for size in (3, 5, 2, 6, 11, 12, 64, 100, 200):
        times.times["vectorised"] = 4.0 if size < 12 else 0.5
        adapted(adapter, images(size))
        assert adapter.backend_selection is not None
        backends.append((size, adapter.backend_selection.backend))
    assert [samples for name, samples in times.asked if name == "vectorised"] == [3, 6, 12, 64]
    assert backends[4:6] == [(11, "loop"), (12, "vectorised")]


@pytest.mark.parametrize(
    ("size", "chunk_size", "tried", "serves"),
    [
        (5, 10, 3, True),
        (6, 10, 3, False),  # twice as many: time may be shared out otherwise
        (6, 5, 3, True),  # but no more than a chunk are adapted to at once
        (200, 100, 32, False),
        (200, 100, 33, True),  # and 64 tell of any number
    ],
)
def test_a_selection_serves_fewer_than_twice_the_samples_it_was_made_by(
    size: int, chunk_size: int, tried: int, serves: bool
) -> None:
    selection = per_sample.BackendSelection("vectorised", chunk_size, tried, "as asked for")
    assert selection.serves(size) is serves


@pytest.mark.parametrize("moved", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 0.01), (torch.bfloat16, 0.5)])
def test_backends_may_lie_apart_by_rounding_or_by_a_share_of_the_movement(
    moved: float, dtype: torch.dtype, share: float
) -> None:
    source = torch.tensor([[0.0, 1.0], [2.0, 4.0], [9.0, 9.0]], dtype=dtype)
    theirs = source + torch.tensor([[0.0, moved], [0.0, 0.0], [0.0, 0.0]], dtype=dtype)
    mine = theirs - 0.25
    mine[1, 0] = torch.nan  # tells nothing
    some = adapted(adapter_of(toy(), backend="loop"), images(2))
    first = replace(some, outputs=theirs[:2], source_outputs=source[:2])
    found = replace(some, outputs=mine, skipped=torch.zeros(3, dtype=torch.bool))
    told = theirs[:2].double().flatten()[[0, 1, 3]]
    spread = (told - told.mean()).square().mean().sqrt() + 1e-3 * told.abs().mean()
    rounding = float(min(1e3 * torch.finfo(dtype).eps, 0.05) * spread)
    assert per_sample._apart(first, found) == pytest.approx((0.25, max(rounding, share * moved)))
    nothing = replace(found, outputs=torch.full_like(mine, torch.inf))
    assert per_sample._apart(first, nothing) is None


def test_outputs_are_as_exact_as_the_arithmetic_that_made_them() -> None:
    full, half = torch.ones(1), torch.ones(1, dtype=torch.float16)
    units = [torch.finfo(each).eps for each in (torch.float32, torch.float16, torch.bfloat16)]
    assert [per_sample._unit(full), per_sample._unit(full, half)] == units[:2]
    with torch.autocast("cpu", torch.bfloat16):
        assert per_sample._unit(full, half) == units[2]


class Limited:
    """Vectorises no more than two samples, and notes how many it was given."""

    def __init__(self, adapter: SampleAdapter) -> None:
        self.vectorised: Any = adapter._vectorised
        self.sizes: list[int] = []

    def __call__(self, inputs: Tensor, answer: Any, conditions: Any) -> Adaptation:
        self.sizes.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        found: Adaptation = self.vectorised(inputs, answer, conditions)
        return found

    def release(self) -> None:
        """Do nothing."""


@needs_fast_paths
@pytest.mark.parametrize("first", [True, False])
def test_memory_that_runs_out_halves_the_chunk(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(toy(), chunk_size=6)
    expected = adapted(adapter_of(toy(), backend="loop"), images(6)).outputs
    if not first:
        adapted(adapter, images(6))
    limited = Limited(adapter)
    monkeypatch.setattr(adapter, "_vectorised", limited)
    with pytest.warns(UserWarning, match="no more than [31] sample") as told:
        found = adapted(adapter, images(6)).outputs
    assert [str(each.message).count("Memory ran out") for each in told] == [1, 1]
    assert limited.sizes == [6] * first + [6, 3, 1, 1, 1, 1, 1, 1]
    assert expected is not None
    assert_close(found, expected, 1e-10)
    selection = adapter.backend_selection
    assert selection is not None
    assert (selection.backend, selection.chunk_size) == ("vectorised", 1)
    assert selection.reason == ("memory ran out at first" if first else "as asked for")
    limited.sizes.clear()
    adapted(adapter, images(6))
    assert limited.sizes == [1] * 6  # remembered


@needs_fast_paths
def test_a_batch_is_adapted_to_by_chunks_from_the_first_one_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = adapter_of(toy(), chunk_size=2)
    limited = Limited(adapter)
    monkeypatch.setattr(adapter, "_vectorised", limited)
    expected = adapted(adapter_of(toy(), backend="loop"), images(5)).outputs
    assert expected is not None
    for _ in range(2):
        assert_close(adapted(adapter, images(5)).outputs, expected, 1e-10)
    assert limited.sizes == 2 * [2, 2, 1]


@needs_fast_paths
def test_memory_is_measured_of_attention_as_it_runs_in_vmap() -> None:
    net, fused = toy(), list[bool]()

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        fused.append(torch._C._get_flash_sdp_enabled())
        outputs: Tensor = net(x, prior)
        return outputs

    adapter = sample_adapter(net, forward, backend="vectorised", measure=False)
    adapted(adapter, images(3))
    # the passes that are measured, one sample by the loop, and those of all
    assert fused[:5] == [False, False, True, True, True]
    assert not any(fused[5:])
    assert torch._C._get_flash_sdp_enabled()


@needs_fast_paths
def test_what_watches_passes_is_taken_off_where_an_interruption_left_it_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> int:
        _Drawn().__enter__()  # type: ignore[no-untyped-call]
        raise KeyboardInterrupt

    before = process_state()
    monkeypatch.setattr(vmap, "bytes_kept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapted(adapter_of(toy()), images(3))
    assert process_state() == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("vmap: no rule"), False),
        (ValueError("allocate memory"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert per_sample._out_of_memory(error) is expected


@needs_fast_paths
def test_what_is_asked_for_is_taken_whatever_time_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Times(1.0, 2.0)
    monkeypatch.setattr(per_sample, "_timed", times)
    for backend in ("loop", "vectorised"):
        adapter = adapter_of(toy(), backend=backend)
        adapted(adapter, images(3))
        assert adapter.backend_selection is not None
        assert str(adapter.backend_selection) == f"backend {backend!r}: as asked for"


class Further(Idempotence):
    """Might ask for more than ``y0`` and the second prediction."""

    vmappable: ClassVar[bool] = False


@needs_fast_paths
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"objective": Further("l2", None)}, "Further asks for further passes"),
        ({"norm_stats": "mixed"}, "norm_stats='mixed' is not vectorised"),
    ],
)
def test_why_samples_are_looped_without_a_trial_is_said(given: dict[str, Any], reason: str) -> None:
    adapter = adapter_of(toy(), **{"backend": "auto", **given})
    expected = adapted(adapter_of(toy(), **{"backend": "loop", **given}), images(3)).outputs
    assert expected is not None
    assert_close(adapted(adapter, images(3)).outputs, expected, 1e-12)
    assert str(adapter.backend_selection) == f"backend 'loop': {reason}"


def test_without_fast_paths_samples_are_looped() -> None:
    with fast.disabled():
        adapter = adapter_of(toy(), backend="auto")
        adapted(adapter, images(3))
    assert str(adapter.backend_selection) == "backend 'loop': fast paths are turned off"


@pytest.mark.filterwarnings("ignore:The network cannot be vectorised")
@pytest.mark.parametrize("backend", ["loop", "vectorised"])
@pytest.mark.parametrize("steps", [0, 1])
def test_of_each_batch_it_is_said_whether_its_passes_drew_random_numbers(
    steps: int, backend: str
) -> None:
    net, noisy = toy(), True

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net(x, prior)
        return outputs * torch.rand(1).double() if noisy else outputs

    adapter = sample_adapter(net, forward, backend=backend, steps=steps)
    assert adapter.drawn is False
    adapted(adapter, images(2))
    assert adapter.drawn
    noisy = False
    adapted(adapter, images(2))
    assert not adapter.drawn


def test_outputs_of_more_rows_than_a_sample_has_are_refused() -> None:
    net = toy()

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        return torch.cat(2 * [net(x, prior)])[:2]

    adapter = sample_adapter(net, forward, backend="loop")
    with pytest.raises(ValueError, match=r"\(1, ...\) of one sample, got 2 rows.*\(3, 1, 4, 4\)"):
        adapted(adapter, images(3))


class Odd(nn.Module):
    """Uses a layer's weight by other ways than its call, for wide inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.embed, self.head = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        features = self.body(x[:, :4])
        if x.shape[1] > 4:
            features = features + nn.functional.linear(x[:, -4:], self.body.weight)
        if prior is not None:
            features = features + self.embed(prior)
        logits: Tensor = self.head(features.tanh())
        return logits


def rows(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, width, generator=generator, dtype=torch.float64)


def assert_is_looped(adapter: SampleAdapter, net: nn.Module, x: Any, **given: Any) -> None:
    expected = adapted(adapter_of(net, backend="loop", **given), x).outputs
    assert expected is not None
    assert_close(adapted(adapter, x).outputs, expected, 1e-9)


@pytest.mark.parametrize("optimizer", ["adam", lambda p: torch.optim.SGD(p, lr=0.1)])
def test_gradients_found_right_for_some_shapes_are_not_trusted_for_others(optimizer: Any) -> None:
    net = drawn(Odd())
    adapter = adapter_of(net, optimizer=optimizer)
    for width in (4, 4, 8, 8, 4, 8):
        assert_is_looped(adapter, net, rows(width), optimizer=optimizer)


@needs_fast_paths
def test_a_layer_with_other_code_is_found_out_about_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    net = toy()
    adapter, selected = adapter_of(net), []
    own = adapter._selecting

    def selecting(*given: Any) -> Any:
        selected.append(1)
        return own(*given)

    monkeypatch.setattr(adapter, "_selecting", selecting)
    for _ in range(2):
        adapted(adapter, images(6))
        assert len(selected) == 1
    net.dense.register_forward_hook(lambda _, __, output: 3 * output)
    net.dense.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    assert_is_looped(adapter, net, images(6))
    assert len(selected) == 2
    monkeypatch.setattr(type(net.bn), "forward", lambda _, x: 2 * x)
    assert_is_looped(adapter, net, images(6))
    assert len(selected) == 3


def test_outputs_keep_the_data_type_of_each_precision() -> None:
    net = toy().float()
    adapter = adapter_of(net)
    x = images(6).float()
    for low in (True, False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            found = adapted(adapter, x).outputs
        assert found is not None
        assert found.dtype == (torch.bfloat16 if low else torch.float32)


class CompiledBody(nn.Module):
    """A body that is compiled, and a head that is not."""

    def __init__(self, *, compiled: bool) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.body: Any = torch.compile(body, backend="eager") if compiled else body
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        features = self.body(x)
        if prior is not None:
            features = features + self.embed(prior)
        logits: Tensor = self.head(features)
        return logits


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_compiler_did_before_does_not_matter(whole: bool) -> None:
    """Graphs that were made for other modes and shapes are no part of what samples adapt by."""
    torch._dynamo.reset()
    plain = drawn(CompiledBody(compiled=False))
    net: Any = drawn(CompiledBody(compiled=not whole))
    if whole:
        net.body.compile(backend="eager")
    net.body.requires_grad_(False)  # as while a conditioning is trained
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            net(rows(4))
            net(rows(4), rows(3))
    net.body.requires_grad_(True)
    adapter = adapter_of(net, lr=0.1, optimizer="sgd")
    for seed in range(3):
        assert_is_looped(adapter, plain, rows(4, seed), lr=0.1, optimizer="sgd")


def test_a_network_that_is_compiled_later_is_adapted_to_as_before() -> None:
    torch._dynamo.reset()
    net: Any = drawn(CompiledBody(compiled=False))
    adapter = adapter_of(net)
    expected = [adapted(adapter, rows(4, seed)).outputs for seed in range(3)]
    net.body.compile(backend="eager")
    for seed in range(3):
        assert expected[seed] is not None
        assert_close(adapted(adapter, rows(4, seed)).outputs, expected[seed], 1e-9)  # type: ignore[arg-type]


@needs_fast_paths
def test_flags_of_the_process_come_back_whichever_thread_ends_last() -> None:
    def flags() -> list[Any]:
        attention = torch.backends.mha.get_fastpath_enabled()
        return [attention, torch._C._get_mkldnn_enabled(), torch._C._get_math_sdp_enabled()]

    before, net = flags(), nn.Sequential(nn.LSTM(2, 2), nn.TransformerEncoderLayer(2, 1))
    held = [vmap.vmappable(net, holder) for holder in ("one thread", "another")]
    for each in held:
        each.__enter__()
    assert flags() != before
    for each in held:  # the first to come is the first to go
        assert flags() != before
        each.__exit__(None, None, None)
    assert flags() == before
