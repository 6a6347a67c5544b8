"""One optimizer step on given gradients: clipping, and masters of half-precision weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from it3_lightning.engine.polyak import Polyak
from it3_lightning.messages import unknown

OptimizerName = Literal["adam", "adamw", "sgd", "rmsprop", "polyak"]
OptimizerFactory = Callable[[Iterable[Any]], Optimizer]

HALF = (torch.float16, torch.bfloat16)


def optimizer_factory(optimizer: OptimizerName | OptimizerFactory, lr: float) -> OptimizerFactory:
    """Return a function that makes the optimizer for given parameters.

    Args:
        optimizer: a name (no weight decay, whatever torch's default), or a callable such as
            ``lambda p: torch.optim.SGD(p, lr=1e-3)``, whose own learning rate counts.
        lr: learning rate of a named optimizer; of ``"polyak"``, the share of the loss that a step
            is to take away.

    Raises:
        ValueError: the name is unknown or ``lr`` is negative.

    >>> optimizer_factory("sgd", 0.1)([nn.Parameter(torch.ones(1))]).param_groups[0]["lr"]
    0.1
    """
    if callable(optimizer):
        return optimizer
    if optimizer not in get_args(OptimizerName):
        raise ValueError(unknown("optimizer", optimizer, get_args(OptimizerName)))
    if lr < 0:
        raise ValueError(f"Expected lr >= 0, got {lr}.")
    return partial(_named, optimizer, lr)


def _named(name: OptimizerName, lr: float, parameters: Iterable[Tensor]) -> Optimizer:
    """Make an optimizer in its fastest form: fused where torch has it, else over lists."""
    given = list(parameters)
    if name == "polyak":
        return Polyak(given, lr)
    if name == "rmsprop":
        return torch.optim.RMSprop(given, lr=lr, foreach=True)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in given)
    if name == "sgd":
        return torch.optim.SGD(given, lr=lr, fused=fused)
    return torch.optim.AdamW(given, lr=lr, weight_decay=0.0, fused=fused)  # without decay, Adam


def full_precision(tensor: Tensor) -> Tensor:
    """Return a float32 copy of a half-precision tensor, any other tensor itself."""
    return tensor.float() if tensor.dtype in HALF else tensor


class Updater:
    """Moves parameters by an optimizer of its own.

    Half-precision parameters are moved through float32 masters: a step of 5e-6 would otherwise be
    lost in their rounding.

    Args:
        parameters: to move.
        factory: makes the optimizer.
        clip: largest total gradient norm, or ``None``.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], factory: OptimizerFactory, clip: float | None
    ) -> None:
        self._parameters = parameters
        self._masters = [_master(p) for p in parameters]
        self.optimizer = factory(self._masters)
        self._clip = clip

    @property
    def values(self) -> list[Tensor]:
        """The present values in full precision."""
        return [master.detach() for master in self._masters]

    def step(self, gradients: Sequence[Tensor | None], loss: Tensor | None = None) -> None:
        """Apply one step to the parameters; ``loss`` is what the gradients are of."""
        full = [None if g is None else full_precision(g) for g in gradients]
        if self._clip is not None:  # not in place: gradients may share memory
            norm = torch.nn.utils.get_total_norm([g for g in full if g is not None])
            scale = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            full = [None if g is None else g * scale.to(g.device) for g in full]
        for master, gradient in zip(self._masters, full, strict=True):
            master.grad = None if gradient is None else _laid_out(gradient, master)
        if isinstance(self.optimizer, Polyak):
            assert loss is not None
            self.optimizer.step(loss.detach)
        else:
            self.optimizer.step()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = None
            if master is not parameter:
                parameter.data.copy_(master.data)

    def state(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Return a copy of the optimizer's state and of the masters, for :meth:`load`."""
        optimizer: dict[str, Any] = _cloned(self.optimizer.state_dict())
        return optimizer, [value.clone() for value in self._own()]

    def load(self, state: tuple[dict[str, Any], list[Tensor]]) -> None:
        """Go back to a state; parameters that have no master are put back by their owner."""
        optimizer, masters = state
        self.optimizer.load_state_dict(optimizer)
        for master, value in zip(self._own(), masters, strict=True):
            master.copy_(value)

    def _own(self) -> list[Tensor]:
        """Return the masters that are not the parameters themselves."""
        pairs = zip(self._parameters, self._masters, strict=True)
        return [master.data for parameter, master in pairs if master is not parameter]


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float()) if parameter.dtype in HALF else parameter


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient that lies in memory as its parameter does: fused optimizers rely on it."""
    if gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like, requires_grad=False).copy_(gradient)


def _cloned(value: Any) -> Any:
    """Copy nested state: tensors are cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cloned(item) for item in value]
    return value
