"""Post-hoc training: a frozen network from an ordinary checkpoint, and what prepares fitting."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from it3_lightning.conditioning import Conditioning
from it3_lightning.engine.selection import OWN
from it3_lightning.priors import Prior


def network_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state that are the network's own, and none of this library.

    >>> network_weights({"net.weight": 1, "it3_prior.mean": 2})
    {'net.weight': 1}
    """
    return {name: value for name, value in state.items() if not name.startswith(OWN)}


def load_source(module: nn.Module, path: str) -> None:
    """Load the weights of an ordinary checkpoint of the same network.

    Args:
        module: holds the network; what it has under ``it3_*`` is left alone.
        path: of a checkpoint of a Trainer, or of a saved ``state_dict``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a checkpoint of another network, or holds more than plain data.
    """
    saved = _read(path)
    state = network_weights(saved.get("state_dict", saved))
    own = network_weights(module.state_dict())
    wrong = _differences(own, state)
    if wrong:
        raise ValueError(
            f"{path!r} is a checkpoint of another network than {type(module).__name__}: "
            f"{'; '.join(wrong[:5])}{'; ...' * (len(wrong) > 5)}. Build the model with the "
            "arguments it was trained with."
        )
    module.load_state_dict(state)


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no checkpoint at {path!r}. Give source_checkpoint the path of an ordinary "
            "checkpoint of this network."
        )
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path!r} holds objects besides weights, which are not loaded: they could run code. "
            "Save the weights alone, torch.save(model.state_dict(), path), and give that path."
        ) from error
    return saved


def _differences(own: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Say which entries are missing, which are too many, and which have another shape."""
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in own.items()}
    return [
        *(f"missing {name}" for name in own if name not in state),
        *(f"unexpected {name}" for name in state if name not in own),
        *(
            f"{name} {tuple(getattr(state[name], 'shape', ()))} instead of {shape}"
            for name, shape in shapes.items()
            if name in state and tuple(getattr(state[name], "shape", ())) != shape
        ),
    ]


_BATCHES = 200  # at most, spread evenly over the data


def training_targets(trainer: Trainer, target: Callable[[Any], Tensor]) -> list[Tensor]:
    """Return the targets of up to 200 training batches, spread evenly over the data.

    The batches are read anew, in order: no random state, sampler or worker of the training loaders
    is touched, and every process sees the same. An iterable of one's own is iterated as it is.

    Args:
        trainer: about to train.
        target: returns the target of a batch.
    """
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")  # as a Trainer does
    loaders.flattened = [_reader(loader) for loader in loaders.flattened]
    with isolate_rng():
        return [target(batch) for batch, _, _ in islice(iter(loaders), _BATCHES)]


def _reader(loader: Any) -> Any:
    """Return a loader of the same batches, in order, that shares no state with the given one."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return loader
    dataset, size = loader.dataset, None
    if loader.batch_sampler is not None:
        size = getattr(loader.batch_sampler, "batch_size", 64)
        if not isinstance(dataset, IterableDataset):
            count = len(cast(Sized, dataset))
            dataset = Subset(dataset, range(0, count, -(-count // (_BATCHES * size)) or 1))
    return DataLoader(dataset, batch_size=size, collate_fn=loader.collate_fn)


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

    def stay_in_eval(self) -> None:
        """Put the module and every layer of the network into evaluation mode."""
        for module, _ in self._modes:
            module.training = False

    def thaw(self) -> None:
        """Let the parameters need gradients again and put the modes back."""
        self.require_grad(True)
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


class FittedOnPriors(Protocol):
    """What fitting asks of a module; :class:`~it3_lightning.IT3Mixin` provides it."""

    it3_train: Literal["joint", "conditioning", "off"]
    it3_source_checkpoint: str | None
    it3_source_due: bool
    it3_frozen: Frozen | None

    def it3_target(self, batch: Any) -> Any:
        """Return the target of a batch."""

    def it3_parts(self) -> tuple[Prior, Conditioning]:
        """Return prior and conditioning."""

    def it3_thaw(self) -> None:
        """Undo the freezing of post-hoc training."""


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


def _with_priors(module: LightningModule) -> FittedOnPriors | None:
    """Return the module where it trains on priors: a Trainer may go on with another one."""
    return cast("FittedOnPriors", module) if getattr(module, "it3_train", "off") != "off" else None


def _load_due(module: FittedOnPriors | None) -> None:
    """Load the source checkpoint, once."""
    if module is not None and module.it3_source_due and module.it3_source_checkpoint is not None:
        load_source(cast(nn.Module, module), module.it3_source_checkpoint)
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
