"""Fused step: where one step is all there is, large gradients are used up while they are cached."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from it3_lightning.engine.optimizers import (
    CHUNK,
    HALF,
    OnlyStep,
    Rule,
    full_precision,
    rounded,
    write_first_step,
)


class FusedStep(OnlyStep):
    """The first step of a rule, straight from the backward pass to new weights.

    Args:
        rule: with a closed form of its first step.
        lr: learning rate.

    >>> from it3_lightning.engine.optimizers import OPTIMIZERS
    >>> w = nn.Parameter(torch.ones(1))
    >>> FusedStep(OPTIMIZERS["sgd"], 0.5).backward(w.sum(), {"w": w})
    ({'w': tensor([0.5000])}, tensor(0.5000))
    """

    def __init__(self, rule: Rule, lr: float) -> None:
        super().__init__(rule, lr)
        assert rule.first_step is not None
        self._first_step = rule.first_step
        self._buffers: dict[str, Tensor] = {}

    def backward(
        self, loss: Tensor, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Go back from the loss; return the moved weights of the parameters that it depends on.

        Large weights are kept in memory that the next call overwrites. The parameters, which must
        be leaves that need gradients and have none, are left as they are.

        Returns:
            The weights by name, and their sum, which is finite if they are.
        """
        moved: dict[str, Tensor] = {}
        sums: list[Tensor] = []

        def use_up(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            moved[name] = self._buffer(name, parameter)
            gradient = parameter.grad
            if gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            sums.append(self._write(parameter.detach(), gradient, moved[name]))
            parameter.grad = None

        with ExitStack() as hooks:
            for name, parameter in parameters.items():
                if parameter.numel() >= CHUNK and parameter.dtype not in HALF:
                    handle = parameter.register_post_accumulate_grad_hook(partial(use_up, name))  # type: ignore[no-untyped-call]
                    hooks.callback(handle.remove)
            loss.backward(inputs=list(parameters.values()))  # type: ignore[no-untyped-call]
        small = {name: p for name, p in parameters.items() if p.grad is not None}
        if small:
            weights = [p.detach() for p in small.values()]
            gradients = [full_precision(p.grad) for p in small.values() if p.grad is not None]
            full = self._first_step([full_precision(w) for w in weights], gradients, self._lr)
            kept = {n: rounded(m, w.dtype) for n, m, w in zip(small, full, weights, strict=True)}
            moved |= kept
            sums += torch._foreach_norm(list(kept.values()))
        for parameter in small.values():
            parameter.grad = None
        ordered = {name: moved[name] for name in parameters if name in moved}
        return ordered, _total(sums) if sums else loss

    def _write(self, weights: Tensor, gradients: Tensor, out: Tensor) -> Tensor:
        """Write moved weights into ``out``, piece by piece; return their sum."""
        order = sorted(range(out.ndim), key=out.stride, reverse=True)  # as it lies in memory
        parts = [part.permute(order) for part in (weights, gradients, out)]
        if not all(part.is_contiguous() for part in parts):
            return self._piece(weights, gradients, out)
        pieces = zip(*(_split(part.view(-1)) for part in parts), strict=True)
        return torch.stack([self._piece(*piece) for piece in pieces]).sum()

    def _piece(self, weights: Tensor, gradients: Tensor, out: Tensor) -> Tensor:
        write_first_step(self._rule, weights, gradients, self._lr, out)
        return out.sum(dtype=torch.float32 if out.dtype in HALF else None)

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


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(CHUNK)  # type: ignore[no-untyped-call, no-any-return]
