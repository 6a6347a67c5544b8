r"""The first step of a named optimizer in closed form: no moments, no copies.

Adam's first step is :math:`w - \eta\,g / (|g| + \epsilon)`, that of RMSprop
:math:`w - \eta\,g / (0.1 |g| + \epsilon)`, that of SGD :math:`w - \eta\,g`. Where one step is
all there is, a large gradient is used up as soon as backward has made it, while it is cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from it3_lightning.engine.polyak_step import PolyakStep
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.updates import HALF, OptimizerName

_EPS = 1e-8  # torch's default, of both optimizers
_SHARE = {"adam": 1.0, "adamw": 1.0, "rmsprop": 0.1}  # of |g| in the denominator; sqrt(1 - 0.99)
_CHUNK = 1 << 18  # elements worked on at once, so that they stay in the cache


def single_step(settings: Settings) -> FirstStep | PolyakStep | None:
    """Return the step in closed form, where one from the source is all there is."""
    if not settings.episodic or settings.steps != 1 or settings.anchor == "ema":
        return None
    optimizer, lr = settings.moves
    if settings.grad_clip is not None or callable(optimizer):
        return None
    return PolyakStep(lr) if optimizer == "polyak" else FirstStep(optimizer, lr)


class FirstStep:
    """The first step of ``"adam"``, ``"adamw"`` (no decay), ``"rmsprop"`` or ``"sgd"``.

    Args:
        optimizer: its name.
        lr: learning rate.

    >>> step, weights, gradients = FirstStep("adam", 0.1), torch.ones(2), torch.tensor([4.0, 0.0])
    >>> step.move(weights, gradients, out=gradients), gradients
    (tensor(1.9000), tensor([0.9000, 1.0000]))
    """

    def __init__(self, optimizer: OptimizerName, lr: float) -> None:
        self._share = _SHARE.get(optimizer)
        self._lr = lr
        self._buffers: dict[str, Tensor] = {}

    def backward(
        self, loss: Tensor, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Go back from the loss; return the moved weights of the parameters that it depends on.

        The weights are kept in memory that the next call overwrites. The parameters, which must be
        leaves that need gradients and have none, are left as they are.

        Returns:
            The weights by name, and their sum, which is finite if they are.
        """
        moved: dict[str, Tensor] = {}
        sums: list[Tensor] = []

        def use_up(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            moved[name] = self._buffer(name, parameter)
            sums.append(self.move(parameter.detach(), parameter.grad, out=moved[name]))
            parameter.grad = None

        with ExitStack() as hooks:
            for name, parameter in parameters.items():
                if parameter.numel() >= _CHUNK:
                    handle = parameter.register_post_accumulate_grad_hook(partial(use_up, name))  # type: ignore[no-untyped-call]
                    hooks.callback(handle.remove)
            loss.backward(inputs=list(parameters.values()))  # type: ignore[no-untyped-call]
        rest = {name: p for name, p in parameters.items() if p.grad is not None}
        if any(p.dtype in HALF for p in rest.values()):
            for name, parameter in rest.items():
                use_up(name, parameter)
        elif rest:
            small = self._move_together(rest)
            sums += torch._foreach_norm(list(small.values()))
            moved.update(small)
        for parameter in rest.values():
            parameter.grad = None
        ordered = {name: moved[name] for name in parameters if name in moved}
        return ordered, _total(sums) if sums else loss

    def move(self, weights: Tensor, gradients: Tensor, *, out: Tensor) -> Tensor:
        """Write moved weights into ``out``, which may be the gradients; return their sum.

        Gradients and ``out`` may have a dimension of samples in front of that of the weights; then
        so has the sum.
        """
        if weights.ndim < gradients.ndim:
            rows = max(1, _CHUNK // max(1, weights.numel()))
            samples = zip(_split(gradients, rows), _split(out, rows), strict=True)
            return torch.cat([self._move_rows(weights, g, its) for g, its in samples])
        if out.numel() > _CHUNK:
            order = sorted(range(out.ndim), key=out.stride, reverse=True)  # as it lies in memory
            parts = [part.permute(order) for part in (weights, gradients, out)]
            if all(part.is_contiguous() for part in parts):
                pieces = zip(*(_split(part.view(-1), _CHUNK) for part in parts), strict=True)
                return torch.stack([_sum(self.write(*piece)) for piece in pieces]).sum()
        return _sum(self.write(weights, gradients, out))

    def _move_rows(self, weights: Tensor, gradients: Tensor, out: Tensor) -> Tensor:
        if len(out) == 1:
            return self.move(weights, gradients[0], out=out[0])[None]
        return _sum(self.write(weights, gradients, out).reshape(len(out), -1), 1)

    def write(self, weights: Tensor, gradients: Tensor, out: Tensor) -> Tensor:
        """Write moved weights into ``out``, which may be the gradients, and return it."""
        if weights.dtype in HALF:
            full = gradients.float()
            return out.copy_(self.write(weights.float(), full, full))
        if self._share is None:
            return torch.add(weights, gradients, alpha=-self._lr, out=out)
        size = gradients.abs()
        if self._share != 1:
            size.mul_(self._share)
        return torch.addcdiv(weights, gradients, size.add_(_EPS), value=-self._lr, out=out)

    def _move_together(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Move many small ones in few calls."""
        weights = [p.detach() for p in parameters.values()]
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        if self._share is None:
            moved = torch._foreach_add(weights, gradients, alpha=-self._lr)
        else:
            sizes = list(torch._foreach_abs(gradients))
            if self._share != 1:
                torch._foreach_mul_(sizes, self._share)
            torch._foreach_add_(sizes, _EPS)
            moved = torch._foreach_addcdiv(weights, gradients, sizes, value=-self._lr)
        return dict(zip(parameters, moved, strict=True))

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        kept = self._buffers.get(name)
        if kept is None or _kind(kept) != _kind(like):
            kept = self._buffers[name] = torch.empty_like(like, requires_grad=False)
        return kept


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """Return what memory for moved weights must have in common with them."""
    return tensor.device, tensor.dtype, tensor.shape


def _total(sums: list[Tensor]) -> Tensor:
    if len({each.device for each in sums}) > 1:
        sums = [each.to(sums[0].device) for each in sums]
    return torch.stack(sums).sum()


def _sum(values: Tensor, dim: int | None = None) -> Tensor:
    """Sum in full precision: what overflows must be a weight, not the sum of many."""
    return values.sum(dim, dtype=torch.float32 if values.dtype in HALF else None)


def _split(tensor: Tensor, size: int) -> tuple[Tensor, ...]:
    return tensor.split(size)  # type: ignore[no-untyped-call, no-any-return]
