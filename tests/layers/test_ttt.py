"""TTT layers: the dual form is the loop over tokens, and a stream is the sequence."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.ttt import primal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from it3_lightning.layers import TTTMLP, TTTLinear, TTTState

Kind = type[TTTLinear] | type[TTTMLP]
Layer = TTTLinear | TTTMLP

both = pytest.mark.parametrize("kind", [TTTLinear, TTTMLP])


def made(kind: Kind, *, mini_batch: int = 4, causal: bool = True, dim: int = 8) -> Layer:
    """Return a layer of two heads in double precision whose every parameter matters."""
    torch.manual_seed(0)
    layer = kind(dim, 2, mini_batch=mini_batch, causal=causal, base_lr=2.0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def tokens(number: int, *, batch: int = 2, dim: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(batch, number, dim, dtype=torch.float64, generator=generator)


def streamed(layer: Layer, sequence: Tensor, state: TTTState | None = None) -> Tensor:
    outputs = []
    for token in sequence.unbind(1):
        output, state = layer.step(token, state)
        outputs.append(output)
    return torch.stack(outputs, 1)


def gradients(layer: Layer, run: Callable[[Tensor], Tensor], sequence: Tensor) -> Iterator[Tensor]:
    """Yield what an outer loss gives to the sequence and to every parameter."""
    sequence = sequence.clone().requires_grad_()
    outputs = run(sequence)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)
    yield from torch.autograd.grad((outputs * weights).sum(), [sequence, *layer.parameters()])


@both
@pytest.mark.parametrize(
    ("mini_batch", "length"), [(1, 3), (4, 1), (4, 8), (4, 11), (16, 5), (16, 16), (16, 21)]
)
def test_the_dual_form_is_the_loop_over_tokens(kind: Kind, mini_batch: int, length: int) -> None:
    layer, sequence = made(kind, mini_batch=mini_batch), tokens(length)
    torch.testing.assert_close(layer(sequence), primal(layer, sequence), rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize("causal", [True, False])
def test_outer_gradients_are_those_of_the_loop_over_tokens(kind: Kind, causal: bool) -> None:
    layer, sequence = made(kind, causal=causal), tokens(6)
    expected = gradients(layer, lambda x: primal(layer, x), sequence)
    for ours, theirs in zip(gradients(layer, layer, sequence), expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@both
@pytest.mark.parametrize("length", [3, 4, 9])
def test_a_stream_is_the_sequence_and_so_are_its_gradients(kind: Kind, length: int) -> None:
    layer, sequence = made(kind), tokens(length)
    torch.testing.assert_close(streamed(layer, sequence), layer(sequence))
    of_stream = gradients(layer, lambda x: streamed(layer, x), sequence)
    for ours, theirs in zip(gradients(layer, layer, sequence), of_stream, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_a_sequence_may_come_in_pieces_of_any_size(sizes: list[int]) -> None:
    layer, sequence = made(TTTMLP), tokens(sum(sizes))
    state, outputs = None, []
    for piece in sequence.split(sizes, 1):  # type: ignore[no-untyped-call]
        output, state = layer.extend(piece, state)
        outputs.append(output)
    assert state is not None
    assert state.position == sum(sizes) % 4
    torch.testing.assert_close(torch.cat(outputs, 1), layer(sequence))
    last = layer.extend(sequence)[1]
    for ours, theirs in zip((*state[0], *state[1]), (*last[0], *last[1]), strict=True):
        torch.testing.assert_close(ours, theirs)


@both
@pytest.mark.parametrize("length", [1, 6])
def test_without_order_all_tokens_train_and_then_ask(kind: Kind, length: int) -> None:
    layer, sequence = made(kind, causal=False), tokens(length)
    torch.testing.assert_close(layer(sequence), primal(layer, sequence), rtol=0, atol=1e-6)
    order = torch.randperm(length)
    torch.testing.assert_close(layer(sequence[:, order]), layer(sequence)[:, order])


@both
@pytest.mark.parametrize("causal", [True, False])
def test_at_rate_zero_the_initial_weights_answer(kind: Kind, causal: bool) -> None:
    layer, sequence = made(kind, causal=causal), tokens(1)  # at position 0 nothing is turned
    with torch.no_grad():
        layer.position_rate.fill_(-1)  # max(0, 1 / i - 1)
    query = layer.query(sequence).unflatten(-1, (2, 4)).transpose(1, 2)
    w, b, *second = layer.initial
    z = query @ w + b
    if second:
        z = nn.functional.gelu(z, approximate="tanh") @ second[0] + second[1]
    outputs = query + layer.inner_norm(z)
    expected = layer.output(layer.post_norm(outputs.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(layer(sequence), expected)
    torch.testing.assert_close(layer(tokens(9))[:, :1], layer(tokens(9)[:, :1]))


@both
def test_no_output_depends_on_later_tokens_or_other_sequences(kind: Kind) -> None:
    layer, sequence = made(kind), tokens(10).requires_grad_()
    outputs = layer(sequence)
    for row, place in itertools.product(range(2), (0, 3, 4, 9)):
        (depends,) = torch.autograd.grad(outputs[row, place].sum(), sequence, retain_graph=True)
        assert depends[row, : place + 1].abs().amax(1).min() > 0
        assert depends[row, place + 1 :].abs().sum() == 0
        assert depends[1 - row].abs().sum() == 0


@both
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_finite_differences(kind: Kind, causal: bool) -> None:
    layer = made(kind, mini_batch=2, causal=causal, dim=4)
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}

    def run(sequence: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        outputs: Tensor = torch.func.functional_call(layer, given, (sequence,))
        return outputs

    sequence = tokens(3, batch=1, dim=4).requires_grad_()
    assert torch.autograd.gradcheck(run, (sequence, *parameters.values()), fast_mode=True)


@both
def test_half_precision_loses_no_more_than_its_projections_do(kind: Kind) -> None:
    torch.manual_seed(0)
    layer, sequence = kind(32, 2), torch.randn(2, 50, 32)
    expected, state = layer.extend(sequence)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, mixed_state = layer.extend(sequence)
        in_half = layer(sequence.bfloat16())
    half = kind(32, 2).bfloat16()
    half.load_state_dict(layer.state_dict())
    all_half = half(sequence.bfloat16())
    for outputs in (mixed, in_half, all_half):
        assert outputs.dtype == torch.bfloat16
        torch.testing.assert_close(outputs.float(), expected, rtol=0.05, atol=0.05)
    assert {w.dtype for w in (*mixed_state.weights, *mixed_state.sums)} == {torch.float32}
    for ours, theirs in zip(mixed_state.weights, state.weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.01)
    in_turn = streamed(half, sequence.bfloat16())
    torch.testing.assert_close(in_turn, all_half, rtol=0.02, atol=0.02)


@both
def test_checkpointing_keeps_outputs_and_gradients(kind: Kind) -> None:
    layer, sequence = made(kind), tokens(9)

    def saved(x: Tensor) -> Tensor:
        outputs: Tensor = checkpoint(layer, x, use_reentrant=False)
        return outputs

    for ours, theirs in zip(
        gradients(layer, saved, sequence), gradients(layer, layer, sequence), strict=True
    ):
        assert torch.equal(ours, theirs)


@both
def test_it_is_captured_whole_by_dynamo_and_known_without_data(kind: Kind) -> None:
    layer, sequence = made(kind), tokens(9)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(sequence), layer(sequence))
    assert made(kind).to("meta")(sequence.to("meta")).shape == sequence.shape


@both
def test_torch_func_gives_every_sequence_its_own_gradients(kind: Kind) -> None:
    layer, sequence = made(kind), tokens(6)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], one: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(layer, values, (one[None],))
        return outputs.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, sequence)
    for row, one in enumerate(sequence):
        expected = torch.autograd.grad(layer(one[None]).square().sum(), list(layer.parameters()))
        for ours, theirs in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(ours[row], theirs)


@both
def test_a_stream_writes_nothing_into_what_it_is_given(kind: Kind) -> None:
    layer, sequence = made(kind), tokens(6)
    before = {name: w.clone() for name, w in layer.state_dict().items()}
    given, _ = sequence.clone(), layer.extend(sequence)
    state = layer.extend(sequence)[1]
    kept = [w.clone() for w in (*state.weights, *state.sums)]
    again = [layer.extend(sequence, state)[0] for _ in range(2)]
    assert torch.equal(*again)
    assert torch.equal(sequence, given)
    assert all(map(torch.equal, kept, (*state.weights, *state.sums)))
    after = layer.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], w) for name, w in before.items())


def test_a_detached_state_ends_the_graph_and_changes_no_number() -> None:
    layer, sequence = made(TTTLinear), tokens(6).requires_grad_()
    _, state = layer.extend(sequence)
    for start, reaches in ((state, True), (state.detach(), False)):
        outputs, _ = layer.extend(tokens(3), start)
        torch.testing.assert_close(outputs, layer(torch.cat([sequence, tokens(3)], 1))[:, 6:])
        (found,) = torch.autograd.grad(outputs.sum(), sequence, allow_unused=True)
        assert (found is not None) == reaches


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "heads": (lambda: TTTLinear(10, 4), "even multiple of heads, got dim=10 and heads=4"),
    "pairs": (lambda: TTTMLP(6, 2), "even multiple of heads, got dim=6 and heads=2"),
    "no mini-batch": (lambda: TTTLinear(8, 2, mini_batch=0), "at least 1, got 8, 2 and 0"),
    "image": (lambda: made(TTTLinear)(torch.zeros(2, 8, 4, 4)), r"\(B, T, 8\).*\(2, 8, 4, 4\)"),
    "width": (lambda: made(TTTLinear)(tokens(3, dim=6)), r"\(B, T, 8\).*got \(2, 3, 6\)"),
    "nothing": (lambda: made(TTTLinear)(tokens(0)), "at least one token"),
    "tokens": (lambda: made(TTTLinear).step(tokens(3)), r"a token \(B, 8\), got \(2, 3, 8\)"),
    "batch": (
        lambda: made(TTTLinear).extend(tokens(3, batch=3), made(TTTLinear).extend(tokens(1))[1]),
        r"for 3 sequences, got \[\(2, 2, 4, 4\)",
    ),
    "other layer": (
        lambda: made(TTTMLP).extend(tokens(3), made(TTTLinear).extend(tokens(1))[1]),
        "Start with state=None",
    ),
    "position": (
        lambda: made(TTTLinear).extend(
            tokens(1), made(TTTLinear, mini_batch=16).extend(tokens(9))[1]
        ),
        "below the mini-batch of 4, got 9",
    ),
    "no order": (
        lambda: made(TTTLinear, causal=False).step(tokens(1)[:, 0]),
        "causal=False, where every token sees all others",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_with_what_to_do(what: str) -> None:
    call, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_features_need_not_pair_where_nothing_is_turned() -> None:
    assert TTTLinear(6, 2, causal=False)(torch.zeros(1, 2, 6)).shape == (1, 2, 6)
