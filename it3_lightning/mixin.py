"""`IT3Mixin`: the dual-pass training loss for any LightningModule, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from it3_lightning import batches
from it3_lightning.conditioning import Conditioning
from it3_lightning.dual_pass import DualPass
from it3_lightning.passes import called, run_passes, with_loss
from it3_lightning.perturbations import RandomNoise
from it3_lightning.posthoc import Fitting, Frozen, load_source
from it3_lightning.priors import Prior
from it3_lightning.selection import OWN
from it3_lightning.specs import built, spec

Train = Literal["joint", "conditioning", "off"]
LossFn = Callable[[Tensor, Any], Tensor]


def _adam(parameters: Any) -> torch.optim.Optimizer:
    """Make the optimizer of post-hoc training where none is given."""
    return torch.optim.Adam(parameters, lr=1e-3)


class IT3Mixin(LightningModule):
    r"""Trains a LightningModule to predict with a prior of the label and without one.

    ``class IT3Net(IT3Mixin, LitNet): pass`` trains ``LitNet`` by its own ``training_step``, run once
    with the label as prior (silently) and once with the neutral prior:
    :math:`L = \ell(f(x, 0), y) + w\,\ell(f(x, p(y)), y)` (Durasov et al., IT3, ICML 2025).
    All other arguments go to ``LitNet``.

    Args:
        prior: how labels and outputs become priors.
        conditioning: how a prior enters the network.
        train: ``"joint"``: all weights learn both passes, as published; ``"conditioning"``: the
            network is frozen, in evaluation mode, and only the conditioning learns (post-hoc);
            ``"off"``: the plain module. Default: ``"conditioning"`` where a ``source_checkpoint`` is
            given, else ``"joint"``.
        source_checkpoint: an ordinary checkpoint of the network, loaded when fitting starts.
        dual_pass: settings of the label pass. Post-hoc default: half of the priors the network's own
            prediction, inputs perturbed by :class:`~it3_lightning.perturbations.RandomNoise`.
        conditioning_optimizer: makes the optimizer of post-hoc training; default Adam, 1e-3.

    Raises:
        TypeError: ``prior`` or ``conditioning`` is something else.
        ValueError: the conditioning names a layer that does not exist.
    """

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
        super().__init__(*args, **kwargs)
        mode = train or ("conditioning" if source_checkpoint else "joint")
        if mode not in ("joint", "conditioning", "off"):
            raise ValueError(f"Expected train 'joint', 'conditioning' or 'off', got {train!r}.")
        self.it3_train: Train = mode
        self.it3_source_checkpoint = source_checkpoint
        self.it3_dual_pass = dual_pass or _default_dual_pass(mode)
        self.it3_optimizer: OptimizerCallable = conditioning_optimizer or _adam
        self.it3_prior = built(prior, Prior)  # type: ignore[type-abstract]
        self.it3_conditioning = built(conditioning, Conditioning)  # type: ignore[type-abstract]
        self._it3_frozen: Frozen | None = None
        for hparams in (getattr(self, "_hparams", None), getattr(self, "_hparams_initial", None)):
            _plain(hparams)
        self._it3_attach(lazy=True)

    # What a user calls or overrides

    def it3_inputs(self, batch: Any) -> Any:
        """Return the inputs of a batch; override for a batch of another shape."""
        return batches.inputs_of(batch)

    def it3_target(self, batch: Any) -> Any:
        """Return the target of a batch; override for a batch of another shape."""
        return batches.target_of(batch)

    def it3_with_inputs(self, batch: Any, inputs: Any) -> Any:
        """Return a copy of the batch with other inputs; override for a batch of another shape."""
        return batches.with_inputs(batch, inputs)

    def it3_forward(self, inputs: Any) -> Tensor:
        """Return the network's outputs ``(B, ...)``; override where that is not ``self(inputs)``."""
        outputs: Tensor = self(*inputs) if isinstance(inputs, tuple | list) else self(inputs)
        return outputs

    def predict_with(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Run one forward pass on a prior.

        Args:
            inputs: of the network.
            prior: ``(B, C, ...)`` in label space, as ``self.it3_prior`` makes it; ``None``: neutral.
        """
        with self.it3_given(prior):
            return self.it3_forward(inputs)

    def it3_given(self, prior: Tensor | None) -> AbstractContextManager[None]:
        """Condition every forward pass within on this prior, or on the neutral one."""
        return self.it3_parts()[1].given(prior)

    def it3_loss(self, batch: Any, loss_fn: LossFn) -> Tensor:
        """Return the dual-pass loss of a batch, for a ``training_step`` of one's own.

        Args:
            batch: with inputs and target.
            loss_fn: ``(outputs, target) -> scalar``.
        """
        target = self.it3_target(batch)

        def step(given: Any) -> Tensor:
            return loss_fn(self.it3_forward(self.it3_inputs(given)), target)

        loss = run_passes(self, batch, step)[1]
        if loss is None:
            raise ValueError("Expected loss_fn to return a scalar tensor, got None.")
        return loss

    # What Lightning calls

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own step on both priors and return it with the loss of both."""
        step = super().training_step
        if self.it3_train == "off":
            return called(step, *args, **kwargs)
        output, loss = run_passes(self, args[0], lambda b: called(step, b, *args[1:], **kwargs))
        return with_loss(output, loss)

    def configure_model(self) -> None:
        """Attach the conditioning to what the module builds here; freeze the network post-hoc."""
        super().configure_model()
        self._it3_attach(lazy=False)
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit" or self.it3_train == "off":
            return
        if self.it3_source_checkpoint is not None:
            load_source(self, self.it3_source_checkpoint)
        if self.it3_train == "conditioning" and self._it3_frozen is None:
            self._it3_frozen = Frozen(self, self.it3_parts()[1])

    def configure_optimizers(self) -> Any:
        """Return the module's own optimizers; post-hoc, one of the conditioning alone."""
        if self.it3_train == "conditioning":
            return self.it3_optimizer(self.it3_parts()[1].parameters())
        return super().configure_optimizers()

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Add the checks before training and the clean-up after it."""
        own = super().configure_callbacks()
        if self.it3_train == "off":
            return own
        return [*([own] if isinstance(own, Callback) else own), Fitting()]

    def train(self, mode: bool = True) -> IT3Mixin:
        """Set training mode; a frozen network stays in evaluation mode."""
        super().train(mode)
        if getattr(self, "_it3_frozen", None) is not None:
            self._it3_frozen.stay_in_eval()  # type: ignore[union-attr]
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; a plain checkpoint of the network may lack all ``it3_*`` keys, no others."""
        if strict and not any(key.startswith(OWN) for key in state_dict):
            own = {k: v for k, v in self.state_dict().items() if k.startswith(OWN)}
            state_dict = {**state_dict, **own}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the checkpoint plain data: priors and conditionings as ``class_path`` dicts."""
        super().on_save_checkpoint(checkpoint)
        _plain(checkpoint.get("hyper_parameters"))

    # How it works

    def it3_parts(self) -> tuple[Prior, Conditioning]:
        """Return prior and conditioning.

        Raises:
            ValueError: one of them was not given.
        """
        if self.it3_prior is None or self.it3_conditioning is None:
            missing = "prior" if self.it3_prior is None else "conditioning"
            raise ValueError(
                f"{type(self).__name__} has no {missing}. Give both, for example "
                "IT3Net(..., prior=ClassPrior(10), conditioning=FeatureInjection('layer'))."
            )
        return self.it3_prior, self.it3_conditioning

    def it3_thaw(self) -> None:
        """Undo the freezing of post-hoc training."""
        if self._it3_frozen is not None:
            self._it3_frozen.thaw()
            self._it3_frozen = None

    def _it3_attach(self, *, lazy: bool) -> None:
        """Attach the conditioning; ``lazy``: unless it or its layers may still come."""
        incomplete = self.it3_prior is None or self.it3_conditioning is None
        if incomplete and (lazy or self.it3_train == "off"):
            return
        prior, conditioning = self.it3_parts()
        names = {name for name, _ in self.named_modules()}
        if lazy and not names.issuperset(conditioning.layers) and _builds_later(self):
            return
        conditioning.attach(self, prior)


def _default_dual_pass(mode: str) -> DualPass:
    if mode == "conditioning":
        return DualPass(own_share=0.5, perturb_inputs=RandomNoise())
    return DualPass()


def _builds_later(module: LightningModule) -> bool:
    """Whether the module builds layers in a hook: ``configure_model`` or ``setup``."""
    own = [c for c in type(module).__mro__ if c.__module__.partition(".")[0] != "lightning"]
    hooks = {name for c in own if c is not IT3Mixin for name in vars(c)}
    return bool(hooks & {"configure_model", "setup"})


def _plain(hparams: Any) -> None:
    """Replace objects among hyperparameters by their specs, in place; drop what has none."""
    if not isinstance(hparams, MutableMapping):
        return
    for name in ("prior", "conditioning"):
        if name in hparams:
            hparams[name] = spec(hparams[name])
    for name in ("dual_pass", "conditioning_optimizer"):
        if name in hparams and not isinstance(hparams[name], Mapping | None):
            del hparams[name]
