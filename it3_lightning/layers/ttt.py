"""TTT layers: recurrent layers whose state is a network that trains while it runs.

The layers say what the inner loop trains on: views of each token, rates, initial weights. All of
these are parameters. How it trains stands in :mod:`it3_lightning.layers.inner_loop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning.layers.inner_loop import (
    EPS,
    InnerNorm,
    TTTState,
    Views,
    full_batch,
    rotary,
    scan,
)

_STD = 0.02  # of initial weights


class TTTLayer(nn.Module):
    """What both layers share; they differ in the widths of the inner net.

    Args:
        dim: features ``D`` of a token.
        heads: inner models side by side, on ``f = D / heads`` features each.
        mini_batch: tokens whose gradients are taken at the same weights; positions and rates count
            modulo it. Without effect where not ``causal``.
        causal: whether a token sees those before it only. If not, all tokens are one mini-batch,
            and each asks the weights that all have trained: for images and sets. There is no
            rotary embedding then, so the layer does not depend on the order of tokens.
        base_lr: factor of all inner rates.
        hidden: widths of the inner net's hidden layers, in multiples of ``f``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mini_batch: int,
        causal: bool,
        base_lr: float,
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        features = _checked(dim, heads, mini_batch, causal)
        self.dim, self.heads, self.mini_batch = dim, heads, mini_batch
        self.causal, self.base_lr = causal, base_lr
        self.query, self.key, self.value, self.output = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.token_rate = nn.Linear(dim, heads)
        nn.init.normal_(self.token_rate.weight, std=_STD)
        nn.init.zeros_(self.token_rate.bias)
        self.position_rate = nn.Parameter(torch.zeros(mini_batch if causal else 1))
        self.initial = nn.ParameterList()
        widths = [features, *(n * features for n in hidden), features]
        for before, after in pairwise(widths):
            self.initial.append(nn.Parameter(_STD * torch.randn(heads, before, after)))
            self.initial.append(nn.Parameter(torch.zeros(heads, 1, after)))
        self.inner_norm = InnerNorm(heads, features)
        self.post_norm = nn.LayerNorm(dim, eps=EPS)

    def extra_repr(self) -> str:
        """Return what the layer was made with."""
        return f"dim={self.dim}, heads={self.heads}, mini_batch={self.mini_batch}, " + (
            f"causal={self.causal}, base_lr={self.base_lr}"
        )

    def forward(self, sequence: Tensor) -> Tensor:
        """Return a sequence ``(B, T, D)`` for a sequence ``(B, T, D)``.

        Raises:
            ValueError: the sequence has another shape.
        """
        if self.causal:
            return self.extend(sequence)[0]
        self._check_sequence(sequence)
        views, weights = self._views(sequence, 0), self._start(len(sequence)).weights
        with _full_precision(sequence):
            outputs = full_batch(views, weights, self.inner_norm)
        return self._projected(outputs, sequence)

    def extend(self, sequence: Tensor, state: TTTState | None = None) -> tuple[Tensor, TTTState]:
        """Go on with a stream by several tokens, and return their outputs and the new state.

        Args:
            sequence: ``(B, T, D)``, any number of tokens.
            state: of the tokens before; ``None``: there are none. It is left as it is.

        Raises:
            ValueError: the sequence has another shape, the state is that of another layer or batch,
                or the layer is not causal.
        """
        self._check_sequence(sequence)
        self._check_state(sequence, state)
        state = self._start(len(sequence)) if state is None else state
        views = self._views(sequence, state.position)
        with _full_precision(sequence):
            outputs, state = scan(views, state, self.inner_norm, self.mini_batch)
        return self._projected(outputs, sequence), state

    def step(self, token: Tensor, state: TTTState | None = None) -> tuple[Tensor, TTTState]:
        """Go on with a stream by one token ``(B, D)``, and return its output and the new state.

        Args:
            token: ``(B, D)``.
            state: see :meth:`extend`.

        Raises:
            ValueError: see :meth:`extend`.

        >>> layer, tokens = TTTLinear(8, 2), torch.ones(1, 3, 8)
        >>> state, outputs = None, []
        >>> for token in tokens.unbind(1):
        ...     output, state = layer.step(token, state)
        ...     outputs.append(output)
        >>> state.position, torch.allclose(torch.stack(outputs, 1), layer(tokens), atol=1e-6)
        (3, True)
        """
        if token.ndim != 2:
            raise ValueError(
                f"Expected a token (B, {self.dim}), got {tuple(token.shape)}. For several tokens, "
                "call extend."
            )
        output, state = self.extend(token[:, None], state)
        return output[:, 0], state

    def _views(self, sequence: Tensor, position: int) -> Views:
        """Return the views of all tokens, the first of them at this position of a mini-batch."""
        query, key, value = (
            _inner(layer(sequence)).reshape(*sequence.shape[:2], self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        rate = _inner(self.token_rate(sequence)).sigmoid().mT[..., None]
        rate = rate * (self.base_lr * self.heads / self.dim)
        learned, tokens = _inner(self.position_rate)[:, None], sequence.shape[1]
        if not self.causal:
            return Views(query, key, value, rate, F.relu(1 + learned) / tokens)
        places = torch.arange(position, position + tokens, device=learned.device) % self.mini_batch
        scale = F.relu(1 / (places[:, None] + 1).to(learned) + learned[places])
        query, key = rotary(torch.stack((query, key)), places)
        return Views(query, key, value, rate, scale)

    def _start(self, batch: int) -> TTTState:
        """Return the state before any token: the initial weights for each sequence."""
        weights = tuple(_inner(w).expand(batch, -1, -1, -1) for w in self.initial)
        return TTTState(weights, tuple(map(torch.zeros_like, weights)), 0)

    def _projected(self, outputs: Tensor, sequence: Tensor) -> Tensor:
        merged = outputs.transpose(1, 2).flatten(2).to(sequence.dtype)
        projected: Tensor = self.output(self.post_norm(merged))
        return projected

    def _check_sequence(self, sequence: Tensor) -> None:
        if sequence.ndim != 3 or sequence.shape[2] != self.dim or not sequence.shape[1]:
            raise ValueError(
                f"Expected a sequence (B, T, {self.dim}) of at least one token, got "
                f"{tuple(sequence.shape)}. Flatten images to tokens, or give the layer another dim."
            )

    def _check_state(self, sequence: Tensor, state: TTTState | None) -> None:
        if not self.causal:
            raise ValueError(
                "Expected a causal layer, got causal=False, where every token sees all others. "
                "Give it whole sequences."
            )
        expected = [(len(sequence), *w.shape) for w in self.initial]
        for given in state[:2] if state else ():
            if [tuple(w.shape) for w in given] != expected:
                raise ValueError(
                    f"Expected a state of {expected}, which this layer makes for {len(sequence)} "
                    f"sequences, got {[tuple(w.shape) for w in given]}. Start with state=None."
                )
        if state and not 0 <= state.position < self.mini_batch:
            raise ValueError(
                f"Expected a position below the mini-batch of {self.mini_batch}, got "
                f"{state.position}. Start with state=None."
            )


class TTTLinear(TTTLayer):
    r"""A recurrent layer whose state is a linear model, trained by a gradient step on each token.

    .. math::
        f(x; W) = x + \mathrm{LN}(xW + b), \qquad
        \mathrm{out}_i = \theta_O\,\mathrm{norm}(f(Q_i; W_i)), \qquad
        \eta_{ij} = \eta_{base} \max(0, 1/i + \mathrm{learned}_i)\,\sigma(w \cdot x_j + c) / f.

    The steps are those of the module's docstring: :math:`W_i` has seen the gradients of tokens
    :math:`j \le i` of its mini-batch, and all mini-batches before. Keys and queries carry rotary
    positions, modulo the mini-batch. All of it runs in single precision at least, under autocast
    too. Where not ``causal``, :math:`\eta_j` has :math:`\max(0, 1 + \mathrm{learned}) / T` in place
    of the term of :math:`i`.

    Args:
        dim: features ``D`` of a token.
        heads: inner models side by side, on ``f = D / heads`` features each.
        mini_batch: tokens whose gradients are taken at the same weights.
        causal: whether a token sees those before it only; if not, all tokens are one mini-batch,
            in no order: for images and sets.
        base_lr: :math:`\eta_{base}`.

    Shapes:
        ``(B, T, D) -> (B, T, D)``; with :meth:`step`, ``(B, D) -> (B, D)`` and a state.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``, features of a head cannot be paired, or
            a number is not positive.

    Source: Y. Sun et al. (2024), arXiv 2407.04620.

    >>> layer = TTTLinear(32, heads=2)
    >>> layer(torch.zeros(2, 100, 32)).shape
    torch.Size([2, 100, 32])
    >>> [tuple(w.shape) for w in layer.initial]
    [(2, 16, 16), (2, 1, 16)]
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mini_batch: int = 16,
        causal: bool = True,
        base_lr: float = 1.0,
    ) -> None:
        super().__init__(dim, heads, mini_batch=mini_batch, causal=causal, base_lr=base_lr)


class TTTMLP(TTTLayer):
    r"""A recurrent layer whose state is an MLP, trained by a gradient step on each token.

    As :class:`TTTLinear`, with an inner net of two layers, the hidden one four times as wide:
    :math:`f(x; W) = x + \mathrm{LN}(\mathrm{GELU}(xW_1 + b_1)W_2 + b_2)`. It remembers more, and
    takes longer.

    Args:
        dim: features ``D`` of a token.
        heads: inner models side by side, on ``f = D / heads`` features each.
        mini_batch: see :class:`TTTLinear`.
        causal: see :class:`TTTLinear`.
        base_lr: :math:`\eta_{base}`; smaller than that of a linear model, as published.

    Shapes:
        ``(B, T, D) -> (B, T, D)``; with :meth:`step`, ``(B, D) -> (B, D)`` and a state.

    Raises:
        ValueError: see :class:`TTTLinear`.

    Source: Y. Sun et al. (2024), arXiv 2407.04620.

    >>> [tuple(w.shape) for w in TTTMLP(32, heads=2).initial]
    [(2, 16, 64), (2, 1, 64), (2, 64, 16), (2, 1, 16)]
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mini_batch: int = 16,
        causal: bool = True,
        base_lr: float = 0.1,
    ) -> None:
        super().__init__(
            dim, heads, mini_batch=mini_batch, causal=causal, base_lr=base_lr, hidden=(4,)
        )


def _checked(dim: int, heads: int, mini_batch: int, causal: bool) -> int:
    """Return the number of features of a head."""
    if min(dim, heads, mini_batch) < 1:
        raise ValueError(
            f"Expected dim, heads and mini_batch of at least 1, got {dim}, {heads} and "
            f"{mini_batch}."
        )
    if dim % heads or (causal and dim // heads % 2):
        even = "an even multiple of" if causal else "a multiple of"
        raise ValueError(
            f"Expected dim to be {even} heads, got dim={dim} and heads={heads}: each head takes as "
            f"many features{', paired by rotary positions' if causal else ''}. Change one of them."
        )
    return dim // heads


def _inner(tensor: Tensor) -> Tensor:
    """Return a tensor in the precision of the inner loop: single at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast: small steps on weights are lost in half precision."""
    device = like.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # which has no autocast
    return torch.autocast(device, enabled=False) if on else nullcontext()
