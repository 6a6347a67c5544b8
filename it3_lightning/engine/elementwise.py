"""One optimizer for the weights of many samples, where it does to each what one alone would do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn, optim

from it3_lightning.engine.settings import Settings
from it3_lightning.engine.updates import optimizer_factory

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


def optimizer_of_all(settings: Settings, stacked: Iterable[Any]) -> optim.Optimizer:
    """Return the optimizer that one sample would get, for the weights ``(B, *shape)`` of all.

    Args:
        settings: of the adaptation.
        stacked: parameters, the samples in front.

    Raises:
        NotImplementedError: it may mix the weights of different samples.

    >>> import torch
    >>> many = nn.Parameter(torch.ones(2, 3))
    >>> optimizer_of_all(Settings(optimizer="sgd", lr=0.1), [many]).param_groups[0]["lr"]
    0.1
    """
    many = list(stacked)
    one = [nn.Parameter(weights.detach()[0]) for weights in many]  # shapes may decide
    chosen = settings.moves
    if settings.optimizer == "polyak":  # the gradients have the length of the step
        chosen = "sgd", 1.0
    optimizer = optimizer_factory(*chosen)(one)
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if type(optimizer) not in _ELEMENTWISE or hooks:
        raise NotImplementedError(
            f"{type(optimizer).__name__} may mix the samples' weights, as optimizers of one's own "
            "and those with hooks may"
        )
    all_of = {id(alone): weights for alone, weights in zip(one, many, strict=True)}
    groups = [
        {**group, "params": [all_of[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    kind: Any = type(optimizer)
    made: optim.Optimizer = kind(groups)
    return made
