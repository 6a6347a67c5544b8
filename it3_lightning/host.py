"""What the callback must know of its host, the Trainer: what to refuse, and how tensors come."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from it3_lightning.conditioned import Conditioned
from it3_lightning.engine import Settings
from it3_lightning.engine.norm import batch_norms
from it3_lightning.protocols import IT3Module, check_parts

_SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)

_NEEDS_MIXIN = """Test-time adaptation needs a module that predicts with a prior; {name} does not.
    wrong:  model = {name}(...)
    right:  class IT3Net(IT3Mixin, {name}): pass
            model = IT3Net(..., prior=ClassPrior(10), conditioning=FeatureInjection("layer"))"""


_NEEDS_FORWARD = """{name} has no forward, so nothing tells how to predict from inputs alone.
    wrong:  class IT3Net(IT3Mixin, {name}): pass
    right:  class IT3Net(IT3Mixin, {name}):
                def it3_forward(self, inputs):
                    return self.net(inputs)  # as your steps do"""


def checked_module(module: LightningModule, *, fitted: bool = True) -> IT3Module:
    """Return the module as one that predicts with a prior.

    Args:
        module: of the Trainer.
        fitted: whether its prior must know the targets already.

    Raises:
        MisconfigurationException: it cannot, or its prior does not know the targets yet.
    """
    if not isinstance(module, IT3Module):
        raise MisconfigurationException(_NEEDS_MIXIN.format(name=type(module).__name__))
    check_parts(module)
    own = getattr(type(module), "it3_forward", None)
    if type(module).forward is LightningModule.forward and own is Conditioned.it3_forward:
        raise MisconfigurationException(_NEEDS_FORWARD.format(name=type(module).__name__))
    if fitted and not module.it3_prior.fitted:
        raise MisconfigurationException(
            f"{type(module.it3_prior).__name__} does not know the mean and spread of the targets. "
            "Give both to its constructor, train once, or load a checkpoint of a trained model."
        )
    return module


def check_trainer(
    trainer: Trainer, module: LightningModule, settings: Settings, independent_ranks: bool
) -> None:
    """Refuse what cannot be adapted, before any batch.

    Raises:
        MisconfigurationException: sharded weights, carried weights or shared batch statistics on
            several processes, or single samples where several are needed.
    """
    check_strategy(trainer)
    if trainer.world_size > 1 and not settings.episodic and not independent_ranks:
        raise MisconfigurationException(
            f"reset={settings.reset!r} carries weights along the stream, and {trainer.world_size} "
            "processes would each carry their own. Use reset='batch', one process, or "
            "independent_ranks=True if that is what you want."
        )
    if trainer.world_size > 1 and settings.norm_stats == "batch" and _synchronised(module):
        raise MisconfigurationException(
            "norm_stats='batch' with SyncBatchNorm shares statistics between processes, which take "
            "different numbers of passes and would wait for each other for ever. Test with "
            "sync_batchnorm=False, on one process, or with norm_stats='source'."
        )
    if settings.needs_batch and any(size == 1 for size in _batch_sizes(trainer)):
        raise MisconfigurationException(
            "norm_stats='batch' and balance terms need several samples, and a dataloader has "
            "batch_size=1. Use larger batches, or norm_stats='source' without a balance term."
        )
    if settings.norm_stats == "batch" and not batch_norms(module):
        rank_zero_warn("norm_stats='batch' has no effect: the module has no BatchNorm layer.")


def check_strategy(trainer: Trainer) -> None:
    """Refuse sharded weights.

    Raises:
        MisconfigurationException: they are.
    """
    if isinstance(trainer.strategy, _SHARDED):
        raise MisconfigurationException(
            f"{type(trainer.strategy).__name__} shards the weights, which cannot be swapped. Use "
            "one device or DDP for testing."
        )


def _synchronised(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.SyncBatchNorm) for layer in batch_norms(module))


def _batch_sizes(trainer: Trainer) -> list[Any]:
    """Return the batch sizes of the dataloaders about to run, where they are told."""
    loaders = {
        "test": trainer.test_dataloaders,
        "predict": trainer.predict_dataloaders,
    }.get(str(trainer.state.fn and trainer.state.fn.value), trainer.val_dataloaders)
    samplers = [getattr(loader, "batch_sampler", None) for loader in tree_leaves(loaders)]
    return [getattr(sampler, "batch_size", None) for sampler in samplers]


def normal(inputs: Any) -> Any:
    """Return copies of inputs that can take part in a backward pass, as inference tensors cannot.

    Always copies, so that a network that writes into its inputs spoils no batch. What else can
    clone itself, as batches of graphs can, is cloned too.
    """
    with torch.inference_mode(False), torch.no_grad():
        return tree_map(_clone, inputs)


def _clone(leaf: Any) -> Any:
    """Return a copy of a tensor, or of another object that has a ``clone`` method."""
    clone = getattr(leaf, "clone", None)
    return clone() if callable(clone) and not isinstance(leaf, type) else leaf
