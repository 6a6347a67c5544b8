"""What the callback must know of its host, the Trainer: what to refuse, and how tensors come."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils._pytree import tree_leaves

from it3_lightning.engine import Settings
from it3_lightning.engine.restore import batch_norms
from it3_lightning.integration.namespaces import both

_SHARDED = tuple(
    kind
    for name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
    for kind in both(f"strategies.{name}")
)


def check_trainer(
    trainer: Trainer,
    module: LightningModule,
    settings: Settings,
    independent_ranks: bool,
    *,
    second: bool = False,
    bets: bool = False,
) -> None:
    """Refuse what cannot be adapted, before any batch.

    Args:
        trainer: about to run.
        module: that it runs.
        settings: how to adapt.
        independent_ranks: whether processes may carry weights of their own.
        second: whether second predictions are asked for.
        bets: whether a bet along the stream says what is adapted to.

    Raises:
        MisconfigurationException: sharded weights, or on several processes carried weights, carried
            contexts, bets or shared batch statistics, or single samples where several are needed.
    """
    check_strategy(trainer)
    if trainer.world_size > 1 and not settings.episodic and not independent_ranks:
        raise MisconfigurationException(
            f"reset={settings.reset!r} carries weights, or an optimizer's state, along the stream, "
            f"and {trainer.world_size} processes would each carry their own. Use reset='batch', "
            "one process, or independent_ranks=True if that is what you want."
        )
    if trainer.world_size > 1 and settings.norm_stats == "batch" and _synchronised(module):
        raise MisconfigurationException(
            "norm_stats='batch' with SyncBatchNorm shares statistics between processes, which take "
            "different numbers of passes and would wait for each other for ever. Test with "
            "sync_batchnorm=False, on one process, or with norm_stats='source'."
        )
    context = getattr(getattr(module, "it3_prior", None), "context", None) if second else None
    if trainer.world_size > 1 and context == "stream" and not independent_ranks:
        raise MisconfigurationException(
            f"context='stream' of the prior is carried along the stream, and {trainer.world_size} "
            "processes would each carry their own. Use one process, or independent_ranks=True if "
            "that is what you want."
        )
    if trainer.world_size > 1 and bets and not independent_ranks:
        raise MisconfigurationException(
            f"gate='bet' bets along the stream, and {trainer.world_size} processes would each bet "
            "on their own share of it. Use one process, or independent_ranks=True if that is what "
            "you want: each is then open for itself, and delta holds for each."
        )
    if context == "batch" and any(size == 1 for size in _batch_sizes(trainer)):
        raise MisconfigurationException(
            "context='batch' of the prior is of several samples, and a dataloader has "
            "batch_size=1. Use batches about as large as those in training, or a module whose "
            "prior was trained without a context."
        )
    if settings.needs_batch and any(size == 1 for size in _batch_sizes(trainer)):
        raise MisconfigurationException(
            "norm_stats='batch' and balance terms need several samples, and a dataloader has "
            "batch_size=1. Use larger batches, or norm_stats='source' without a balance term."
        )
    kind = settings.norm_stats
    if kind in ("batch", "evidence") and not batch_norms(module):
        rank_zero_warn(f"norm_stats={kind!r} has no effect: the module has no BatchNorm layer.")


def wait_for_all(trainer: Trainer) -> None:
    """Wait until every process has predicted its batches: Lightning misses none that was killed.

    Raises:
        RuntimeError: another process has ended, or is later than the process group's timeout.
    """
    if trainer.world_size == 1:
        return
    try:
        trainer.strategy.barrier("it3_predicted")
    except RuntimeError as error:
        raise RuntimeError(
            f"Process {trainer.global_rank} has predicted all its batches, but of "
            f"{trainer.world_size} processes another one has ended before (killed, out of memory, "
            "failed), or is later than the timeout of DDPStrategy(timeout=...). Its predictions "
            "are missing: see its output, and predict again."
        ) from error


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
