r"""Inner loop: a small network is trained by gradient steps as tokens come; the dual form.

The state is the weights :math:`W` of an inner model
:math:`f(x; W) = x + \mathrm{LN}(\mathrm{net}(x; W))`. Each token makes one step on them: to
reconstruct one view of itself from another, :math:`\ell = \frac12\|f(K_j; W) - V_j\|^2`. The output
is the inner model's answer to a third view, :math:`f(Q_i; W_i)`. All views, the initial weights and
the rates are learned by the outer loop, as the parameters of any layer.

The gradients of a mini-batch are all taken at the weights that it started from. So they are known
before any of its outputs, and all outputs are products of matrices: the dual form. For one layer of
the net with inputs :math:`X` (:math:`K` for the first one), :math:`Z = XW + b`,
:math:`G = \nabla_Z\,\ell` and answers :math:`\bar X` (:math:`Q` for the first one),

.. math::
    \bar Z = \bar X W - (\eta \circ \mathrm{tril}(\bar X X^\top))\,G + b - \mathrm{tril}(\eta)\,G,
    \qquad W' = W - (\eta_{last} \circ X)^\top G, \qquad b' = b - \eta_{last}^\top G.

Here :math:`\circ` multiplies entries, and rows where a factor has one column. The rate of
token :math:`j` for the output of token :math:`i` of a mini-batch is :math:`\eta_{ij} = s_i r_j`.
So a mini-batch may come in pieces, down to single tokens: what earlier pieces summed up,
:math:`A = (r \circ X)^\top G` and :math:`a = r^\top G`, takes :math:`s \circ (\bar X A + a)` away
from :math:`\bar Z`.

Source: Y. Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States"
(2024), arXiv 2407.04620: sections 2.3 to 2.7, and appendix A for the dual form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of the layer norms
_BASE = 10_000.0  # of rotary frequencies

Weights = tuple[Tensor, ...]  # W (B, H, f, g) and b (B, H, 1, g) of each layer of the inner net


class TTTState(NamedTuple):
    """Where a stream is: all that a TTT layer knows of the tokens before.

    Args:
        weights: of the inner net where the mini-batch began: for each of its layers ``W``
            ``(B, heads, f, g)`` and ``b`` ``(B, heads, 1, g)``.
        sums: of the gradients of the mini-batch's tokens so far, each times its rate ``r_j``:
            ``A`` and ``a``, shaped like the weights.
        position: number of these tokens.
    """

    weights: Weights
    sums: Weights
    position: int

    def detach(self) -> TTTState:
        """Return the same state without its graph, as truncated backpropagation needs it.

        >>> weights = (torch.ones(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 1, 2))
        >>> TTTState(weights, weights, 0).detach().weights[0].requires_grad
        False
        """
        weights, sums = (tuple(t.detach() for t in ts) for ts in self[:2])
        return TTTState(weights, sums, self.position)


class Views(NamedTuple):
    """Tokens as the inner loop sees them, ``(B, heads, n, f)``, and the rates of each.

    Args:
        query: ``Q = x θ_Q``, what is asked.
        key: ``K = x θ_K``, what is trained on.
        value: ``V = x θ_V``, what is to be reconstructed from it.
        token_rate: ``r_j``, ``(B, heads, n, 1)``.
        position_rate: ``s_i``, ``(n, 1)``, for all sequences and heads alike.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    token_rate: Tensor
    position_rate: Tensor

    def split(self, sizes: Sequence[int]) -> Iterator[Views]:
        """Yield the views of so many tokens, one piece after the other."""
        pieces = (torch.split(view, sizes, -2) for view in self)  # type: ignore[arg-type]
        return (Views(*piece) for piece in zip(*pieces, strict=True))


class InnerNorm(nn.Module):
    r"""Layer norm of the inner model: :math:`\mathrm{LN}(Z) = \gamma \circ \hat Z + \beta`.

    Args:
        heads: each with its own scale and shift.
        features: ``f`` of a head.

    Shapes:
        ``(B, heads, n, f)`` in and out.
    """

    def __init__(self, heads: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, features))
        self.bias = nn.Parameter(torch.zeros(heads, 1, features))

    def forward(self, outputs: Tensor) -> Tensor:
        """Return ``LN(Z)``."""
        return F.layer_norm(outputs, outputs.shape[-1:], eps=EPS) * self.weight + self.bias

    def gradient(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Return :math:`\nabla_Z \frac12 \|\mathrm{LN}(Z) - \mathrm{target}\|^2`.

        With :math:`g = \gamma \circ (\mathrm{LN}(Z) - \mathrm{target})` it is
        :math:`(g - \mathrm{mean}(g) - \hat Z \circ \mathrm{mean}(g \circ \hat Z)) / \sigma`.
        """
        variance, mean = torch.var_mean(outputs, -1, correction=0, keepdim=True)
        inverse = (variance + EPS).rsqrt()
        normal = (outputs - mean) * inverse
        g = (normal * self.weight + self.bias - target) * self.weight
        along = (g * normal).mean(-1, keepdim=True)
        return (g - g.mean(-1, keepdim=True) - normal * along) * inverse


def scan(
    views: Views, state: TTTState, norm: InnerNorm, mini_batch: int
) -> tuple[Tensor, TTTState]:
    """Return ``f(Q_i; W_i)`` for all tokens in their order, and the state after them.

    Args:
        views: of the tokens, which go on where the state is.
        state: of the tokens before.
        norm: of the inner model.
        mini_batch: tokens whose gradients are taken at the same weights.

    Shapes:
        outputs ``(B, heads, n, f)``.
    """
    weights, position = state.weights, state.position
    sums = state.sums if position else None
    outputs = []
    for piece in views.split(_sizes(position, views.key.shape[-2], mini_batch)):
        output, sums = dual_form(piece, weights, sums, norm)
        outputs.append(output)
        position += output.shape[-2]
        if position == mini_batch:
            weights = _plus(weights, sums, -piece.position_rate[..., -1:, :])
            position, sums = 0, None
    return torch.cat(outputs, -2), TTTState(weights, sums or _zeros(weights), position)


def dual_form(
    views: Views, weights: Weights, sums: Weights | None, norm: InnerNorm
) -> tuple[Tensor, Weights]:
    """Return ``Q + LN(Z̄)`` for a mini-batch or a piece of it, and what its gradients sum up to.

    Args:
        views: of its tokens.
        weights: where the mini-batch began.
        sums: ``A`` and ``a`` of the pieces before; ``None``: there are none.
        norm: of the inner model.

    Shapes:
        outputs ``(B, heads, n, f)``; sums like the weights, those of the pieces before included.
    """
    inputs, gradients = inner_gradients(views, weights, norm)
    eta = (views.position_rate * views.token_rate.mT).tril()
    answers = views.query
    for layer, (x, g) in enumerate(zip(inputs, gradients, strict=True)):
        answers = F.gelu(answers, approximate="tanh") if layer else answers
        z = _affine(answers, weights, layer) - (eta * (answers @ x.mT + 1)) @ g
        answers = z if sums is None else z - views.position_rate * _affine(answers, sums, layer)
    own = _sums(inputs, gradients, views.token_rate)
    return views.query + norm(answers), own if sums is None else _plus(sums, own, 1.0)


def full_batch(views: Views, weights: Weights, norm: InnerNorm) -> Tensor:
    """Return ``f(Q; W')``: every token asks the weights that all tokens have trained.

    Args:
        views: of all tokens; they share one ``position_rate``.
        weights: the initial ones.
        norm: of the inner model.

    Shapes:
        outputs ``(B, heads, n, f)``.
    """
    sums = _sums(*inner_gradients(views, weights, norm), views.token_rate)
    trained = _plus(weights, sums, -views.position_rate)
    *_, outputs = _passed(views.query, trained)
    normal: Tensor = norm(outputs)
    return views.query + normal


def inner_gradients(
    views: Views, weights: Weights, norm: InnerNorm
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs ``X`` of each layer of the inner net, and ``G``: backpropagation, by hand.

    Args:
        views: the keys go in; ``f(K; W) = V`` where ``LN(Z) = V - K``.
        weights: of the inner net.
        norm: of the inner model.
    """
    inputs, outputs = [views.key], _passed(views.key, weights)
    inputs += [F.gelu(z, approximate="tanh") for z in outputs[:-1]]
    gradients = [norm.gradient(outputs[-1], views.value - views.key)]
    for layer in range(len(outputs) - 1, 0, -1):
        backward = gradients[0] @ weights[2 * layer].mT
        gradients.insert(0, backward * _gelu_slope(outputs[layer - 1]))
    return inputs, gradients


def _passed(inputs: Tensor, weights: Weights) -> list[Tensor]:
    """Return ``Z`` of every layer of the inner net, the last one its output."""
    outputs = [_affine(inputs, weights, 0)]
    for layer in range(1, len(weights) // 2):
        outputs.append(_affine(F.gelu(outputs[-1], approximate="tanh"), weights, layer))
    return outputs


def _affine(inputs: Tensor, weights: Weights, layer: int) -> Tensor:
    return inputs @ weights[2 * layer] + weights[2 * layer + 1]


def _gelu_slope(z: Tensor) -> Tensor:
    """Return the derivative of GELU in its form with tanh."""
    root = math.sqrt(2 / math.pi)
    square = z * z
    t = torch.tanh(root * z * (1 + 0.044715 * square))
    return 0.5 * (1 + t + z * (1 - t * t) * root * (1 + 3 * 0.044715 * square))


def _sums(inputs: Sequence[Tensor], gradients: Sequence[Tensor], rate: Tensor) -> Weights:
    """Return ``A = (r ∘ X)ᵀG`` and ``a = rᵀG`` of each layer."""
    pairs = ((x.mT @ (rate * g), rate.mT @ g) for x, g in zip(inputs, gradients, strict=True))
    return tuple(tensor for pair in pairs for tensor in pair)


def _plus(weights: Weights, sums: Weights, factor: Tensor | float) -> Weights:
    return tuple(w + factor * s for w, s in zip(weights, sums, strict=True))


def _zeros(weights: Weights) -> Weights:
    return tuple(map(torch.zeros_like, weights))


def _sizes(position: int, tokens: int, mini_batch: int) -> list[int]:
    """Return how many tokens fall into each mini-batch.

    >>> _sizes(3, 10, 4)
    [1, 4, 4, 1]
    """
    first = min(mini_batch - position, tokens)
    whole, rest = divmod(tokens - first, mini_batch)
    return [first, *[mini_batch] * whole, *[rest] * (rest > 0)]


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    r"""Turn each pair of features by the angle :math:`p\,10000^{-2m/f}` (J. Su et al., 2021).

    Args:
        x: ``(..., n, f)``.
        positions: ``p``, ``(n,)``.

    >>> [round(x, 4) for x in rotary(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))[0].tolist()]
    [0.5403, 0.8415]
    """
    pairs = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=x.dtype)
    angles = positions[:, None] * _BASE ** (-pairs / x.shape[-1])
    cos, sin, first, second = angles.cos(), angles.sin(), x[..., 0::2], x[..., 1::2]
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
    return turned.flatten(-2)
