"""Dual pass: the training loss with the label's prior and without, and its settings."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from it3_lightning.engine.restore import NormStatistics, Snapshot, Undo, without_side_effects
from it3_lightning.engine.trees import batch_size, laid_out, taken
from it3_lightning.integration.batches import normal
from it3_lightning.integration.isolation import muted, without_logs
from it3_lightning.integration.module import Conditioned
from it3_lightning.methods.views import drawn_by
from it3_lightning.priors import Prior
from it3_lightning.training.noise import RandomNoise
from it3_lightning.utils.graphs import chosen_graphs, is_graph
from it3_lightning.utils.specs import Described, built, spec


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


@dataclass(frozen=True)
class DualPass:
    r"""Settings of :math:`L = \ell(f(x, 0), y) + w\,\ell(f(x, p), y)`, ``p`` the label's prior.

    Args:
        label_weight: weight ``w`` of the passes that see a prior.
        passes: ``"dual"``: every sample goes through both passes; ``"single"``: one pass, each
            sample sees its prior or the neutral one at random, at half the cost.
        neutral_share: share of samples that see the neutral prior in a single pass.
        own_share: share of samples whose prior is the network's own prediction, not the label.
        third_pass: add a pass in which every prior is the network's own prediction.
        perturb_prior: blur the label's prior by a random amount; with exact labels the network
            learns to copy its prior, which is worthless at test time.
        perturb_inputs: a transform of the inputs in the label pass.
        norm_stats: statistics of BatchNorm layers in the passes that see a prior. ``"source"``: as
            in any pass of the training, the running ones post-hoc; ``"batch"``: those of the batch,
            for use with ``norm_stats="batch"`` at test time. No such pass moves the running ones
            then. A batch of one sample goes by ``"source"``, as it does at test time.
        unequal_share: share of batches whose samples are drawn anew for these passes, with
            replacement, by random weights of the classes: test batches may hold few classes, or
            some more often than others. The neutral pass sees the batch as it came.

    Raises:
        ValueError: a weight is negative, a share outside [0, 1] or a name unknown, or a single pass
            is to have statistics or samples of its own.
    """

    label_weight: float = 1.0
    passes: Literal["dual", "single"] = "dual"
    neutral_share: float = 0.5
    own_share: float = 0.0
    third_pass: bool = False
    perturb_prior: bool = True
    perturb_inputs: Callable[[Any], Any] | None = None
    norm_stats: Literal["source", "batch"] = "source"
    unequal_share: float = 0.0

    def __post_init__(self) -> None:
        if self.label_weight < 0:
            raise ValueError(f"Expected label_weight >= 0, got {self.label_weight}.")
        for name in ("neutral_share", "own_share", "unequal_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected {name} in [0, 1], got {getattr(self, name)}.")
        if self.passes not in ("dual", "single"):
            raise ValueError(f"Expected passes 'dual' or 'single', got {self.passes!r}.")
        if self.norm_stats not in ("source", "batch"):
            raise ValueError(f"Expected norm_stats 'source' or 'batch', got {self.norm_stats!r}.")
        if self.passes == "single" and (self.norm_stats == "batch" or self.unequal_share):
            raise ValueError(
                "Expected passes='dual' with norm_stats='batch' or unequal_share > 0, got "
                "'single': its one pass is also that in which the network learns of its data."
            )

    def prior(
        self, prior: Prior, target: Any, own: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the priors of the label pass, ``(B, C, ...)``, and where they say something.

        That is told as in :meth:`~it3_lightning.priors.Prior.known`.

        Args:
            prior: brings targets and outputs into label space.
            target: of the batch.
            own: runs the network on the inputs and returns its prediction in label space.
        """
        given, known = prior.from_target(target), prior.known(target)
        if self.perturb_prior:
            given = prior.perturb(given)
        if self.own_share == 0:
            return given, known
        theirs = own()
        chosen = torch.rand(given.shape[0], device=given.device) < self.own_share
        given = torch.where(_spread(chosen, given), theirs.to(given), given)
        return given, None if known is None else known | _spread(chosen, known)

    def present(self, batch_size: int, device: torch.device) -> Tensor:
        """Return which samples see their prior in a single pass, ``(B,)`` booleans."""
        return torch.rand(batch_size, device=device) >= self.neutral_share

    def init_args(self) -> dict[str, Any]:
        """Return the settings as plain data, less a perturbation that is not from this library.

        >>> DualPass(label_weight=0.5).init_args()["label_weight"]
        0.5
        """
        args = {field.name: getattr(self, field.name) for field in fields(self)}
        known = isinstance(self.perturb_inputs, Described)
        return {**args, "perturb_inputs": spec(self.perturb_inputs) if known else None}

    @classmethod
    def of(cls, given: DualPass | Mapping[str, Any] | None, *, post_hoc: bool) -> DualPass:
        """Return given settings, also where :meth:`init_args` describes them, or the default.

        Raises:
            ValueError: a single pass, post-hoc.
        """
        if given is None:
            return cls(own_share=0.5, perturb_inputs=RandomNoise()) if post_hoc else cls()
        settings = given if isinstance(given, DualPass) else cls(**_with_objects(given))
        if post_hoc and settings.passes == "single":
            raise ValueError(
                "Expected passes='dual' with train='conditioning', got 'single': a frozen network "
                "learns nothing on the neutral prior, so no sample need be spent on it."
            )
        return settings


def _with_objects(args: Mapping[str, Any]) -> dict[str, Any]:
    perturbation: Any = args.get("perturb_inputs")
    if isinstance(perturbation, Mapping):
        perturbation = built(perturbation, nn.Module)
    return {**args, "perturb_inputs": perturbation}


Step = Callable[[Any], Any]


def run_passes(
    module: Conditioned, settings: DualPass, batch: Any, step: Step, *, frozen: bool
) -> tuple[Any, Tensor | None, Tensor | None]:
    """Run a step on all its passes; a frozen network learns nothing from the neutral one.

    Args:
        module: to train.
        settings: of the label pass.
        batch: with inputs and target.
        step: takes a batch and returns a loss, a mapping with ``"loss"``, or ``None``.
        frozen: whether only the conditioning learns.

    Returns:
        What the step returned on the neutral priors, the loss of all passes, and of it the share of
        the passes that see a prior, as :func:`label_loss` returns it; ``None`` where a pass was
        skipped by returning ``None``. A single pass has no such share.
    """
    if settings.passes == "single":
        return *_single_pass(module, settings, batch, step), None
    with_priors = label_loss(module, settings, batch, step)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        output = _given(module, _Priors(None), step, batch)
    neutral = loss_of(output)
    if neutral is None or with_priors is None:
        return output, None, None
    loss = with_priors if frozen else neutral + settings.label_weight * with_priors
    return output, loss, with_priors


def label_loss(module: Conditioned, settings: DualPass, batch: Any, step: Step) -> Tensor | None:
    """Return the loss of the passes that see a prior, without their weight; they leave no trace.

    Args:
        module: whose loss.
        settings: of the label pass.
        batch: with inputs and target.
        step: takes a batch and returns a loss, a mapping with ``"loss"``, or ``None``.

    Returns:
        A scalar; ``None`` where a pass was skipped by returning ``None``.
    """
    given = _redrawn(module, settings.unequal_share, batch) if settings.unequal_share else batch
    with Undo() as undo:
        if settings.norm_stats == "batch" and size_of(module, given) > 1:
            NormStatistics(module, "batch", undo)
        losses = [_label_pass(module, settings, given, step)]
        if settings.third_pass:
            losses.append(_own_pass(module, given, step))
        undo.run()
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).sum() if len(found) == len(losses) else None


def validation_loss(
    module: Conditioned, settings: DualPass, batch: Any, step: Step, number: int
) -> Tensor | None:
    """Return the :func:`label_loss` of a validation batch, of which nothing is kept.

    Its random numbers are the same in every epoch, and no others are drawn.

    Args:
        module: whose loss; its modes stay as they are.
        settings: of the label pass.
        batch: with inputs and target; it is not changed.
        step: takes a batch and returns a loss, a mapping with ``"loss"``, or ``None``.
        number: of the batch.
    """
    unseen = without_side_effects(Snapshot(module), partial(without_logs, module))
    with torch.inference_mode(False), unseen, torch.no_grad():
        given = normal(batch)
        with drawn_by(0, number, given):
            return label_loss(module, settings, given, step)


def size_of(module: Conditioned, batch: Any) -> int:
    """Return the number of samples in a batch."""
    inputs = module.it3_inputs(batch)
    return batch_size(laid_out(inputs, module.it3_sample_dims(inputs)))


def _redrawn(module: Conditioned, share: float, batch: Any) -> Any:
    """Return the batch, or by this share of chances as many samples of it, drawn by random weights.

    Raises:
        ValueError: nothing tells which rows of the batch are a sample.
    """
    prior, target = module.it3_parts()[0], module.it3_target(batch)
    given = prior.from_target(target)
    ruled = type(module).it3_sample_dims is Conditioned.it3_sample_dims
    if not ruled or batch_size(batch) != len(given):
        raise ValueError(
            f"Expected a batch whose tensors have a row for each of its {len(given)} samples, got "
            "another one, or a module with it3_sample_dims. Use unequal_share=0, and let the "
            "DataLoader draw unequal batches."
        )
    if torch.rand(()).item() >= share or len(given) < 2:
        return batch
    weights, known = prior.weights(given), prior.known(target)
    if known is not None and known.any():
        weights = weights * known.reshape(len(given), -1).any(1)
    return taken(batch, torch.multinomial(weights, len(given), True).tolist())


class _SkippedError(Exception):
    """The step returned ``None``, so it may not have run the network."""


class _Priors(NamedTuple):
    """What a pass is shown: priors, where they are present, and any context."""

    prior: Tensor | None
    present: Tensor | None = None
    context: Tensor | None = None


def _given(module: Conditioned, priors: _Priors, step: Step, batch: Any) -> Any:
    """Run the step on priors; a step that skips the batch need not run the network."""
    try:
        with module.it3_parts()[1].given(*priors):
            output = step(batch)
            if output is None:
                raise _SkippedError
    except _SkippedError:
        return None
    return output


def _label_pass(module: Conditioned, settings: DualPass, batch: Any, step: Step) -> Tensor | None:
    """Run the step on perturbed inputs and the label's perturbed prior, without a trace."""
    given, priors = _label_priors(module, settings, batch)
    with muted(module):
        return loss_of(_given(module, priors, step, given))


def _own_pass(module: Conditioned, batch: Any, step: Step) -> Tensor | None:
    """Run the step on the module's own prediction as prior, without a trace."""
    priors = _Priors(_own(module, module.it3_inputs(batch)))
    with muted(module):
        return loss_of(_given(module, priors, step, copy.copy(batch)))


def _single_pass(
    module: Conditioned, settings: DualPass, batch: Any, step: Step
) -> tuple[Any, Tensor | None]:
    """Run the step once, each sample on its prior or on the neutral one."""
    given, priors = _label_priors(module, settings, batch)
    assert priors.prior is not None
    present = settings.present(len(priors.prior), priors.prior.device)
    mixed = _mixed(module, present, batch, module.it3_inputs(given))
    known = priors.present
    both = present if known is None else known & _spread(present, known)
    output = _given(module, priors._replace(present=both), step, mixed)
    return output, loss_of(output)


def _label_priors(module: Conditioned, settings: DualPass, batch: Any) -> tuple[Any, _Priors]:
    """Return the batch of the label pass, which the step may change, and what it is shown.

    The context is that of the first predictions on the same inputs, as at test time; in a stream,
    of as many as count there.
    """
    prior = module.it3_parts()[0]
    given = copy.copy(batch)
    if settings.perturb_inputs is not None:
        plain = module.it3_inputs(batch)
        perturbed = settings.perturb_inputs(plain)
        if changed(plain, perturbed):
            given = module.it3_with_inputs(batch, perturbed)
    inputs = module.it3_inputs(given)
    own = cache(lambda: _own(module, inputs))
    shown, known = settings.prior(prior, module.it3_target(batch), own)
    context = None if prior.context is None else prior.context_of(own()[: prior.window])
    return given, _Priors(shown, known, context)


def changed(before: Any, after: Any) -> bool:
    """Whether any tensor or object in one structure is another in the other one.

    >>> changed([1, (tokens := torch.tensor([2]))], [1, tokens])
    False
    """
    one, other = tree_leaves(before), tree_leaves(after)
    return len(one) != len(other) or any(a is not b for a, b in zip(one, other, strict=True))


def _own(module: Conditioned, inputs: Any) -> Tensor:
    """Return the module's own prediction in label space, without a gradient or a trace."""
    with torch.no_grad(), muted(module):
        prior = module.it3_parts()[0].from_output(module.predict_with(inputs, None))
    torch.clear_autocast_cache()  # weights cast without a gradient must not serve the other passes
    return prior


def partly(
    module: Conditioned, perturbation: Callable[[Any], Any], batch: Any, share: float = 0.5
) -> Any:
    """Return a batch of which a share of the samples, drawn at random, has perturbed inputs.

    Ordinary training on such batches is the matched control of a label pass that perturbs inputs.
    """
    inputs = module.it3_inputs(batch)
    present = torch.rand(batch_size(inputs), device=module.device) < share
    return _mixed(module, present, batch, perturbation(inputs))


def _mixed(module: Conditioned, present: Tensor, batch: Any, inputs: Any) -> Any:
    """Return a batch with other inputs for the samples that are present, ``(B,)`` booleans."""
    shown, structure = tree_flatten(inputs)
    plain = tree_leaves(module.it3_inputs(batch))
    if not changed(plain, shown):
        return copy.copy(batch)
    leaves = [_chosen(present, a, b) for a, b in zip(shown, plain, strict=True)]
    return module.it3_with_inputs(batch, tree_unflatten(leaves, structure))


def _spread(samples: Tensor, like: Tensor) -> Tensor:
    """Shape ``(B,)`` so that it broadcasts over ``(B, ...)``."""
    return samples.reshape(-1, *[1] * (like.ndim - 1))


def _chosen(present: Tensor, a: Any, b: Any) -> Any:
    """Take ``a`` where a prior is present and ``b`` where not; other leaves than samples: ``a``."""
    if a is not b and is_graph(a):
        return chosen_graphs(present, a, b)
    if a is b or not isinstance(a, Tensor) or a.shape[:1] != present.shape:
        return a
    return torch.where(_spread(present, a), a, b)
