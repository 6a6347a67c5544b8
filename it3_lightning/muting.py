"""A pass that leaves no trace: nothing is logged, and no metric of the module moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric


@contextmanager
def muted(module: LightningModule) -> Iterator[None]:
    """Silence ``log`` and ``log_dict`` within, and put every torchmetrics state back afterwards.

    A user's step that runs twice must count once.
    """
    metrics = [
        (metric, _state(metric)) for metric in module.modules() if isinstance(metric, Metric)
    ]
    with silent(module):
        try:
            yield
        finally:
            for metric, state in metrics:
                metric.__dict__.update(_copied(state, {}))


@contextmanager
def silent(module: LightningModule) -> Iterator[None]:
    """Let ``self.log`` and ``self.log_dict`` do nothing within."""
    own = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    for name in ("log", "log_dict"):
        vars(module)[name] = _nothing
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)
        vars(module).update(own)


_BOOKKEEPING = ("_update_count", "_computed", "_forward_cache", "_is_synced", "_cache")


def _state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, *(name for name in _BOOKKEEPING if hasattr(metric, name))]
    return _copied({name: getattr(metric, name) for name in names}, {})


def _copied(values: Any, memo: dict[int, Tensor]) -> Any:
    """Copy nested state: tensors are cloned (shared ones once), lists are new lists."""
    if isinstance(values, Tensor):
        return memo.setdefault(id(values), values.detach().clone())
    if isinstance(values, dict):
        return {name: _copied(value, memo) for name, value in values.items()}
    if isinstance(values, list):
        return [_copied(value, memo) for value in values]
    return values


def _nothing(*_: Any, **__: Any) -> None:
    """Log nothing."""
