"""One optimizer step on given gradients: clipping, and float32 masters of half-precision weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from it3_lightning.messages import unknown

OptimizerName = Literal["adam", "adamw", "sgd", "rmsprop"]
OptimizerFactory = Callable[[Iterable[Any]], Optimizer]

_BY_NAME: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}


def optimizer_factory(optimizer: OptimizerName | OptimizerFactory, lr: float) -> OptimizerFactory:
    """Return a function that makes the optimizer for given parameters.

    Args:
        optimizer: a name (no weight decay, whatever torch's default), or a callable such as
            ``lambda p: torch.optim.SGD(p, lr=1e-3)``, whose own learning rate counts.
        lr: learning rate of a named optimizer.

    Raises:
        ValueError: the name is unknown or ``lr`` is negative.
    """
    if callable(optimizer):
        return optimizer
    if optimizer not in _BY_NAME:
        raise ValueError(unknown("optimizer", optimizer, _BY_NAME))
    if lr < 0:
        raise ValueError(f"Expected lr >= 0, got {lr}.")
    return lambda parameters: _BY_NAME[optimizer](parameters, lr=lr)


class Updater:
    """Moves parameters by an optimizer of its own.

    Half-precision parameters are moved through float32 masters: a step of 5e-6 would otherwise be
    lost in their rounding.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], factory: OptimizerFactory, clip: float | None
    ) -> None:
        self._parameters = parameters
        self._masters = [_master(p) for p in parameters]
        self._optimizer = factory(self._masters)
        self._clip = clip

    def step(self, gradients: Sequence[Tensor | None]) -> bool:
        """Apply one step; do nothing and return ``False`` where a gradient is not finite."""
        found = [g for g in gradients if g is not None]
        norm = torch.nn.utils.get_total_norm(found)
        if not bool(norm.isfinite()):
            return False
        if self._clip is not None:
            torch._foreach_mul_(found, (self._clip / (norm + 1e-6)).clamp(max=1.0))
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.to(master.dtype)
        self._optimizer.step()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = None
            if master is not parameter:
                parameter.data.copy_(master.data)
        return True

    def state(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state, for :meth:`load`."""
        return _cloned(self._optimizer.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        """Go back to a state; masters take the parameters' present values."""
        self._optimizer.load_state_dict(state)
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter:
                master.data.copy_(parameter.data)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return nn.Parameter(parameter.detach().float()) if half else parameter


def _cloned(value: Any) -> Any:
    """Copy nested state: tensors are cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cloned(item) for item in value]
    return value
