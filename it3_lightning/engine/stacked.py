"""The weights of many samples, stacked: moved together, each by its own gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim

from it3_lightning.engine.first_step import FirstStep, single_step
from it3_lightning.engine.polyak import length
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.updates import Updater, full_precision, optimizer_factory

Weights = dict[str, Tensor]

_ELEMENTWISE = (  # each element moves by its own gradients alone, so stacking changes nothing
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.ASGD,
    optim.Rprop,
)


class Stacked:
    """Adapted weights ``(B, *shape)`` of ``B`` samples, their optimizer and anchor.

    Args:
        parameters: the adapting parameters by name, with the source weights in them.
        settings: how to adapt.
        size: ``B``.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: Settings, size: int
    ) -> None:
        self._settings = settings
        self._size = size
        self._source: Weights = {name: p.detach() for name, p in parameters.items()}
        self._single: FirstStep | None = single_step(settings)
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

    def step(self, gradients: Weights, active: Tensor, losses: Tensor) -> Tensor:
        """Move the active samples' weights; return ``(B,)`` on the CPU, whose are finite.

        Args:
            gradients: ``(B, *shape)``; overwritten.
            active: ``(B,)`` booleans on the CPU; the other samples' weights stay.
            losses: ``(B,)``, what the gradients are of.
        """
        self._moved |= active
        fresh = (~self._moved).nonzero()[:, 0].tolist()
        still = (self._moved & ~active).nonzero()[:, 0].tolist()
        before = {name: self.weights[name].detach()[still] for name in gradients if still}
        if self._single is not None:
            total = self._move_once(gradients, self._single)
        else:
            self._move(self._scaled(gradients, losses))
            total = torch.stack([_by_sample(w) for w in self.weights.values()]).sum(0)
        for name in gradients if fresh else ():
            self.weights[name].data[fresh] = self._source[name]
        for name, rows in before.items():
            self.weights[name].data[still] = rows
        if self._settings.anchor == "ema" and self._updater is not None:
            self._follow(active)
        finite = total.isfinite().cpu() | ~active
        for row in (~finite).nonzero()[:, 0].tolist():  # or is it only the sum that overflows?
            finite[row] = all(bool(w[row].isfinite().all()) for w in self.weights.values())
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
        moved: Weights = {}
        sums = []
        for name, gradient in gradients.items():
            shared = users[gradient.untyped_storage().data_ptr()] > 1 or 0 in gradient.stride()
            moved[name] = torch.empty_like(gradient) if shared else gradient
            sums.append(single.move(self._source[name], gradient, out=moved[name]))
        self.weights, self.dim = moved, 0
        return torch.stack(sums).sum(0)

    def _move(self, gradients: Weights) -> None:
        """Take a step of the optimizer; parameters without gradients have no influence."""
        if self._updater is None:
            stacked = {
                name: nn.Parameter(w.expand(self._size, *w.shape).clone())
                for name, w in self._source.items()
            }
            self._updater = Updater(list(stacked.values()), self._optimizer, None)
            self.weights, self.dim = dict(stacked), 0
            if self._settings.anchor == "ema":
                self._average = {
                    name: full_precision(w.detach()).clone() for name, w in stacked.items()
                }
        self._updater.step([gradients.get(name) for name in self.weights])
        self.weights = {name: w.detach() for name, w in self.weights.items()}

    def _optimizer(self, stacked: Iterable[Any]) -> optim.Optimizer:
        """Return the optimizer that one sample would get, for the weights of all.

        Raises:
            NotImplementedError: it may mix the weights of different samples.
        """
        many = list(stacked)
        one = [nn.Parameter(weights.detach()[0]) for weights in many]  # shapes may decide
        chosen = self._settings.moves
        if self._settings.optimizer == "polyak":  # the gradients have the length of the step
            chosen = "sgd", 1.0
        optimizer = optimizer_factory(*chosen)(one)
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if type(optimizer) not in _ELEMENTWISE or hooks:
            raise NotImplementedError(
                f"{type(optimizer).__name__} may mix the samples' weights, as optimizers of one's "
                "own and those with hooks may"
            )
        all_of = {id(alone): weights for alone, weights in zip(one, many, strict=True)}
        groups = [
            {**group, "params": [all_of[id(p)] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        kind: Any = type(optimizer)
        made: optim.Optimizer = kind(groups)
        return made

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


def _by_sample(values: Tensor) -> Tensor:
    """Sum over everything but the samples: ``(B, ...) -> (B,)``."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def _like(values: Tensor, other: Tensor) -> Tensor:
    """Shape ``(B,)`` so that it broadcasts over ``(B, ...)``."""
    return values.reshape(-1, *[1] * (other.ndim - 1))
