"""The passes of one training step: with the label's prior, silently, and with the neutral one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from it3_lightning.graphs import chosen_graphs, is_graph
from it3_lightning.muting import muted
from it3_lightning.steps import loss_of

if TYPE_CHECKING:
    from it3_lightning.mixin import IT3Mixin

Step = Callable[[Any], Any]


def run_passes(module: IT3Mixin, batch: Any, step: Step) -> tuple[Any, Tensor | None]:
    """Run a step on all its passes; a frozen network learns nothing from the neutral one.

    Args:
        module: to train.
        batch: with inputs and target.
        step: takes a batch and returns a loss, a mapping with ``"loss"``, or ``None``.

    Returns:
        What the step returned on the neutral priors, and the loss of all passes; ``None`` where a
        pass was skipped by returning ``None``.
    """
    settings, frozen = module.it3_dual_pass, module.it3_train == "conditioning"
    if settings.passes == "single":
        return _single_pass(module, batch, step)
    losses = [_label_pass(module, batch, step)]
    if settings.third_pass:
        losses.append(_own_pass(module, batch, step))
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        output = _given(module, None, step, batch)
    neutral = loss_of(output)
    found = [loss for loss in losses if loss is not None]
    if neutral is None or len(found) < len(losses):
        return output, None
    with_priors = torch.stack(found).sum()
    return output, with_priors if frozen else neutral + settings.label_weight * with_priors


class _SkippedError(Exception):
    """The step returned ``None``, so it may not have run the network."""


def _given(
    module: IT3Mixin, prior: Tensor | None, step: Step, batch: Any, present: Tensor | None = None
) -> Any:
    """Run the step on a prior; a step that skips the batch need not run the network."""
    try:
        with module.it3_parts()[1].given(prior, present):
            output = step(batch)
            if output is None:
                raise _SkippedError
    except _SkippedError:
        return None
    return output


def _label_pass(module: IT3Mixin, batch: Any, step: Step) -> Tensor | None:
    """Run the step on perturbed inputs and the label's perturbed prior, without a trace."""
    given, prior = _label_prior(module, batch)
    with muted(module):
        return loss_of(_given(module, prior, step, given))


def _own_pass(module: IT3Mixin, batch: Any, step: Step) -> Tensor | None:
    """Run the step on the module's own prediction as prior, without a trace."""
    prior = _own(module, module.it3_inputs(batch))
    with muted(module):
        return loss_of(_given(module, prior, step, copy.copy(batch)))


def _single_pass(module: IT3Mixin, batch: Any, step: Step) -> tuple[Any, Tensor | None]:
    """Run the step once, each sample on its prior or on the neutral one."""
    given, prior = _label_prior(module, batch)
    present = module.it3_dual_pass.present(prior.shape[0], prior.device)
    shown, structure = tree_flatten(module.it3_inputs(given))
    plain = tree_leaves(module.it3_inputs(batch))
    leaves = [_chosen(present, a, b) for a, b in zip(shown, plain, strict=True)]
    mixed = module.it3_with_inputs(batch, tree_unflatten(leaves, structure))
    output = _given(module, prior, step, mixed, present)
    return output, loss_of(output)


def _label_prior(module: IT3Mixin, batch: Any) -> tuple[Any, Tensor]:
    """Return the batch of the label pass, which the step may change, and its priors."""
    settings, prior = module.it3_dual_pass, module.it3_parts()[0]
    given = copy.copy(batch)
    if settings.perturb_inputs is not None:
        given = module.it3_with_inputs(batch, settings.perturb_inputs(module.it3_inputs(batch)))
    inputs = module.it3_inputs(given)
    return given, settings.prior(prior, module.it3_target(batch), lambda: _own(module, inputs))


def _own(module: IT3Mixin, inputs: Any) -> Tensor:
    """Return the module's own prediction in label space, without a gradient or a trace."""
    with torch.no_grad(), muted(module):
        prior = module.it3_parts()[0].from_output(module.predict_with(inputs, None))
    torch.clear_autocast_cache()  # weights cast without a gradient must not serve the other passes
    return prior


def _chosen(present: Tensor, a: Any, b: Any) -> Any:
    """Take ``a`` where a prior is present and ``b`` where not; other leaves than samples: ``a``."""
    if a is not b and is_graph(a):
        return chosen_graphs(present, a, b)
    if a is b or not isinstance(a, Tensor) or a.shape[:1] != present.shape:
        return a
    return torch.where(present.reshape(-1, *[1] * (a.ndim - 1)), a, b)
