"""`IT3Mixin`: the dual-pass training loss for any LightningModule, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, get_args

import lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from it3_lightning.conditioning import Conditioning
from it3_lightning.engine.selection import OWN
from it3_lightning.integration.checkpoints import (
    KEPT,
    exported,
    plain,
    plain_data,
    save_plain,
)
from it3_lightning.integration.module import Conditioned
from it3_lightning.priors import Prior
from it3_lightning.training.dual_pass import (
    DualPass,
    called,
    run_passes,
    size_of,
    validation_loss,
    with_loss,
)
from it3_lightning.training.first_batch import check_passes, check_target
from it3_lightning.training.post_hoc import (
    Fitting,
    Frozen,
    check_callbacks,
    check_step,
    load_due,
)

Train = Literal["joint", "conditioning", "off"]

_DUE = f"{OWN}source_due"  # among weights about to be loaded: they are not those of the source

LossFn = Callable[[Tensor, Any], Tensor]


def _adam(parameters: Any) -> torch.optim.Optimizer:
    """Make the optimizer of post-hoc training where none is given."""
    return torch.optim.Adam(parameters, lr=1e-3)


class IT3Mixin(Conditioned):
    r"""Trains a LightningModule to predict with a prior of the label and without one.

    ``class IT3Net(IT3Mixin, LitNet): pass`` trains ``LitNet`` by its own ``training_step``, run
    once with the label as prior (silently: nothing it logs, counts or collects on the module is
    kept) and once with the neutral prior:
    :math:`L = \ell(f(x, 0), y) + w\,\ell(f(x, p(y)), y)` (Durasov et al., IT3, ICML 2025).
    All other arguments go to ``LitNet``. Both passes of joint training move the running statistics
    of BatchNorm layers, as published; post-hoc none does. Activation checkpointing must not enclose
    a layer where the prior enters: recomputed in the backward pass, it would miss the prior; nor a
    BatchNorm layer, where ``dual_pass`` has ``norm_stats="batch"``.

    Args:
        prior: how labels and outputs become priors.
        conditioning: how a prior enters the network.
        train: ``"joint"``: all weights learn both passes, as published; ``"conditioning"``: the
            network is frozen, in evaluation mode, and only the conditioning learns (post-hoc);
            ``"off"``: the plain module. Default: ``"conditioning"`` where a ``source_checkpoint``
            is given, else ``"joint"``.
        source_checkpoint: an ordinary checkpoint of the network, loaded when a Trainer first fits,
            tests or predicts, before any callback sees the network; not where a checkpoint of the
            module itself was loaded before. Checkpoints say whether its weights are in place.
        dual_pass: settings of the label pass. Post-hoc default: half of the priors the network's
            own prediction, inputs perturbed by :class:`~it3_lightning.RandomNoise`.
        conditioning_optimizer: makes the optimizer of post-hoc training; default Adam, 1e-3. It
            cannot be kept in a checkpoint.

    Raises:
        TypeError: ``prior`` or ``conditioning`` is something else.
        ValueError: ``train`` is unknown or loads no checkpoint, the conditioning names a layer that
            does not exist, or a single pass is asked for where the network does not learn.
        MisconfigurationException: before any batch: prior or conditioning are missing (also when a
            checkpoint is loaded), or fitting finds a ``training_step`` that cannot be run twice;
            with the first batch, before any step: outputs, target and prior do not fit.
    """

    it3_frozen: Frozen | None = None

    def __init__(
        self,
        *args: Any,
        prior: Prior | None = None,
        conditioning: Conditioning | None = None,
        train: Train | None = None,
        source_checkpoint: str | None = None,
        dual_pass: DualPass | None = None,
        conditioning_optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        parts, settings, optimizer = (prior, conditioning), dual_pass, conditioning_optimizer
        # What save_hyperparameters() of the base finds here is data; a function has none.
        prior, conditioning = map(plain, parts)
        dual_pass = settings.init_args() if isinstance(settings, DualPass) else settings  # type: ignore[assignment]
        conditioning_optimizer = None
        super().__init__(*args, prior=parts[0], conditioning=parts[1], **kwargs)
        mode = train or ("conditioning" if source_checkpoint else "joint")
        if mode not in get_args(Train):
            raise ValueError(f"Expected train 'joint', 'conditioning' or 'off', got {train!r}.")
        if mode == "off" and source_checkpoint is not None:
            raise ValueError(
                "train='off' loads no source_checkpoint. Give the plain module's checkpoint to the "
                "Trainer, ckpt_path=..., or leave out train."
            )
        own = {"train": train, "source_checkpoint": source_checkpoint, "dual_pass": settings}
        self._it3_given = {name for name, value in own.items() if value is not None}
        self.it3_train: Train = mode
        self.it3_source_checkpoint = source_checkpoint
        self.it3_source_due = source_checkpoint is not None
        self.it3_dual_pass = DualPass.of(settings, post_hoc=mode == "conditioning")
        self.it3_optimizer: OptimizerCallable = optimizer or _adam
        self.it3_frozen = None
        self._it3_checked = False  # whether a batch has been through all passes of this fit
        self._it3_validates = True  # whether its training_step is run on validation batches

    def it3_loss(self, batch: Any, loss_fn: LossFn) -> Tensor:
        """Return the dual-pass loss of a batch, for a ``training_step`` of one's own.

        Args:
            batch: with inputs and target.
            loss_fn: ``(outputs, target) -> scalar``.
        """

        def step(given: Any) -> Tensor:
            return loss_fn(self.it3_forward(self.it3_inputs(given)), self.it3_target(given))

        loss = self._it3_passes(batch, step)[1]
        if loss is None:
            raise ValueError("Expected loss_fn to return a scalar tensor, got None.")
        return loss

    def it3_export(self, path: str | Path) -> None:
        """Write the checkpoint of the network alone, without prior and conditioning.

        The class that this one was mixed with reads it, ``LitNet.load_from_checkpoint(path)``; so
        does ``it3 export CHECKPOINT PATH`` for a checkpoint of this module.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            ValueError: the network still waits for its ``source_checkpoint``.
        """
        checkpoint: dict[str, Any] = {
            "epoch": self.current_epoch,
            "global_step": self.global_step,
            "pytorch-lightning_version": lightning.__version__,
            "state_dict": self.state_dict(),
        }
        if self.hparams:
            name, key = self._hparams_name, self.CHECKPOINT_HYPER_PARAMS_KEY
            checkpoint |= {self.CHECKPOINT_HYPER_PARAMS_NAME: name, key: dict(self.hparams)}
        self.on_save_checkpoint(checkpoint)
        save_plain(exported(checkpoint), path)

    # What Lightning calls

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own step on both priors and return it with the loss of both.

        Called by another step, in validation, test or prediction, it is the module's own: a label
        that the network is shown has no place in a score.
        """
        step = super().training_step
        if self.it3_train == "off" or self._it3_evaluating:
            return called(step, batch, *args, **kwargs)
        output, loss = self._it3_passes(batch, lambda b: called(step, b, *args, **kwargs))
        return with_loss(output, loss)

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the loss of the label pass on a validation batch, while the module is fitted."""
        called(super().on_validation_batch_end, outputs, batch, batch_idx, dataloader_idx)
        own = type(self).training_step is IT3Mixin.training_step  # else nothing tells the loss
        if own and self._it3_validates and self._it3_fitting and not self.trainer.sanity_checking:
            step = super().training_step
            self._it3_validate(batch, batch_idx, lambda b: called(step, b, batch_idx))

    def configure_model(self) -> None:
        """Attach the conditioning; load the source, check the training, freeze post-hoc."""
        if self.it3_train != "off" and self._trainer is not None:  # else a checkpoint may have them
            self.it3_parts()
        super().configure_model()
        if self.it3_source_due:
            load_due(self, early=True)
        if not self._it3_fitting:
            return
        if type(self).training_step is IT3Mixin.training_step:
            check_step(self, super().training_step)
        if self.it3_train == "conditioning":
            self.it3_freeze()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how it is trained, as plain data, and whether the source is in place."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEPT] |= plain_data(
            train=self.it3_train,
            source_checkpoint=self.it3_source_checkpoint,
            dual_pass=self.it3_dual_pass.init_args(),
            source_in_place=not self.it3_source_due,
        )
        hparams = checkpoint.get("hyper_parameters", {})
        hparams.update({k: v.init_args() for k, v in hparams.items() if isinstance(v, DualPass)})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take a checkpoint with priors for what it is: the network need not be loaded again.

        A module that was made without its parts takes them from there, and with them those of its
        settings that were not given.

        Raises:
            MisconfigurationException: prior or conditioning are neither given nor kept there.
        """
        bare = self.it3_prior is None or self.it3_conditioning is None
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get(KEPT, {})
        if bare:
            self._it3_take({k: v for k, v in kept.items() if k not in self._it3_given})
        in_place = kept.get("source_in_place", True)
        with self._it3_reading():
            if not isinstance(in_place, bool):
                raise ValueError(f"Expected its source_in_place to be a bool, got {in_place!r}.")
        if not in_place:
            checkpoint["state_dict"][_DUE] = torch.tensor(True)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; with those of the conditioning come those of its network."""
        state = dict(state_dict)
        due = bool(state.pop(_DUE, False))
        if any(name.startswith(OWN) for name in state):
            self.it3_source_due = due
        return super().load_state_dict(state, strict=strict, assign=assign)

    def on_train_start(self) -> None:
        """Put a frozen network into evaluation mode, in a search for a learning rate too."""
        super().on_train_start()
        if self.it3_frozen is not None:
            self.it3_frozen.stay_in_eval()

    def configure_optimizers(self) -> Any:
        """Return the module's own optimizers; post-hoc, one of the conditioning alone."""
        if self.it3_train == "conditioning":
            return self.it3_optimizer(self.it3_parts()[1].parameters())
        return super().configure_optimizers()

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Add what prepares fitting with priors and cleans up after it, once for each Trainer."""
        given = super().configure_callbacks()
        own = [*given] if isinstance(given, Sequence) else [given]
        if self.it3_train == "off":
            return own
        present: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self._it3_fitting and self.it3_train == "conditioning":
            check_callbacks([*present, *own])
        parts = self.it3_prior is not None and self.it3_conditioning is not None
        if self.it3_source_due and parts and not self._builds_later():
            load_due(self, early=True)  # callbacks copy the network in their setup
        if not (self._it3_fitting or self.it3_source_due):
            return own
        return own if any(isinstance(c, Fitting) for c in present) else [*own, Fitting()]

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen network stays in evaluation mode."""
        super().train(mode)
        if self.it3_frozen is not None:
            self.it3_frozen.stay_in_eval()
        return self

    # How it works

    def _it3_take(self, kept: Mapping[str, Any]) -> None:
        """Take the settings that a checkpoint keeps."""
        with self._it3_reading():
            mode = kept.get("train", self.it3_train)
            if mode not in get_args(Train):
                raise ValueError(f"Expected its train among {get_args(Train)}, got {mode!r}.")
            self.it3_train = mode
            self.it3_source_checkpoint = kept.get("source_checkpoint", self.it3_source_checkpoint)
            if "dual_pass" in kept:
                given, post_hoc = kept["dual_pass"], mode == "conditioning"
                self.it3_dual_pass = DualPass.of(given, post_hoc=post_hoc)
        if mode != "off":
            self.it3_parts()

    def it3_freeze(self) -> None:
        """Freeze the network, unless it is frozen."""
        if self.it3_frozen is None:
            self.it3_frozen = Frozen(self, self.it3_parts()[1])

    def it3_thaw(self) -> None:
        """Undo the freezing of post-hoc training; the next fit checks its first batch anew."""
        self._it3_checked = False
        self._it3_validates = True
        if self.it3_frozen is not None:
            self.it3_frozen.thaw()
            self.it3_frozen = None

    @contextmanager
    def it3_trainable(self) -> Iterator[None]:
        """Let a frozen network's parameters need gradients within, as they do after fitting."""
        if self.it3_frozen is None:
            yield
            return
        self.it3_frozen.require_grad(True)
        try:
            yield
        finally:
            self.it3_frozen.require_grad(False)

    @property
    def _it3_evaluating(self) -> bool:
        """Whether a Trainer validates, tests or predicts with the module just now."""
        stage = None if self._trainer is None else self._trainer.state.stage
        return stage is not None and stage.value != "train"

    @property
    def _it3_fitting(self) -> bool:
        """Whether a Trainer is about to fit the module on priors."""
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == "fit" and self.it3_train != "off"

    def _it3_passes(self, batch: Any, step: Callable[[Any], Any]) -> tuple[Any, Tensor | None]:
        """Run a step on all passes of the training; return its output and the loss of all."""
        if self.it3_source_due:  # a search runs batches before Fitting is asked
            load_due(self)
        prior = self.it3_parts()[0]
        learning = torch.is_grad_enabled()  # not in a validation
        first = learning and not self._it3_checked and not torch.compiler.is_compiling()
        target: Any = self.it3_target(batch) if first or prior.measuring else None
        if first:
            check_target(self, target, batch)
        if prior.measuring and learning:
            prior.measure(target, self._it3_gather)
        if first:
            check_passes(self, batch, target, self.it3_dual_pass.perturb_inputs)
            self._it3_checked = True
        frozen = self.it3_train == "conditioning"
        output, loss, label = run_passes(self, self.it3_dual_pass, batch, step, frozen=frozen)
        if label is not None and self._trainer is not None and self._trainer.training:
            size = size_of(self, batch)
            self.log("it3/label_loss", label.detach(), on_epoch=True, batch_size=size)
        return output, loss

    def _it3_validate(self, batch: Any, batch_idx: int, step: Callable[[Any], Any]) -> None:
        """Log the loss of the label pass; where the first batch has none, say so and give up."""
        if not self.it3_parts()[0].fitted:
            return
        try:
            with self.trainer.precision_plugin.val_step_context():
                loss = validation_loss(self, self.it3_dual_pass, batch, step, batch_idx)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of anyone's training_step
            if batch_idx > 0:
                raise
            self._it3_validates = False
            rank_zero_warn(
                "it3/val_label_loss is not logged: training_step could not be run on a validation "
                f"batch ({type(error).__name__}: {error})."
            )
            return
        if loss is not None:
            size, several = size_of(self, batch), self.trainer.world_size > 1
            self.log("it3/val_label_loss", loss, batch_size=size, sync_dist=several)

    def _it3_gather(self, values: Tensor) -> Tensor:
        """Return a tensor of all processes, along a new first dimension."""
        if self._trainer is None or self._trainer.world_size == 1:
            return values[None]
        gathered: Tensor = self.all_gather(values.to(self.device))  # type: ignore[assignment]
        return gathered
