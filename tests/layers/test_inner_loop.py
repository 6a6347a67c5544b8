"""The inner loop: gradients by autograd, linear attention, and numbers of another library."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.layers.inner_loop import (
    InnerNorm,
    TTTState,
    Views,
    inner_gradients,
    rotary,
    scan,
)

WITNESS = Path(__file__).parent / "flash_linear_attention.json"


class NoNorm(InnerNorm):
    """The inner model without its layer norm: ``f(x; W) = x + xW + b``."""

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs

    def gradient(self, outputs: Tensor, target: Tensor) -> Tensor:
        return outputs - target


class Doubled(InnerNorm):
    """Adds what comes in, as flash-linear-attention does with the answers."""

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs + super().forward(outputs)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def views(tokens: int, features: int, token_rate: Tensor, position_rate: Tensor) -> Views:
    query, key, value = random(3, 2, 3, tokens, features)
    return Views(query, key, value, token_rate.double(), position_rate.double())


def fresh(weights: tuple[Tensor, ...]) -> TTTState:
    return TTTState(weights, tuple(map(torch.zeros_like, weights)), 0)


@pytest.mark.parametrize("hidden", [[], [12], [6, 5]], ids=["linear", "mlp", "deeper"])
def test_gradients_of_the_inner_loss_are_those_of_autograd(hidden: list[int]) -> None:
    torch.manual_seed(0)
    norm, widths = InnerNorm(3, 4).double(), [4, *hidden, 4]
    with torch.no_grad():
        norm.weight.add_(0.5 * random(3, 1, 4))
        norm.bias.add_(random(3, 1, 4))
    pairs = [(random(2, 3, a, b), random(2, 3, 1, b)) for a, b in pairwise(widths)]
    weights = tuple(w.requires_grad_() for pair in pairs for w in pair)
    given = views(5, 4, torch.ones(2, 3, 5, 1), torch.ones(5, 1))
    x = given.key
    for w, b in pairs[:-1]:
        x = F.gelu(x @ w + b, approximate="tanh")
    w, b = pairs[-1]
    reconstructed = given.key + norm(x @ w + b)
    loss = 0.5 * (reconstructed - given.value).square().sum()
    expected = torch.autograd.grad(loss, weights)
    inputs, gradients = inner_gradients(given, weights, norm)
    found = [
        t
        for x, g in zip(inputs, gradients, strict=True)
        for t in (x.mT @ g, g.sum(-2)[..., None, :])
    ]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_without_norm_and_weights_a_full_batch_is_linear_attention() -> None:
    torch.manual_seed(0)
    given = views(7, 4, torch.ones(2, 3, 7, 1), torch.ones(7, 1))
    zeros = (torch.zeros(2, 3, 4, 4).double(), torch.zeros(2, 3, 1, 4).double())
    outputs, state = scan(given, fresh(zeros), NoNorm(3, 4).double(), mini_batch=7)
    one = torch.ones(2, 3, 7, 1)  # the bias is a feature that is always one
    query, key = torch.cat([given.query, one], -1), torch.cat([given.key, one], -1)
    value = given.value - given.key
    memory = torch.zeros(2, 3, 5, 4).double()
    for t in range(7):
        memory = memory + key[:, :, t, :, None] * value[:, :, t, None, :]
        expected = given.query[:, :, t] + (query[:, :, t, None, :] @ memory)[:, :, 0]
        torch.testing.assert_close(outputs[:, :, t], expected)
    torch.testing.assert_close(torch.cat(state.weights, 2), memory)


def test_outputs_are_those_of_flash_linear_attention() -> None:
    # Outputs `o` of fla.ops.ttt.naive.chunk_ttt_linear_ref(..., mini_batch_size=4), of fla-core
    # 0.6.0 on a CPU. It scales queries by f ** -0.5 and returns Z + LN(Z), not Q + LN(Z); its
    # `eta` belongs to the output's token.
    stored = json.loads(WITNESS.read_text())
    there = {k: torch.tensor(v["values"]).reshape(v["shape"]) for k, v in stored.items()}
    query, key, value, eta = (there[name].transpose(1, 2) for name in ("q", "k", "v", "eta"))
    norm = Doubled(2, 4)
    norm.weight.data, norm.bias.data = there["w"][:, None], there["b"][:, None]
    given = Views(query / 2, key, value, torch.ones_like(eta), eta)
    weights = there["initial_state"], there["initial_state_bias"]
    outputs, _ = scan(given, fresh(weights), norm, mini_batch=4)
    found = (outputs - query / 2).transpose(1, 2)
    torch.testing.assert_close(found, there["o"], rtol=1e-4, atol=1e-4)


def test_rotary_scores_depend_on_distances_alone() -> None:
    torch.manual_seed(0)
    query, key = random(2, 6)
    scores = [
        (rotary(query[None], torch.tensor([i])) * rotary(key[None], torch.tensor([j]))).sum()
        for i, j in ((0, 3), (4, 7), (9, 12))
    ]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3))
    assert not torch.isclose(scores[0], query @ key)
