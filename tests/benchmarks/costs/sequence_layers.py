"""TTT layers against attention and a GRU: time a token, over the length of the sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from costs.clock import Piece, side_by_side
from costs.extent import Extent
from costs.items import Item, Job, Required, Row
from it3_lightning.layers import TTTMLP, TTTLinear

OURS, OTHERS = ("TTT-Linear", "TTT-MLP"), ("attention", "GRU")
_DIM, _HEADS = 128, 4
_STEPS = 16  # tokens of a stream that are timed: a mini-batch

Kind = Literal["outputs", "gradients", "stream"]
Run = Callable[[object], object]  # takes what a piece prepares, which is nothing

_SECTIONS: dict[Kind, str] = {
    "outputs": "Layers over a sequence, outputs alone: a token",
    "gradients": "Layers over a sequence, outputs and gradients: a token",
    "stream": "Layers in a stream, the next token after so many",
}


class Attention(nn.Module):
    """Causal softmax attention by torch's fused kernel ``(B, T, D) -> (B, T, D)``.

    Args:
        dim: features ``D`` of a token.
        heads: side by side.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.views, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, sequence: Tensor) -> Tensor:
        """Return the outputs of a sequence."""
        query, key, value = self._views(sequence)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._merged(mixed)

    def stream(self, sequence: Tensor) -> Run:
        """Return what takes the last tokens of a sequence one by one, the others in its cache."""
        _, *views = self._views(sequence)
        start = sequence.shape[1] - _STEPS
        keys, values = (view.contiguous() for view in views)

        def run(_: object) -> Tensor:
            outputs = []
            for place, token in enumerate(sequence[:, start:].split(1, 1), start):  # type: ignore[no-untyped-call]
                query, key, value = self._views(token)
                keys[:, :, place : place + 1], values[:, :, place : place + 1] = key, value
                past = keys[:, :, : place + 1], values[:, :, : place + 1]
                outputs.append(self._merged(F.scaled_dot_product_attention(query, *past)))
            return torch.cat(outputs, 1)

        return run

    def _views(self, sequence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        views: Tensor = self.views(sequence)
        views = views.view(*sequence.shape[:2], 3, self.heads, -1)
        query, key, value = views.permute(2, 0, 3, 1, 4)
        return query, key, value

    def _merged(self, mixed: Tensor) -> Tensor:
        outputs: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return outputs


def jobs(extent: Extent, device: torch.device) -> Iterator[Job]:
    """Yield a comparison for each length; nothing is required of it."""
    for kind in _SECTIONS:
        for length in extent.lengths:
            label = f"sequence layers: {kind}, length {length}"
            yield Job(label, partial(_compare, extent, kind, length, device))


def runs(kind: Kind, length: int, device: torch.device) -> dict[str, Run]:
    """Return what is timed on one sequence of random tokens, by the layer's name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ttt = [make(_DIM, _HEADS).to(device) for make in (TTTLinear, TTTMLP)]
        attention = Attention(_DIM, _HEADS).to(device)
        gru = nn.GRU(_DIM, _DIM, batch_first=True).to(device)
        sequence = torch.randn(1, length + _STEPS * (kind == "stream"), _DIM).to(device)
    layers: tuple[nn.Module, ...] = (*ttt, attention, gru)
    found: tuple[Run, ...]
    if kind == "stream":
        with torch.no_grad():
            own = (_stream(layer, sequence) for layer in ttt)
            found = (*own, attention.stream(sequence), _gru_stream(gru, sequence))
    elif kind == "gradients":
        found = tuple(partial(_gradients, layer, sequence) for layer in layers)
    else:
        found = tuple(partial(_outputs, layer, sequence) for layer in layers)
    return dict(zip((*OURS, *OTHERS), found, strict=True))


def _compare(extent: Extent, kind: Kind, length: int, device: torch.device) -> list[Item]:
    per = _STEPS if kind == "stream" else length
    named = runs(kind, length, device)
    with torch.set_grad_enabled(kind == "gradients"):
        pieces = [Piece(name, run, per=per) for name, run in named.items()]
        times = side_by_side(pieces, extent.plan)
    return [
        Row.timed(
            times,
            section=_SECTIONS[kind],
            case=f"{name}, {_DIM} features, {_HEADS} heads, length {length}",
            against=other,
            ours=[name],
            other=[other],
            required=Required(1.0),
            judged=False,
        )
        for name in OURS
        for other in OTHERS
    ]


def _outputs(layer: nn.Module, sequence: Tensor, _: object) -> Tensor:
    outputs = layer(sequence)
    return outputs[0] if isinstance(layer, nn.GRU) else outputs  # type: ignore[no-any-return]


def _gradients(layer: nn.Module, sequence: Tensor, _: object) -> object:
    loss = _outputs(layer, sequence, None).square().mean()
    return torch.autograd.grad(loss, list(layer.parameters()))


def _stream(layer: TTTLinear | TTTMLP, sequence: Tensor) -> Run:
    start = layer.extend(sequence[:, :-_STEPS])[1]

    def run(_: object) -> Tensor:
        state, outputs = start, []
        for token in sequence[:, -_STEPS:].unbind(1):
            output, state = layer.step(token, state)
            outputs.append(output)
        return torch.stack(outputs, 1)

    return run


def _gru_stream(gru: nn.GRU, sequence: Tensor) -> Run:
    start = gru(sequence[:, :-_STEPS])[1]

    def run(_: object) -> Tensor:
        state, outputs = start, []
        for token in sequence[:, -_STEPS:].split(1, 1):  # type: ignore[no-untyped-call]
            output, state = gru(token, state)
            outputs.append(output)
        return torch.cat(outputs, 1)

    return run
