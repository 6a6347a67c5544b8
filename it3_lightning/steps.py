"""A `training_step` of anyone's: how it is called, and the loss in what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def called(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a step with as many positional arguments as it takes: ``batch_idx`` is optional.

    >>> called(lambda batch: batch, 1, 2)
    1
    """
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return step(*args, **kwargs)
    takes = sum(
        k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for k in kinds
    )
    return step(*args[:takes], **kwargs)


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in what a step returned: a tensor, a mapping with ``"loss"``, or ``None``.

    Raises:
        TypeError: it is something else.
    """
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        loss: Tensor = output["loss"]
        return loss
    raise TypeError(
        "Expected training_step to return a loss tensor, a dict with a tensor 'loss', or None, got "
        f"{type(output).__name__}."
    )


def with_loss(output: Any, loss: Tensor | None) -> Any:
    """Return a step's output with another loss in it.

    >>> with_loss({"loss": 1, "preds": 2}, None) is None
    True
    """
    if loss is None or not isinstance(output, Mapping):
        return loss
    return {**output, "loss": loss}
