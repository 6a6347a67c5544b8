"""Post-hoc training: a frozen network from an ordinary checkpoint, and what prepares fitting."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from it3_lightning.calibration import bits
from it3_lightning.conditioning import Conditioning
from it3_lightning.engine.selection import OWN
from it3_lightning.integration.checkpoints import load_source
from it3_lightning.integration.namespaces import NO_TRAINING_STEPS, AnyCallback, both
from it3_lightning.priors import Prior


class Frozen:
    """A network whose parameters need no gradient; once told, it stays in evaluation mode.

    Args:
        module: holds the network and the conditioning.
        conditioning: goes on learning.
    """

    def __init__(self, module: nn.Module, conditioning: nn.Module) -> None:
        own = set(conditioning.modules())
        kept = {id(p) for p in conditioning.parameters()}
        self._parameters = [p for p in module.parameters() if p.requires_grad and id(p) not in kept]
        self._modes = [(m, m.training) for m in module.modules() if m not in own]
        self.require_grad(False)

    def require_grad(self, need: bool) -> None:
        """Let the parameters need gradients, or not."""
        for parameter in self._parameters:
            parameter.requires_grad_(need)

    def melting(self, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
        """Whether a parameter needs a gradient, or is given to an optimizer."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        optimized = {id(p) for group in groups for p in group["params"]}
        return any(p.requires_grad or id(p) in optimized for p in self._parameters)

    def stay_in_eval(self) -> None:
        """Put the module and every layer of the network into evaluation mode."""
        for module, _ in self._modes:
            module.training = False

    def thaw(self) -> None:
        """Let the parameters need gradients again and put the modes back."""
        self.require_grad(True)
        self.put_modes_back()

    def put_modes_back(self) -> None:
        """Give every layer of the network the mode that it had."""
        for module, mode in self._modes:
            module.training = mode


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
    if getattr(step, "__func__", None) in NO_TRAINING_STEPS:
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


class FittedOnPriors(Protocol):
    """What fitting asks of a module; :class:`~it3_lightning.IT3Mixin` provides it."""

    it3_train: Literal["joint", "conditioning", "off"]
    it3_source_checkpoint: str | None
    it3_source_due: bool
    it3_frozen: Frozen | None

    def it3_parts(self) -> tuple[Prior, Conditioning]:
        """Return prior and conditioning."""

    def it3_thaw(self) -> None:
        """Undo the freezing of post-hoc training."""


def load_due(module: FittedOnPriors, *, early: bool = False) -> None:
    """Load the source checkpoint, where it is not in place.

    Args:
        module: waits for its source, or has it.
        early: a checkpoint of the module may yet be loaded, which brings the source along: a file
            that is not there is no error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a checkpoint of another network, or holds more than plain data.
        MisconfigurationException: no source checkpoint was given.
    """
    path = module.it3_source_checkpoint
    if not module.it3_source_due or (early and not (path and Path(path).is_file())):
        return
    if path is None:
        raise MisconfigurationException(
            f"Expected {type(module).__name__} to have the weights of its source, got a checkpoint "
            "written before they were loaded. Give source_checkpoint=..., or load a checkpoint "
            "written after fitting."
        )
    load_source(cast(nn.Module, module), path)
    module.it3_source_due = False


_WRITE_INTO_THE_NETWORK = (*both("callbacks.BaseFinetuning"), *both("callbacks.ModelPruning"))
_AVERAGE = (
    *both("callbacks.StochasticWeightAveraging"),
    *both("callbacks.WeightAveraging"),
)


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks whose purpose is to change the network that post-hoc training freezes.

    Raises:
        MisconfigurationException: there is one.
    """
    for callback in callbacks:
        if isinstance(callback, _WRITE_INTO_THE_NETWORK):
            raise MisconfigurationException(
                f"train='conditioning' freezes the network, and {type(callback).__name__} changes "
                "it. Leave out the callback, or train both: train='joint'."
            )


class Kept:
    """What a module held, a copy of it, to be put back whatever writes into it.

    Args:
        module: whose parameters and persistent buffers.
        wanted: says by their names which of them.
    """

    def __init__(self, module: nn.Module, wanted: Callable[[str], bool]) -> None:
        self._module = module
        self._wanted = wanted
        self.values: dict[str, Tensor] = {}
        self.take(wanted)

    def take(self, some: Callable[[str], bool]) -> None:
        """Keep some of them as they are now."""
        held = entries(self._module, lambda name: self._wanted(name) and some(name))
        self.values.update({name: value.detach().clone() for name, value in held.items()})

    def put_back(self) -> list[str]:
        """Write them back; return the names of those that had changed."""
        held = entries(self._module, self._wanted)
        changed = [n for n, v in self.values.items() if not torch.equal(bits(held[n]), bits(v))]
        with torch.no_grad():
            for name in changed:
                held[name].copy_(self.values[name])
        return changed


def entries(module: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by the names that ``state_dict`` gives them.

    Sharded or quantised ones, which are tensors of kinds of their own, are left out.

    >>> list(entries(nn.BatchNorm1d(1), lambda name: "mean" in name))
    ['running_mean']
    """
    found: dict[str, Tensor] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        passing = layer._non_persistent_buffers_set
        for name, value in {**layer._parameters, **layer._buffers}.items():
            full = f"{path}.{name}" if path else name
            if type(value) in (Tensor, nn.Parameter) and name not in passing and wanted(full):
                found[full] = value
    return found


_PRIOR = f"{OWN}prior."


class Fitting(AnyCallback):
    """Prepares fitting with priors, keeps still what must not move, and cleans up after it.

    The prior's statistics and, post-hoc, the network stay what they are: callbacks that average
    weights copy them too, and move them by rounding.
    """

    def __init__(self) -> None:
        self._kept: Kept | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the network; give the conditioning to the optimizer, alone where that is frozen."""
        module = _with_priors(pl_module)
        if module is None:
            return
        load_due(module)
        own, frozen = list(module.it3_parts()[1].parameters()), module.it3_train == "conditioning"
        _optimize(trainer, own, only=frozen)
        self._kept = Kept(pl_module, _still(module))
        if module.it3_frozen is not None:
            module.it3_frozen.put_modes_back()  # after a search for a learning rate
        if frozen:
            _warn_of_still_monitors(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put a frozen network into evaluation mode."""
        module = _with_priors(pl_module)
        if module is not None and module.it3_frozen is not None:
            module.it3_frozen.stay_in_eval()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what an epoch must not begin without; refuse what would train the network."""
        module = _with_priors(pl_module)
        if module is None or module.it3_frozen is None:
            return
        if module.it3_frozen.melting(trainer.optimizers):
            names = ", ".join(type(c).__name__ for c in trainer.callbacks if c is not self)  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "train='conditioning' freezes the network, and something gave its weights to an "
                f"optimizer or let them need gradients. The callbacks are {names}. Leave out the "
                "one that does, or train both: train='joint'."
            )
        changed = self._put_back()
        if changed and not any(map(_averages, trainer.callbacks)):  # type: ignore[attr-defined]
            rank_zero_warn(
                f"Something wrote into the frozen network: {', '.join(changed[:5])}"
                f"{', ...' * (len(changed) > 5)}. It has been put back. Look for a callback, or a "
                "training_step, that changes weights or buffers."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keep what the prior has measured."""
        module = _with_priors(pl_module)
        if module is not None:
            self._keep_measured(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure no more once all targets have been seen."""
        module = _with_priors(pl_module)
        if module is not None and trainer.is_last_batch and module.it3_parts()[0].measuring:
            module.it3_parts()[0].settle()
            if self._kept is not None:
                self._kept.take(lambda name: name.startswith(_PRIOR))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what averaged weights were written over."""
        self._put_back()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the network, where it is judged before it is fitted."""
        _load_before_use(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what averaged weights were written over, for the validation."""
        self._put_back()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the network, where it is judged before it is fitted."""
        _load_before_use(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the network, where it is used before it is fitted."""
        _load_before_use(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write what stays as it is, also where averaged weights take the place of the module's."""
        module = _with_priors(pl_module)
        if module is None:
            return
        self._keep_measured(trainer, module)
        live = self._kept is None
        still = entries(pl_module, _still(module)) if live else self._kept.values  # type: ignore[union-attr]
        for state in (checkpoint["state_dict"], checkpoint.get("current_model_state", {})):
            for name, value in still.items():
                if getattr(state.get(name), "shape", None) == value.shape:
                    state[name] = value.detach()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Thaw the network."""
        self._finish(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Thaw the network."""
        self._finish(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Thaw the network, where a search for a learning rate ended the fit early."""
        self._finish(pl_module)

    def _keep_measured(self, trainer: Trainer, module: FittedOnPriors) -> None:
        """Keep what the prior has measured, unless averaged weights are in place to be judged."""
        if self._kept is not None and trainer.training and module.it3_parts()[0].measuring:
            self._kept.take(lambda name: name.startswith(_PRIOR))

    def _put_back(self) -> list[str]:
        return [] if self._kept is None else self._kept.put_back()

    def _finish(self, module: LightningModule) -> None:
        self._put_back()
        self._kept = None
        mixed = _with_priors(module)
        if mixed is not None:
            mixed.it3_thaw()


def _with_priors(module: LightningModule) -> FittedOnPriors | None:
    """Return the module where it trains on priors: a Trainer may go on with another one."""
    return cast("FittedOnPriors", module) if getattr(module, "it3_train", "off") != "off" else None


def _load_before_use(module: LightningModule) -> None:
    mixed = _with_priors(module)
    if mixed is not None:
        load_due(mixed)


def _still(module: FittedOnPriors) -> Callable[[str], bool]:
    """Return what tells by its name whether an entry stays as it is while the module is fitted."""
    frozen = module.it3_train == "conditioning"
    return lambda name: name.startswith(_PRIOR) or (frozen and not name.startswith(OWN))


def _averages(callback: Callback) -> bool:
    """Whether a callback averages all weights, and so writes into a frozen network by rounding."""
    return isinstance(callback, _AVERAGE)


def _warn_of_still_monitors(trainer: Trainer) -> None:
    """Warn of callbacks that watch what a frozen network cannot improve."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and not monitor.startswith("it3/"):
            rank_zero_warn(
                f"{type(callback).__name__} monitors {monitor!r}, which stays the same while the "
                "network is frozen. Monitor 'it3/label_loss' or 'it3/val_label_loss', the "
                "loss of the conditioning."
            )


def _optimize(trainer: Trainer, parameters: list[nn.Parameter], *, only: bool) -> None:
    """Make sure that the first optimizer sees these parameters, and no others where ``only``."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    wanted = {id(p) for p in parameters}
    seen = {id(p) for group in groups for p in group["params"]}
    for group in groups if only else []:
        group["params"][:] = [p for p in group["params"] if id(p) in wanted]
    if groups:
        groups[0]["params"].extend(p for p in parameters if id(p) not in seen)
