"""Training a conditioning on a network that is left alone: frozen, from an ordinary checkpoint.

Also the checks before any training with priors, and the clean-up after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from it3_lightning.engine.randomness import undisturbed_rng
from it3_lightning.selection import OWN

if TYPE_CHECKING:
    from it3_lightning.mixin import IT3Mixin

_FIT_BATCHES = 200  # of training targets, for the mean and spread of a ValuePrior


class Frozen:
    """A network whose parameters need no gradient and which stays in evaluation mode.

    Args:
        module: holds the network and the conditioning.
        conditioning: goes on learning.
    """

    def __init__(self, module: nn.Module, conditioning: nn.Module) -> None:
        own = set(conditioning.modules())
        kept = {id(p) for p in conditioning.parameters()}
        self._parameters = [p for p in module.parameters() if p.requires_grad and id(p) not in kept]
        self._modes = [
            (m, m.training) for m in module.modules() if m is not module and m not in own
        ]
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        self.stay_in_eval()

    def stay_in_eval(self) -> None:
        """Put every layer of the network into evaluation mode."""
        for module, _ in self._modes:
            module.training = False

    def thaw(self) -> None:
        """Let the parameters need gradients again and put the modes back."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for module, mode in self._modes:
            module.training = mode


class Fitting(Callback):
    """Checks before training with priors, and cleans up after it, however it ends."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be trained, before any work."""
        if stage == "fit" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes manually, so its training_step cannot be run "
                "on two priors. Use automatic optimization, or call self.it3_loss(batch, loss_fn) in "
                "your own training_step and set IT3Net(..., train='off')."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the conditioning to the optimizer, and only it where the network is frozen."""
        module = _mixed(pl_module)
        parameters = list(module.it3_parts()[1].parameters())
        _optimize(trainer, parameters, only=module.it3_train == "conditioning")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the prior must know of the training targets."""
        module = _mixed(pl_module)
        prior = module.it3_parts()[0]
        if not prior.fitted:
            with undisturbed_rng():
                prior.fit(_targets(module, trainer.train_dataloader))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Thaw the network."""
        _mixed(pl_module).it3_thaw()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Thaw the network."""
        _mixed(pl_module).it3_thaw()


def load_source(module: LightningModule, path: str) -> None:
    """Load the weights of an ordinary checkpoint of the same network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a checkpoint of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no checkpoint at {path!r}. Give source_checkpoint the path of an ordinary "
            "checkpoint of this network."
        )
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state = {k: v for k, v in loaded.get("state_dict", loaded).items() if not k.startswith(OWN)}
    own = {k: v for k, v in module.state_dict().items() if not k.startswith(OWN)}
    wrong = [
        *(f"missing {name}" for name in own if name not in state),
        *(f"unexpected {name}" for name in state if name not in own),
        *(
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ),
    ]
    if wrong:
        raise ValueError(
            f"{path!r} is a checkpoint of another network than {type(module).__name__}: "
            f"{'; '.join(wrong[:5])}{'; ...' * (len(wrong) > 5)}. Build the model with the "
            "arguments it was trained with."
        )
    module.load_state_dict(state)


def _mixed(module: LightningModule) -> IT3Mixin:
    return module  # type: ignore[return-value]


def _optimize(trainer: Trainer, parameters: list[nn.Parameter], *, only: bool) -> None:
    """Make sure that the first optimizer sees these parameters, and no others where ``only``."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    wanted = {id(p) for p in parameters}
    seen = {id(p) for group in groups for p in group["params"]}
    if only:
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) in wanted]
    if groups:
        groups[0]["params"].extend(p for p in parameters if id(p) not in seen)


def _targets(module: IT3Mixin, loader: Any) -> Iterator[Tensor]:
    loaders: Iterable[Any] = loader.values() if isinstance(loader, dict) else [loader]
    for each in loaders:
        for batch in islice(each, _FIT_BATCHES):
            yield module.it3_target(batch)
