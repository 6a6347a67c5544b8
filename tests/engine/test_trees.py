"""Inputs of every structure: which tensors hold the samples, and each sample as if alone."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers.adapters import PUBLISHED, WAYS, adapted, any_adapter, assert_close, going
from helpers.modules import bits, changed, drawn, same
from helpers.reference import Record, adapt_stream, forward_predict, softmax_label
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from it3_lightning.engine import Settings, adapt, batch_size
from it3_lightning.engine.trees import divisible, laid_out, leaves_of, taken, told_dims

drawing = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass
class Parts:
    """Inputs as a dataclass, which torch's trees do not know."""

    x: Tensor
    extra: Tensor
    t: Tensor


Make = Callable[[Tensor, Tensor, Tensor], Any]

MAKES: dict[str, Make] = {
    "tuple": lambda x, extra, t: (x, extra, t),
    "dict": lambda x, extra, t: {"x": x, "extra": extra, "t": t},
    "nested": lambda x, extra, t: {"x": [x, (extra, None)], "t": t, "mode": "plain"},
    "user dict": lambda x, extra, t: UserDict(x=x, extra=extra, t=t),
    "dataclass": Parts,
}


def parts_of(inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the containers hold, whichever it is."""
    if isinstance(inputs, tuple):
        return inputs
    if isinstance(inputs, Parts):
        return inputs.x, inputs.extra, inputs.t
    if isinstance(inputs["x"], list):
        return inputs["x"][0], inputs["x"][1][0], inputs["t"]
    return inputs["x"], inputs["extra"], inputs["t"]


class Weighted(nn.Module):
    """Sums what is seen at each time, weighted by a table ``(T,)`` that all samples share."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.seen, self.beside = nn.Linear(3, 4), nn.Linear(2, 4)
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, inputs: Any, prior: Tensor | None = None) -> Tensor:
        x, extra, t = parts_of(inputs)
        x = x.movedim(self.dim, 0)
        features = (self.seen(x).tanh() * t[None, :, None]).sum(1) + self.beside(extra)
        if prior is not None:
            features = features + self.embed(prior)
        logits: Tensor = self.head(features.tanh())
        return logits


def tensors(size: int, times: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (size, times, 3), (size, 2), (times,)
    x, extra, t = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x, extra, t


def alone(net: nn.Module, x: Tensor, extra: Tensor, t: Tensor, steps: int) -> list[Record]:
    """Run the reference on each sample, taken out by hand."""
    dim = getattr(net, "dim", 0)
    singles = [
        {"x": x[i : i + 1].movedim(0, dim), "extra": extra[i : i + 1], "t": t}
        for i in range(len(x))
    ]
    return adapt_stream(
        net,
        singles,
        predict=forward_predict,
        to_label=softmax_label,
        steps=steps,
        lr=0.01,
        optimizer="adam",
    )


def adaptation_of(net: nn.Module, inputs: Any, way: str, dims: Any = None, **more: Any) -> Any:
    made = Settings(objective=PUBLISHED, lr=0.01, optimizer="adam", **going(way), **more)
    return adapt(
        net,
        inputs,
        forward=net,
        to_label=softmax_label,
        settings=made,
        sample_dims=None if dims is None else lambda _: dims,
    )


sizes = st.integers(1, 4)
times = st.integers(5, 7)  # no batch is as large
kinds = st.sampled_from(sorted(MAKES))


@pytest.mark.filterwarnings("ignore:The network cannot be vectorised")  # containers of one's own
@pytest.mark.parametrize("way", ["loop", "vectorised"])
@drawing
@given(kind=kinds, size=sizes, time=times, steps=st.integers(1, 2), strided=st.booleans())
def test_each_sample_is_adapted_to_as_if_alone(
    way: str, kind: str, size: int, time: int, steps: int, strided: bool
) -> None:
    net, (x, extra, t) = drawn(Weighted()), tensors(size, time)
    expected = torch.cat([r.outputs for r in alone(net, x, extra, t, steps)])
    given_x = x.mT.contiguous().mT if strided else x  # not contiguous
    inputs = MAKES[kind](given_x, extra, t)
    before, kept = bits(net), [part.clone() for part in (x, extra, t)]
    found = adaptation_of(net, inputs, way, steps=steps)
    assert_close(found.outputs, expected, 1e-9)
    assert changed(before, net) == []
    assert all(map(torch.equal, parts_of(inputs), kept))


@pytest.mark.filterwarnings("ignore:The network cannot be vectorised")
@pytest.mark.parametrize("way", WAYS)
@drawing
@given(kind=kinds, size=st.integers(0, 4), time=times)
def test_no_step_is_a_plain_run(way: str, kind: str, size: int, time: int) -> None:
    net, held = drawn(Weighted()), tensors(size, time)
    inputs = MAKES[kind](*held)
    with torch.no_grad():
        expected = net(inputs)
    found = adaptation_of(net, inputs, way, steps=0)
    assert torch.equal(found.outputs, expected)
    assert len(found.skipped) == size


@pytest.mark.filterwarnings("ignore:The network cannot be vectorised")
@pytest.mark.parametrize("way", ["loop", "vectorised"])
@drawing
@given(
    kind=st.sampled_from(["tuple", "dict", "user dict", "dataclass"]),
    size=sizes,
    time=st.integers(1, 5),
    dim=st.integers(0, 1),
)
def test_dimensions_that_are_told_hold_whatever_the_sizes(
    way: str, kind: str, size: int, time: int, dim: int
) -> None:
    """A shared table may be as long as the batch, and sequences may come first."""
    net, (x, extra, t) = drawn(Weighted(dim)), tensors(size, time)
    expected = torch.cat([r.outputs for r in alone(net, x, extra, t, 1)])
    inputs = MAKES[kind](x.movedim(0, dim).contiguous(), extra, t)
    dims: Any = (dim, 0, None) if kind == "tuple" else {"x": dim, "t": None}
    assert_close(adaptation_of(net, inputs, way, dims).outputs, expected, 1e-9)
    chunked = adaptation_of(net, inputs, way, dims, chunk_size=max(1, time - 1))
    assert_close(chunked.outputs, expected, 1e-9)


@drawing
@given(kind=kinds, size=st.integers(2, 4), way=st.sampled_from(["loop", "vectorised"]))
def test_a_shared_tensor_as_long_as_the_batch_is_refused(kind: str, size: int, way: str) -> None:
    net = drawn(Weighted())
    inputs = MAKES[kind](*tensors(size, size))
    with pytest.raises(ValueError, match=rf"\({size},\).*it3_sample_dims.*sample_dims.*scope="):
        adaptation_of(net, inputs, way)


@drawing
@given(chunk=st.integers(1, 5))
def test_a_shared_tensor_as_long_as_a_chunk_is_not_cut_up(chunk: int) -> None:
    net, (x, extra, t) = drawn(Weighted()), tensors(7, chunk)
    expected = torch.cat([r.outputs for r in alone(net, x, extra, t, 1)])
    inputs = {"x": x, "extra": extra, "t": t}
    found = adaptation_of(net, inputs, "vectorised", chunk_size=chunk)
    assert_close(found.outputs, expected, 1e-9)


@drawing
@given(time=st.integers(1, 6), size=st.integers(2, 6), level=st.floats(0, 0.05))
def test_a_gate_steps_on_its_samples_whatever_else_there_is(
    time: int, size: int, level: float
) -> None:
    """Samples within the gate have no share, found by hand: the loss is the mean of the others."""
    net, (x, extra, t) = drawn(Weighted()), tensors(size, time)
    inputs = {"x": x, "extra": extra, "t": t}
    told = adaptation_of(net, inputs, "batch", {"t": None}, gate=level, steps=1)
    rows = (~told.gated).nonzero()[:, 0]
    if len(rows):
        part = {"x": x[rows], "extra": extra[rows], "t": t}
        weights = adaptation_of(net, part, "batch", {"t": None}, steps=1).weights
        with torch.no_grad():
            expected = torch.func.functional_call(net, weights, (inputs,))
    else:
        expected = net(inputs).detach()
    assert_close(told.outputs, expected, 1e-9)
    assert_close(adaptation_of(net, inputs, "batch", gate=level, steps=1).outputs, expected, 1e-9)


class Last(nn.Module):
    """The last state of a GRU over sequences: packed, ``(B, T, C)`` or ``(T, B, C)``."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=batch_first)
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Any, prior: Tensor | None = None) -> Tensor:
        features = self.rnn(x)[1][-1]
        if prior is not None:
            features = features + self.embed(prior)
        logits: Tensor = self.head(features)
        return logits


def sequences(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in lengths]


def packed(parts: list[Tensor]) -> PackedSequence:
    return pack_sequence(parts, enforce_sorted=False)


@pytest.mark.filterwarnings("ignore:The network cannot be vectorised")
@drawing
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), way=st.sampled_from(WAYS[1:]))
def test_packed_sequences_are_samples(lengths: list[int], way: str) -> None:
    net, parts = drawn(Last()), sequences(lengths)
    one = [adaptation_of(net, packed([part]), "batch").outputs for part in parts]
    assert_close(adaptation_of(net, packed(parts), way).outputs, torch.cat(one), 1e-9)
    assert batch_size(packed(parts)) == len(parts)


@pytest.mark.parametrize(("time", "size"), [(5, 3), (3, 5), (4, 4), (4, 1)])
@pytest.mark.parametrize("way", WAYS[1:])
def test_sequences_that_come_first_are_refused_until_told(time: int, size: int, way: str) -> None:
    net = drawn(Last(batch_first=False))
    x = torch.stack(sequences([time] * size), 1)
    with pytest.raises(ValueError, match="it3_sample_dims"):
        adaptation_of(net, x, way)
    one = [adaptation_of(net, x[:, i : i + 1], "batch").outputs for i in range(size)]
    assert_close(adaptation_of(net, x, way, 1).outputs, torch.cat(one), 1e-9)


@pytest.mark.parametrize("rows", [range(4), range(1, 3), range(0, 4, 2), range(3, 0, -1), range(0)])
def test_rows_are_taken_by_any_range_without_a_copy_where_they_lie_together(rows: range) -> None:
    x = torch.randn(4, 3)
    part = taken(x, rows)
    assert torch.equal(part, x[list(rows)])
    together = rows.step == 1 and len(rows) > 0
    assert (part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == together


def test_packed_sequences_are_one_whole_and_taken_in_any_order() -> None:
    parts = sequences([2, 5, 3])
    whole = packed(parts)
    (leaf,) = leaves_of({"x": [whole]})
    assert leaf is whole
    some, expected = taken(whole, [2, 1]), packed([parts[2], parts[1]])
    assert torch.equal(some.data, expected.data)
    assert torch.equal(some.batch_sizes, expected.batch_sizes)
    assert same([(some.sorted_indices, expected.sorted_indices)])


def test_samples_of_a_network_that_takes_sequences_first_are_in_doubt() -> None:
    x = torch.zeros(2, 3)
    assert divisible(x, 2, nn.Linear(3, 3))
    assert not divisible(x, 2, nn.Sequential(nn.LSTM(3, 3)))


class Pair(NamedTuple):
    """Inputs by name."""

    x: Tensor
    mode: str


def test_dimensions_are_told_of_tensors_alone_and_named_tuples_stay_such() -> None:
    pair = Pair(torch.zeros(3, 2), "plain")
    ((tensor, dim),) = told_dims(pair, (1, None))
    assert tensor is not None
    assert (tensor.shape, dim) == ((3, 2), 1)
    made = laid_out(pair, (0, None))
    assert isinstance(made, Pair)
    assert made.x is pair.x


@pytest.mark.filterwarnings("ignore:Sparse")  # CSR is beta, says torch
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@drawing
@given(size=sizes, rows=st.permutations(range(3)))
def test_rows_of_sparse_tensors_are_those_of_dense_ones(
    layout: torch.layout, size: int, rows: list[int]
) -> None:
    dense = torch.randn(max(size, 4), 4).relu()
    part = taken(dense.to_sparse(layout=layout), rows)
    assert part.layout == layout
    assert torch.equal(part.to_dense(), dense[rows])


class Columns(nn.Module):
    """A linear map of sparse rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 4))
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        features = torch.sparse.mm(x, self.table) if x.layout != torch.strided else x @ self.table
        if prior is not None:
            features = features + self.embed(prior)
        logits: Tensor = self.head(features.tanh())
        return logits


@pytest.mark.filterwarnings("ignore:The network cannot be vectorised", "ignore:Sparse")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [0, 1])
def test_sparse_inputs_do_as_dense_ones(way: str, steps: int) -> None:
    net, dense = drawn(Columns()), torch.eye(4, dtype=torch.float64)[:3]
    expected = adaptation_of(net, dense, way, steps=steps).outputs
    found = adaptation_of(net, dense.to_sparse(), way, steps=steps).outputs
    assert_close(found, expected, 1e-9)


class Words(nn.Module):
    """Means of embedded words."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4, sparse=sparse)
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        features = self.words(x).mean(1)
        if prior is not None:
            features = features + self.embed(prior)
        logits: Tensor = self.head(features.tanh())
        return logits


@pytest.mark.filterwarnings("ignore:The network cannot be vectorised")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "polyak"])
@pytest.mark.parametrize("steps", [1, 2])
def test_sparse_gradients_do_as_dense_ones(way: str, optimizer: Any, steps: int) -> None:
    outputs = []
    for sparse in (True, False):
        net, words = drawn(Words(sparse=sparse)), torch.tensor([[0, 1], [2, 2], [5, 0]])
        made = {"optimizer": optimizer, "lr": 0.1, "steps": steps, "objective": PUBLISHED}
        outputs.append(adapted(any_adapter(net, way, **made), words).outputs)
    assert outputs[1] is not None
    assert_close(outputs[0], outputs[1], 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_batch_of_no_samples_is_passed_on(way: str, steps: int) -> None:
    net, (x, extra, t) = drawn(Weighted()), tensors(3, 5)
    adapter = any_adapter(net, way, steps=steps)
    first = adapted(adapter, (x, extra, t)).outputs
    none = adapted(adapter, (x[:0], extra[:0], t))
    assert none.outputs is not None
    assert none.outputs.shape == (0, 3)
    assert none.skipped.shape == (0,)
    assert none.reason is None
    assert_close(adapted(adapter, (x, extra, t)).outputs, first, 0)  # type: ignore[arg-type]


def test_packed_sequences_and_tensors_hold_as_many_samples() -> None:
    inputs = {"x": packed(sequences([2, 5, 3])), "t": torch.zeros(3)}
    assert laid_out(inputs, 0)["x"] is inputs["x"]
    with pytest.raises(ValueError, match=r"got 3 in inputs\['x'\], 4 in inputs\['t'\]"):
        laid_out({**inputs, "t": torch.zeros(4)}, 0)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"y": 0}, r"structure of inputs, a dict with x, t, got {'y': 0}"),
        ({"x": 3}, r"dimension of the samples of inputs\['x'\], of shape \(2, 4\), or None"),
        ({"x": 1}, r"as many samples in every tensor, got 4 in inputs\['x'\], 5 in inputs\['t'\]"),
    ],
)
def test_dimensions_that_cannot_be_are_refused(dims: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        laid_out({"x": torch.zeros(2, 4), "t": torch.zeros(5)}, dims)
