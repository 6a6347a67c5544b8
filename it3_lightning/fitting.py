"""What fitting with priors needs beyond the loss: checks, the optimizer's parameters, clean-up."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from it3_lightning.posthoc import load_source
from it3_lightning.targets import training_targets

if TYPE_CHECKING:
    from it3_lightning.mixin import IT3Mixin

_MANUAL = """{name} optimizes manually, so its training_step cannot be run on two priors.
    wrong:  class IT3Net(IT3Mixin, {name}): pass
    right:  class IT3Net(IT3Mixin, {name}):
                def training_step(self, batch, batch_idx):
                    loss = self.it3_loss(batch, loss_fn)  # then backward and step, as you like"""


def check_step(module: LightningModule, step: Callable[..., Any]) -> None:
    """Refuse a ``training_step`` that cannot be run on two priors.

    Args:
        module: to train.
        step: its own ``training_step``.

    Raises:
        MisconfigurationException: there is no step, it optimizes manually, or it takes batches from
            an iterator itself.
    """
    path = getattr(step, "__qualname__", "").split(".")
    name = path[-2] if len(path) > 1 else type(module).__name__
    if getattr(step, "__func__", None) is LightningModule.training_step:
        raise MisconfigurationException(
            f"{type(module).__name__} has no training_step of its own to run on priors. Mix "
            "IT3Mixin into a LightningModule that has one, or write one with self.it3_loss."
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(_MANUAL.format(name=name))
    if "dataloader_iter" in inspect.signature(step).parameters:
        raise MisconfigurationException(
            f"training_step of {name} takes a dataloader_iter, so it cannot see the same batch "
            "twice. Let it take a batch."
        )


class Fitting(Callback):
    """Prepares fitting with priors and cleans up after it, however it ends."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the network; give the conditioning to the optimizer, alone where that is frozen."""
        module = _with_priors(pl_module)
        if module is None:
            return
        _load_due(module)
        own, frozen = list(module.it3_parts()[1].parameters()), module.it3_train == "conditioning"
        _optimize(trainer, own, only=frozen)
        if frozen:
            _warn_of_still_monitors(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the prior must know of the targets; a frozen network goes into eval mode."""
        module = _with_priors(pl_module)
        if module is None:
            return
        prior = module.it3_parts()[0]
        if not prior.fitted:
            prior.fit(training_targets(trainer, module.it3_target))
        if module.it3_frozen is not None:
            module.it3_frozen.stay_in_eval()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the network, where it is judged before it is fitted."""
        _load_due(_with_priors(pl_module))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the network, where it is judged before it is fitted."""
        _load_due(_with_priors(pl_module))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the network, where it is used before it is fitted."""
        _load_due(_with_priors(pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Thaw the network."""
        _thaw(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Thaw the network."""
        _thaw(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Thaw the network, where a search for a learning rate ended the fit early."""
        _thaw(pl_module)


def _with_priors(module: LightningModule) -> IT3Mixin | None:
    """Return the module where it trains on priors: a Trainer may go on with another one."""
    return cast("IT3Mixin", module) if getattr(module, "it3_train", "off") != "off" else None


def _load_due(module: IT3Mixin | None) -> None:
    """Load the source checkpoint, once."""
    if module is not None and module.it3_source_due and module.it3_source_checkpoint is not None:
        load_source(module, module.it3_source_checkpoint)
        module.it3_source_due = False


def _warn_of_still_monitors(trainer: Trainer) -> None:
    """Warn of callbacks that watch what a frozen network cannot improve."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and not monitor.startswith("it3/"):
            rank_zero_warn(
                f"{type(callback).__name__} monitors {monitor!r}, which stays the same while the "
                "network is frozen. Monitor 'it3/label_loss', the loss of the conditioning."
            )


def _thaw(module: LightningModule) -> None:
    mixed = _with_priors(module)
    if mixed is not None:
        mixed.it3_thaw()


def _optimize(trainer: Trainer, parameters: list[nn.Parameter], *, only: bool) -> None:
    """Make sure that the first optimizer sees these parameters, and no others where ``only``."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    wanted = {id(p) for p in parameters}
    seen = {id(p) for group in groups for p in group["params"]}
    for group in groups if only else []:
        group["params"][:] = [p for p in group["params"] if id(p) in wanted]
    if groups:
        groups[0]["params"].extend(p for p in parameters if id(p) not in seen)
