"""The passes of one training step: with the label's prior, silently, and with the neutral one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from it3_lightning.engine import batch_size
from it3_lightning.muting import muted

if TYPE_CHECKING:
    from it3_lightning.mixin import IT3Mixin

Step = Callable[[Any], Any]


def run_passes(module: IT3Mixin, batch: Any, step: Step) -> tuple[Any, Tensor | None]:
    """Run a step on all its passes.

    Args:
        module: to train.
        batch: with inputs and target.
        step: takes a batch and returns a loss, a mapping with ``"loss"``, or ``None``.

    Returns:
        What the step returned on the neutral priors, and the loss of all passes; ``None`` where a
        pass was skipped by returning ``None``.
    """
    settings = module.it3_dual_pass
    if module.it3_train == "conditioning":
        label = _label_pass(module, batch, step)
        with torch.no_grad():
            return _neutral_pass(module, batch, step), label
    if settings.passes == "single":
        return _single_pass(module, batch, step)
    losses = [_label_pass(module, batch, step)]
    if settings.third_pass:
        losses.append(_own_pass(module, batch, step))
    output = _neutral_pass(module, batch, step)
    neutral = loss_of(output)
    if neutral is None or any(loss is None for loss in losses):
        return output, None
    return output, neutral + settings.label_weight * sum(x for x in losses if x is not None)


def _neutral_pass(module: IT3Mixin, batch: Any, step: Step) -> Any:
    with module.it3_parts()[1].given(None):
        return step(batch)


def _label_pass(module: IT3Mixin, batch: Any, step: Step) -> Tensor | None:
    """Run the step on perturbed inputs and the label's perturbed prior, without a trace."""
    given, prior = _label_prior(module, batch)
    with muted(module), module.it3_parts()[1].given(prior):
        return loss_of(step(given))


def _own_pass(module: IT3Mixin, batch: Any, step: Step) -> Tensor | None:
    """Run the step on the module's own prediction as prior, without a trace."""
    prior = _own(module, module.it3_inputs(batch))
    with muted(module), module.it3_parts()[1].given(prior):
        return loss_of(step(batch))


def _single_pass(module: IT3Mixin, batch: Any, step: Step) -> tuple[Any, Tensor | None]:
    """Run the step once, each sample on its prior or on the neutral one."""
    given, prior = _label_prior(module, batch)
    present = module.it3_dual_pass.present(prior.shape[0], prior.device)
    if present is None:
        raise AssertionError("a single pass draws who sees a prior")
    mixed = tree_map(
        lambda a, b: _chosen(present, a, b), module.it3_inputs(given), module.it3_inputs(batch)
    )
    with module.it3_parts()[1].given(prior, present):
        output = step(module.it3_with_inputs(batch, mixed))
    return output, loss_of(output)


def _label_prior(module: IT3Mixin, batch: Any) -> tuple[Any, Tensor]:
    """Return the batch of the label pass and its priors."""
    settings, prior = module.it3_dual_pass, module.it3_parts()[0]
    given = batch
    if settings.perturb_inputs is not None:
        given = module.it3_with_inputs(batch, settings.perturb_inputs(module.it3_inputs(batch)))
    inputs = module.it3_inputs(given)
    return given, settings.prior(prior, module.it3_target(batch), lambda: _own(module, inputs))


@torch.no_grad()
def _own(module: IT3Mixin, inputs: Any) -> Tensor:
    with muted(module):
        return module.it3_parts()[0].from_output(module.predict_with(inputs, None))


def _chosen(present: Tensor, a: Any, b: Any) -> Any:
    if not isinstance(a, Tensor) or a is b or a.ndim == 0:
        return a
    return torch.where(present.reshape(-1, *[1] * (a.ndim - 1)), a, b)


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
