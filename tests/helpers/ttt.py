"""TTT layers token by token, written from the paper: gradients of the inner loss by autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning.layers import TTTMLP, TTTLinear

Inner = list[Tensor]  # W1, b1 and, of an MLP, W2, b2


def primal(layer: TTTLinear | TTTMLP, sequence: Tensor) -> Tensor:
    """Return what the layer should return, differentiable: one sequence, head, token at a time."""
    weights = dict(layer.named_parameters())
    rows = [_sequence(layer, weights, tokens) for tokens in sequence]
    return torch.stack(rows)


def _sequence(layer: TTTLinear | TTTMLP, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    features = layer.dim // layer.heads
    parts = [slice(h * features, (h + 1) * features) for h in range(layer.heads)]
    run = _in_turn if layer.causal else _at_once
    merged = torch.cat([run(layer, weights, tokens, h, part) for h, part in enumerate(parts)], 1)
    normal = F.layer_norm(
        merged, (layer.dim,), weights["post_norm.weight"], weights["post_norm.bias"], 1e-6
    )
    return normal @ weights["output.weight"].T


def _in_turn(
    layer: TTTLinear | TTTMLP, weights: Mapping[str, Tensor], tokens: Tensor, head: int, part: slice
) -> Tensor:
    """Return the outputs of one head: a mini-batch shares the weights that gradients are at."""
    current = start = _initial(layer, weights, head)
    outputs: list[Tensor] = []
    summed: Inner = []
    for t, token in enumerate(tokens):
        place = t % layer.mini_batch
        if place == 0:
            start, summed = current, [torch.zeros_like(w) for w in current]
        gradients = _gradients(layer, weights, token, head, part, start, place)
        rate = _token_rate(layer, weights, token, head)
        summed = [s + rate * g for s, g in zip(summed, gradients, strict=True)]
        scale = (1 / (place + 1) + weights["position_rate"][place]).clamp_min(0)
        current = [w - scale * s for w, s in zip(start, summed, strict=True)]
        query = _turned(token @ weights["query.weight"][part].T, place)
        outputs.append(_answer(weights, query, current, head))
    return torch.stack(outputs)


def _at_once(
    layer: TTTLinear | TTTMLP, weights: Mapping[str, Tensor], tokens: Tensor, head: int, part: slice
) -> Tensor:
    """Return the outputs of one head where all tokens train, and then all ask."""
    trained = start = _initial(layer, weights, head)
    for token in tokens:
        gradients = _gradients(layer, weights, token, head, part, start, None)
        rate = _token_rate(layer, weights, token, head) / len(tokens)
        rate = rate * (1 + weights["position_rate"][0]).clamp_min(0)
        trained = [w - rate * g for w, g in zip(trained, gradients, strict=True)]
    queries = tokens @ weights["query.weight"][part].T
    return torch.stack([_answer(weights, query, trained, head) for query in queries])


def _initial(layer: TTTLinear | TTTMLP, weights: Mapping[str, Tensor], head: int) -> Inner:
    return [weights[f"initial.{i}"][head] for i in range(len(layer.initial))]


def _gradients(
    layer: TTTLinear | TTTMLP,
    weights: Mapping[str, Tensor],
    token: Tensor,
    head: int,
    part: slice,
    at: Inner,
    place: int | None,
) -> Inner:
    key, value = (token @ weights[f"{name}.weight"][part].T for name in ("key", "value"))
    key = key if place is None else _turned(key, place)
    at = [w if w.requires_grad else w.detach().requires_grad_() for w in at]
    with torch.enable_grad():
        loss = (_answer(weights, key, at, head) - value).square().sum() / 2
    return list(torch.autograd.grad(loss, at, create_graph=True))


def _token_rate(
    layer: TTTLinear | TTTMLP, weights: Mapping[str, Tensor], token: Tensor, head: int
) -> Tensor:
    gate = token @ weights["token_rate.weight"][head] + weights["token_rate.bias"][head]
    return layer.base_lr * gate.sigmoid() / (layer.dim // layer.heads)


def _answer(weights: Mapping[str, Tensor], x: Tensor, inner: Inner, head: int) -> Tensor:
    """Return ``f(x; W) = x + LN(net(x; W))``."""
    z = x @ inner[0] + inner[1][0]
    if len(inner) > 2:
        z = nn.GELU("tanh")(z) @ inner[2] + inner[3][0]
    scale, shift = (weights[f"inner_norm.{name}"][head, 0] for name in ("weight", "bias"))
    return x + F.layer_norm(z, z.shape, scale, shift, 1e-6)


def _turned(x: Tensor, place: int) -> Tensor:
    """Return a vector with rotary position: pairs are complex numbers, turned."""
    half = torch.arange(len(x) // 2, dtype=x.dtype)
    angles = place / 10_000 ** (2 * half / len(x))
    turn = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2)) * turn).flatten()
