"""The weights of many samples, stacked: moved together, each by its own gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from it3_lightning.engine.elementwise import optimizer_of_all
from it3_lightning.engine.finite import all_finite
from it3_lightning.engine.first_step import FirstStep, single_step
from it3_lightning.engine.polyak import length
from it3_lightning.engine.products import Product
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.updates import Updater, full_precision

Weights = dict[str, Tensor]

_LARGE = 1 << 15  # elements of a weight that does not stay in the cache until it is moved


class Stacked:
    """Adapted weights ``(B, *shape)`` of ``B`` samples, their optimizer and anchor.

    Args:
        parameters: the adapting parameters by name, with the source weights in them.
        settings: how to adapt.
        size: ``B``.
        memory: by name, of earlier samples' large weights; what is there is overwritten.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Settings,
        size: int,
        memory: Weights | None = None,
    ) -> None:
        self._memory: Weights = {} if memory is None else memory
        self._early: Weights = {}  # moved before all gradients are known
        self._sums: list[Tensor] = []
        self._settings = settings
        self._size = size
        self._source: Weights = {name: p.detach() for name, p in parameters.items()}
        single = single_step(settings)
        self._once = single is not None
        self._single = single if isinstance(single, FirstStep) else None
        self._updater: Updater | None = None
        self._average: Weights = {}
        self.weights = self._source
        self.dim: int | None = None
        self._moved = torch.zeros(size, dtype=torch.bool)

    @property
    def anchor(self) -> Weights | None:
        """The weights of the second pass; ``None`` where the adapted weights serve themselves."""
        if self._settings.anchor == "live":
            return None
        if not self._average:
            return self._source
        return {name: a.to(self._source[name].dtype) for name, a in self._average.items()}

    @property
    def anchor_dim(self) -> int | None:
        """Dimension of samples in the anchor: 0, or ``None`` where all share it."""
        return 0 if self._average else None

    def use_up(self, name: str, product: Product) -> bool:
        """Move a large weight by its gradients as they are made, if one step is all there is."""
        weights = self._source[name]
        if self._single is None or weights.numel() < _LARGE or weights.device.type != "cpu":
            return False
        out = self._memory.get(name)
        if out is None or len(out) < self._size or out.dtype != weights.dtype:
            out = self._memory[name] = weights.new_empty(self._size, *weights.shape)
        moved = self._early[name] = out[: self._size]
        rows, source = moved.flatten(2), weights.flatten(1)
        for sample, part, gradient in product.pieces():
            self._single.write(source[part], gradient, out=rows[sample, part])
        self._sums.append(product.bound())
        return True

    def forget(self) -> None:
        """Forget what is used up."""
        self._early, self._sums = {}, []

    def step(self, gradients: Weights, active: Tensor, losses: Tensor) -> Tensor:
        """Move the active samples' weights; return ``(B,)`` on the CPU, whose are finite.

        Args:
            gradients: ``(B, *shape)``, of all weights that are not used up yet; overwritten.
            active: ``(B,)`` booleans on the CPU; the other samples' weights stay.
            losses: ``(B,)``, what the gradients are of.
        """
        self._moved |= active
        fresh = (~self._moved).nonzero()[:, 0].tolist()
        still = (self._moved & ~active).nonzero()[:, 0].tolist()
        before = {name: self.weights[name].detach()[still] for name in gradients if still}
        if self._single is not None:
            total = self._move_once(gradients, self._single)
        elif self._once:
            total = self._move_once(self._scaled(gradients, losses), FirstStep("sgd", 1.0))
        else:
            self._move(self._scaled(gradients, losses))
            total = torch.stack([_by_sample(w) for w in self.weights.values()]).sum(0)
        for name in self.weights if fresh else ():
            self.weights[name].data[fresh] = self._source[name]
        for name, rows in before.items():
            self.weights[name].data[still] = rows
        if self._settings.anchor == "ema" and self._updater is not None:
            self._follow(active)
        finite = total.isfinite().cpu() | ~active
        for row in (~finite).nonzero()[:, 0].tolist():  # or is it only the sum that overflows?
            finite[row] = all(all_finite(w[row]) for w in self.weights.values())
        return finite

    def back_to_source(self, failed: Tensor) -> None:
        """Give samples ``(B,)`` the source weights again."""
        if self.dim is None or not failed.any():
            return
        rows = failed.nonzero()[:, 0].tolist()
        for name, values in self.weights.items():
            values.data[rows] = self._source[name]

    def _move_once(self, gradients: Weights, single: FirstStep) -> Tensor:
        users = Counter(gradient.untyped_storage().data_ptr() for gradient in gradients.values())
        moved, sums = dict(self._early), list(self._sums)
        for name, gradient in gradients.items():
            source = self._source[name]
            shared = users[gradient.untyped_storage().data_ptr()] > 1 or 0 in gradient.stride()
            apart = shared or gradient.dtype != source.dtype
            moved[name] = torch.empty_like(gradient, dtype=source.dtype) if apart else gradient
            sums.append(single.move(source, gradient, out=moved[name]))
        self.weights, self.dim = {name: moved[name] for name in self._source}, 0
        return torch.stack(sums).sum(0)

    def _move(self, gradients: Weights) -> None:
        """Take a step of the optimizer; parameters without gradients have no influence."""
        if self._updater is None:
            stacked = {
                name: nn.Parameter(_repeated(w, self._size)) for name, w in self._source.items()
            }
            self._updater = Updater(
                list(stacked.values()), partial(optimizer_of_all, self._settings), None
            )
            self.weights, self.dim = dict(stacked), 0
            if self._settings.anchor == "ema":
                self._average = {
                    name: full_precision(w.detach()).clone() for name, w in stacked.items()
                }
        self._updater.step([gradients.get(name) for name in self.weights])
        self.weights = {name: w.detach() for name, w in self.weights.items()}

    def _scaled(self, gradients: Weights, losses: Tensor) -> Weights:
        """Return gradients as the optimizer is to see them."""
        if self._settings.optimizer != "polyak":
            return self._clipped(gradients)
        full = {name: full_precision(g) for name, g in gradients.items()}
        squares = torch.stack([_by_sample(g.square()) for g in full.values()]).sum(0)
        own = [full_precision(w.detach()).square() for w in self.weights.values()]
        weights = torch.stack([_by_sample(w) if self.dim == 0 else w.sum() for w in own]).sum(0)
        scale = length(losses.to(squares), squares, weights.sqrt(), self._settings.moves[1])
        return {name: g * _like(scale, g) for name, g in full.items()}

    def _clipped(self, gradients: Weights) -> Weights:
        clip = self._settings.grad_clip
        if clip is None:
            return gradients
        norm = sum(_by_sample(full_precision(g).square()) for g in gradients.values())
        assert isinstance(norm, Tensor)
        scale = (clip / (norm.sqrt() + 1e-6)).clamp(max=1.0)
        return {name: full_precision(g) * _like(scale, g) for name, g in gradients.items()}

    def _follow(self, active: Tensor) -> None:
        """Let the anchors of the active samples follow their weights."""
        assert self._updater is not None
        for average, values in zip(self._average.values(), self._updater.values, strict=True):
            share = (1 - self._settings.ema_decay) * active.to(average)
            average.lerp_(values, _like(share, average))


def _repeated(weights: Tensor, size: int) -> Tensor:
    """Return copies ``(B, *shape)``, contiguous: of others, torch.func finds wrong gradients."""
    return weights.expand(size, *weights.shape).clone(memory_format=torch.contiguous_format)


def _by_sample(values: Tensor) -> Tensor:
    """Sum over everything but the samples: ``(B, ...) -> (B,)``."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def _like(values: Tensor, other: Tensor) -> Tensor:
    """Shape ``(B,)`` so that it broadcasts over ``(B, ...)``."""
    return values.reshape(-1, *[1] * (other.ndim - 1))
