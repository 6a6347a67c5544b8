"""First batch: all that training and testing on priors ask of a module, tried before any step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from it3_lightning.engine.passes import copied
from it3_lightning.engine.restore import Snapshot, without_side_effects
from it3_lightning.integration.batches import normal
from it3_lightning.integration.candidates import ending
from it3_lightning.integration.isolation import without_logs
from it3_lightning.integration.module import Conditioned, checked_module
from it3_lightning.integration.output_tree import DETECTION, described, has_boxes
from it3_lightning.training.dual_pass import changed
from it3_lightning.training.noise import RandomNoise

_TARGET = """The prior cannot read the target of a batch, {got}. {error} Where that is no target, \
override
    def it3_target(self, batch):
        return batch["label"]  # as your steps take it"""

_CALL = """{name} cannot be called on the inputs of a batch, {got}: {error}. Override
    def it3_forward(self, inputs):
        return self(inputs["image"], inputs["mask"])  # as your steps do"""

_NO_TENSOR = """Expected it3_forward of {name} to return a tensor (B, ...), got {got}. Override
    def it3_forward(self, inputs):
        return self(inputs)["scores"]  # the prediction alone"""

_OUTPUTS = """The prior cannot read what {name} puts out. {error} Where self(...) returns \
something else than predictions, override
    def it3_outputs(self, returned):
        return returned[0]  # the prediction"""

_SIZES = """The target of a batch becomes a prior of shape {target}, and what {name} puts out one \
of {output}: samples and channels differ. Give the prior what fits both, or override
    def it3_outputs(self, returned):
        return returned[:, 0]  # the prediction, one row for each sample"""

_WITH_INPUTS = """Inputs are perturbed, and it3_inputs of {name} does not find them again in \
the batch that it3_with_inputs made{error}. Override
    def it3_with_inputs(self, batch, inputs):
        return {{**batch, "image": inputs}}  # a copy, in which it3_inputs finds these inputs"""

_SECOND = """Expected {name} to put out with a prior what it does without one, a tensor {first}, \
got {second}. Override
    def it3_forward(self, inputs):
        return self(inputs)  # as large with a prior as without"""

_LATE = """The prior enters at {layers}, whose output is the prediction: nothing that learns comes \
after it, so the second prediction is the first plus what the prior says by itself, whatever the \
inputs. Name a layer before it: suggest_layers(module, batch), or `it3 layers --config ...`, lists \
them."""


def check_target(module: Conditioned, target: Any, batch: Any = None) -> Tensor:
    """Return the target of a batch in label space.

    Args:
        module: to train.
        target: of a batch.
        batch: itself, where it is at hand.

    Raises:
        ValueError: the prior cannot read it.
        MisconfigurationException: it is one of detection, boxes of objects.
    """
    try:
        return module.it3_parts()[0].from_target(target)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        if has_boxes(target) or has_boxes(batch):
            raise MisconfigurationException(DETECTION) from error
        text = _TARGET.format(got=described(target), error=_ended(error))
        raise ValueError(text) from error


def check_passes(
    module: Conditioned, batch: Any, target: Any, perturb: Callable[[Any], Any] | None = None
) -> None:
    """Run a batch through both passes without gradients, and refuse what does not fit.

    Nothing is kept of it: neither random numbers, statistics, logs nor counts. Warns of a prior
    that enters where the network ends, and of input noise whose size does not fit the inputs.

    Args:
        module: to train.
        batch: the first one; it is not changed.
        target: of the batch.
        perturb: the inputs in training.

    Raises:
        MisconfigurationException: perturbed inputs are not found again, the module cannot predict
            from inputs alone, nothing tells which output is the prediction, the prior cannot read
            it, or both passes differ in shape.
    """
    checked_module(module, fitted=False)
    unseen = without_side_effects(Snapshot(module), partial(without_logs, module))
    with torch.inference_mode(False), unseen, torch.no_grad():
        inputs, name = normal(module.it3_inputs(batch)), type(module).__name__
        if perturb is not None:
            _check_inputs(module, batch, inputs, perturb(inputs))
            _check_noise(perturb, inputs)
        conditioning = module.it3_parts()[1]
        layers = conditioning.layers if conditioning.enters == "output" else ()
        with ending(module, layers) as at_the_end:
            first = _outputs(module, inputs)
        if late := at_the_end(first):
            rank_zero_warn(_LATE.format(layers=", ".join(map(repr, late))))
        prior = _prior(module, first)
        expected = check_target(module, target)
        if prior.shape[:2] != expected.shape[:2]:
            shapes = {"target": tuple(expected.shape), "output": tuple(prior.shape)}
            raise MisconfigurationException(_SIZES.format(name=name, **shapes))
        second = module.predict_with(inputs, prior)
        if second.shape != first.shape:
            shapes = {"first": tuple(first.shape), "second": tuple(second.shape)}
            raise MisconfigurationException(_SECOND.format(name=name, **shapes))


def _check_inputs(module: Conditioned, batch: Any, inputs: Any, perturbed: Any) -> None:
    """Refuse a module that does not find the inputs that were put into a batch."""
    if not changed(inputs, perturbed):
        return
    name = type(module).__name__
    try:
        found = tree_leaves(module.it3_inputs(module.it3_with_inputs(batch, perturbed)))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        text = _WITH_INPUTS.format(name=name, error=f" ({type(error).__name__}: {error})")
        raise MisconfigurationException(text) from error
    pairs = list(zip(found, tree_leaves(perturbed), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    if any(a.shape != b.shape or not torch.allclose(a, b, equal_nan=True) for a, b in tensors):
        raise MisconfigurationException(_WITH_INPUTS.format(name=name, error=""))


def _check_noise(perturb: Callable[[Any], Any], inputs: Any) -> None:
    """Warn of noise whose size does not fit the inputs."""
    parts = perturb.modules() if isinstance(perturb, nn.Module) else ()
    for misfit in [part.misfit(inputs) for part in parts if isinstance(part, RandomNoise)]:
        if misfit is not None:
            rank_zero_warn(misfit)


def _outputs(module: Conditioned, inputs: Any) -> Tensor:
    """Return what the neutral pass puts out."""
    name = type(module).__name__
    try:
        outputs: Any = module.predict_with(copied(inputs), None)
    except TypeError as error:
        text = _CALL.format(name=name, got=described(inputs), error=error)
        raise MisconfigurationException(text) from error
    if not isinstance(outputs, Tensor):
        raise MisconfigurationException(_NO_TENSOR.format(name=name, got=described(outputs)))
    return outputs


def _prior(module: Conditioned, outputs: Tensor) -> Tensor:
    """Return outputs in label space."""
    prior = module.it3_parts()[0]
    try:
        found = prior.from_output(outputs)
        prior.check_output(found)
        return found
    except (IndexError, TypeError, ValueError) as error:
        text = _OUTPUTS.format(name=type(module).__name__, error=_ended(error))
        raise MisconfigurationException(text) from error


def _ended(error: Exception) -> str:
    """Return what an error says, as a sentence."""
    return f"{str(error).rstrip('.')}."
