"""`AuxiliaryMixin`: an auxiliary head that any LightningModule learns beside its own task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from it3_lightning.engine import batch_size
from it3_lightning.engine.passes import features_of
from it3_lightning.engine.selection import OWN
from it3_lightning.integration.checkpoints import plain
from it3_lightning.integration.isolation import muted
from it3_lightning.integration.module import PlainModule
from it3_lightning.integration.namespaces import NO_TRAINING_STEPS, ModuleMixin
from it3_lightning.methods.auxiliary import HEAD, Auxiliary, head_of
from it3_lightning.training.dual_pass import called, loss_of, with_loss
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.specs import built


class AuxiliaryMixin(ModuleMixin):
    r"""Trains a LightningModule on an auxiliary task too, for test-time training on it.

    ``class TTTNet(AuxiliaryMixin, LitNet): pass`` trains ``LitNet`` by its own ``training_step``
    and adds the loss of a head on one of its layers: :math:`L = \ell_m + w\,\ell_s` (Sun et al.,
    ICML 2020), logged as ``it3/auxiliary_loss``. All other arguments go to ``LitNet``. The passes
    of the task log, count and collect nothing on the module; BatchNorm layers see them.
    With :class:`~it3_lightning.IT3Mixin`, trained jointly:
    ``class Net(AuxiliaryMixin, IT3Mixin, LitNet)``.

    Args:
        auxiliary: the task, as :class:`~it3_lightning.methods.Rotation`, or its ``class_path``
            dict. It becomes the submodule ``it3_auxiliary``, which no method adapts.
        auxiliary_weight: weight ``w`` of its loss.

    Raises:
        TypeError: ``auxiliary`` is something else, or ``IT3Mixin`` comes before this class.
        ValueError: the weight is negative.
        MisconfigurationException: before any batch is fitted: there is no task, it names a layer
            that does not exist, or the ``training_step`` returns no loss to add to.

    Example::

        model = TTTNet(auxiliary=Rotation("net.layer2", channels=128))
        Trainer().fit(model, data)
        Trainer(callbacks=[TestTimeCallback(TTT())]).test(model, data)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order in which the task would be learnt with priors."""
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if IT3Mixin in order and order.index(IT3Mixin) < order.index(AuxiliaryMixin):
            raise TypeError(
                f"Expected AuxiliaryMixin before IT3Mixin in {cls.__name__}, got it after, where "
                f"every pass would learn the task. Write class {cls.__name__}(AuxiliaryMixin, "
                "IT3Mixin, ...)."
            )

    def __init__(
        self,
        *args: Any,
        auxiliary: Auxiliary | None = None,
        auxiliary_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        given = auxiliary
        auxiliary = plain(given)  # what save_hyperparameters() of the base finds here
        super().__init__(*args, **kwargs)
        if auxiliary_weight < 0:
            raise ValueError(f"Expected auxiliary_weight >= 0, got {auxiliary_weight}.")
        self.it3_auxiliary = built(given, Auxiliary)  # type: ignore[type-abstract]
        self.it3_auxiliary_weight = auxiliary_weight

    def it3_auxiliary_loss(self, batch: Any) -> Tensor:
        """Return the loss of the task on a batch, a scalar.

        Raises:
            MisconfigurationException: there is no task, or it names a layer that does not exist.
        """
        head, host = self._it3_head(), PlainModule(self, "logits")

        def features(inputs: Any) -> Any:
            return features_of(self, head.layer, lambda: host.predict_with(inputs, None))

        with muted(self):
            loss: Tensor = head(host.it3_inputs(batch), features).mean()
        return loss

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own step and return it with both losses."""
        output = called(super().training_step, batch, *args, **kwargs)
        loss = loss_of(output)
        if loss is None:
            return output
        auxiliary = self.it3_auxiliary_loss(batch)
        size = batch_size(PlainModule(self, "logits").it3_inputs(batch))
        self.log("it3/auxiliary_loss", auxiliary.detach(), on_epoch=True, batch_size=size)
        return with_loss(output, loss + self.it3_auxiliary_weight * auxiliary)

    def configure_model(self) -> None:
        """Refuse to fit what cannot learn the task."""
        super().configure_model()
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit":
            return
        self._it3_head()
        own, name = super().training_step, type(self).__name__
        nothing = getattr(own, "__func__", None) in NO_TRAINING_STEPS
        ours = type(self).training_step is AuxiliaryMixin.training_step
        if ours and (nothing or not self.automatic_optimization):
            why = "no training_step" if nothing else "a training_step that optimizes manually"
            raise MisconfigurationException(
                f"{name} has {why}, so there is no loss to add to. Give {name} a training_step "
                "that adds self.it3_auxiliary_loss(batch) to its own loss."
            )
        if getattr(self, "it3_train", None) == "conditioning":
            raise MisconfigurationException(
                "train='conditioning' freezes the network, which cannot learn an auxiliary task "
                "then. Use train='joint', or train the conditioning in a run of its own."
            )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; a checkpoint of the module without its head leaves that as it is."""
        state = dict(state_dict)
        if strict and self.it3_auxiliary is not None and not _any(state, HEAD):
            own = HEAD if _any(state, OWN) else OWN  # those of a plain checkpoint lack all
            state |= {k: v for k, v in self.state_dict().items() if k.startswith(own)}
            rank_zero_warn(
                f"The checkpoint has no {HEAD}: the head stays as it is. Fit the module before a "
                "method steps on it."
            )
        return super().load_state_dict(state, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the checkpoint plain data: the task as a ``class_path`` dict."""
        super().on_save_checkpoint(checkpoint)
        hparams = checkpoint.get("hyper_parameters", {})
        hparams.update({name: plain(value) for name, value in hparams.items()})

    def _it3_head(self) -> Auxiliary:
        try:
            return head_of(self, Auxiliary, "AuxiliaryMixin")  # type: ignore[type-abstract]
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error


def with_auxiliary(module: LightningModule, auxiliary: Auxiliary, weight: float = 1.0) -> None:
    """Have a module that is there already learn an auxiliary task beside its own.

    Its class becomes a subclass with :class:`AuxiliaryMixin`; what it holds stays.

    Args:
        module: any LightningModule.
        auxiliary: the task.
        weight: of its loss.
    """
    kind = type(module)
    module.__class__ = type(kind.__name__, (AuxiliaryMixin, kind), {})
    module.it3_auxiliary = auxiliary
    module.it3_auxiliary_weight = weight  # type: ignore[assignment]


def _any(state: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)
