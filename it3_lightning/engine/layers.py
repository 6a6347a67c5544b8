r"""The gradients of a layer's weights for each sample, from what went in and what came back.

Of dense layers and convolutions they are products of two thin matrices,
:math:`\nabla_{W_i} = D_i A_i`, with :math:`D_i` what came back and :math:`A_i` what went in, so
that they need not exist as a whole (Goodfellow 2015, arXiv 1510.01799, for dense layers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from it3_lightning.engine.products import Product

Gradient = Tensor | Product
Rule = Callable[[Any, Tensor, Tensor], Gradient]
"""``(layer, inputs (B, ...), came back (B, ...))`` to the gradient, ``(B, *shape)``."""


@dataclass(frozen=True)
class Rules:
    """How to find the gradients of a layer's two parameters."""

    weight: Rule
    bias: Rule


def rules_for(layer: nn.Module) -> Rules | None:
    """Return the rules of a layer; ``None`` where none are known.

    Subclasses may do otherwise than their parents, so only the types themselves have rules.

    >>> rules_for(nn.LSTM(1, 1)) is None
    True
    """
    if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
        return None  # mixes samples
    if isinstance(layer, nn.Conv2d) and not _plain(layer):
        return None
    return _RULES.get(type(layer))


def _plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"


def _dense(layer: nn.Linear, inputs: Tensor, back: Tensor) -> Product:
    del layer
    return Product(_positions(back).mT, inputs, _positions)


def _dense_bias(layer: nn.Linear, inputs: Tensor, back: Tensor) -> Tensor:
    del layer, inputs
    return _positions(back).sum(1)


def _positions(features: Tensor) -> Tensor:
    """Return ``(B, L, C)`` of features ``(B, ..., C)``."""
    return features[:, None] if features.ndim == 2 else features.flatten(1, -2)


def _convolution(layer: nn.Conv2d, inputs: Tensor, back: Tensor) -> Product:
    def unfolded(part: Tensor) -> Tensor:
        padding = 0 if isinstance(layer.padding, str) else layer.padding
        return F.unfold(part, layer.kernel_size, layer.dilation, padding, layer.stride).mT

    return Product(back.flatten(2), inputs, unfolded)


def _channels(layer: nn.Module, inputs: Tensor, back: Tensor) -> Tensor:
    """Return what came back, summed over positions: ``(B, C, ...) -> (B, C)``."""
    del layer, inputs
    return back.flatten(2).sum(2) if back.ndim > 2 else back


def _batch_norm(layer: _BatchNorm, inputs: Tensor, back: Tensor) -> Tensor:
    plain = F.batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps)
    return _channels(layer, inputs, plain.mul_(back))


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, back: Tensor) -> Tensor:
    plain = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
    return _channels(layer, inputs, plain.mul_(back))


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, back: Tensor) -> Tensor:
    shape = list(layer.normalized_shape)
    return _layer_norm_bias(layer, inputs, F.layer_norm(inputs, shape, eps=layer.eps).mul_(back))


def _layer_norm_bias(layer: nn.LayerNorm, inputs: Tensor, back: Tensor) -> Tensor:
    del inputs
    others = range(1, back.ndim - len(layer.normalized_shape))
    return back.sum(tuple(others)) if others else back


_RULES: dict[type[nn.Module], Rules] = {
    nn.Linear: Rules(_dense, _dense_bias),
    nn.Conv2d: Rules(_convolution, _channels),
    nn.BatchNorm1d: Rules(_batch_norm, _channels),
    nn.BatchNorm2d: Rules(_batch_norm, _channels),
    nn.BatchNorm3d: Rules(_batch_norm, _channels),
    nn.GroupNorm: Rules(_group_norm, _channels),
    nn.LayerNorm: Rules(_layer_norm, _layer_norm_bias),
}
