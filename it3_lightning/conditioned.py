"""`Conditioned`: a LightningModule that predicts with a prior of the label, and without one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from it3_lightning import batches
from it3_lightning.calibration import Calibration
from it3_lightning.conditioning import Conditioning
from it3_lightning.hyperparameters import plain
from it3_lightning.priors import Prior
from it3_lightning.protocols import check_parts
from it3_lightning.selection import OWN
from it3_lightning.specs import built


class Conditioned(LightningModule):
    """Adds a prior and its way into the network to the LightningModule it is mixed with.

    Args:
        prior: how labels and outputs become priors, or its ``class_path`` dict.
        conditioning: how a prior enters the network, or its ``class_path`` dict.

    Raises:
        TypeError: ``prior`` or ``conditioning`` is something else.
        ValueError: the conditioning names a layer that does not exist.
    """

    def __init__(
        self,
        *args: Any,
        prior: Prior | None = None,
        conditioning: Conditioning | None = None,
        **kwargs: Any,
    ) -> None:
        given = prior, conditioning
        prior, conditioning = map(plain, given)  # what save_hyperparameters() finds here
        super().__init__(*args, **kwargs)
        self.it3_prior = built(given[0], Prior)  # type: ignore[type-abstract]
        self.it3_conditioning = built(given[1], Conditioning)  # type: ignore[type-abstract]
        self.it3_calibration = Calibration()
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
        """Return the network's outputs ``(B, ...)``; override where ``self(inputs)`` does not."""
        outputs: Tensor = self(*inputs) if isinstance(inputs, tuple | list) else self(inputs)
        return outputs

    def predict_with(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Run one forward pass on a prior, :math:`f(x, p)`.

        Args:
            inputs: of the network.
            prior: ``(B, C, ...)`` in label space, as ``it3_prior`` makes it; ``None``: neutral.

        Returns:
            The network's outputs, ``(B, ...)``.
        """
        with self.it3_given(prior):
            return self.it3_forward(inputs)

    def it3_given(self, prior: Tensor | None) -> AbstractContextManager[None]:
        """Condition every forward pass within on this prior, or on the neutral one (``None``)."""
        return self.it3_parts()[1].given(prior)

    def it3_parts(self) -> tuple[Prior, Conditioning]:
        """Return prior and conditioning.

        Raises:
            MisconfigurationException: one of them was not given.
        """
        check_parts(self)
        assert self.it3_prior is not None
        assert self.it3_conditioning is not None
        return self.it3_prior, self.it3_conditioning

    # What Lightning calls

    def configure_model(self) -> None:
        """Attach the conditioning to what the module builds here."""
        super().configure_model()
        self._it3_attach(lazy=False)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; a plain checkpoint may lack all ``it3_*`` keys, but no others.

        What was kept before there was a calibration may lack that.
        """
        mine = OWN if not any(key.startswith(OWN) for key in state_dict) else "it3_calibration."
        if strict:
            own = {k: v for k, v in self.state_dict().items() if k.startswith(mine)}
            state_dict = {**own, **state_dict}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the checkpoint plain data: priors and conditionings as ``class_path`` dicts."""
        super().on_save_checkpoint(checkpoint)
        hparams = checkpoint.get("hyper_parameters", {})
        hparams.update({name: plain(value) for name, value in hparams.items()})

    # How it works

    def _it3_attach(self, *, lazy: bool) -> None:
        """Attach the conditioning where it is complete; ``lazy``: its layers may still come."""
        if self.it3_prior is None or self.it3_conditioning is None:
            return
        names = {name for name, _ in self.named_modules()}
        if lazy and not names.issuperset(self.it3_conditioning.layers) and self._builds_later():
            return
        self.it3_conditioning.attach(self, self.it3_prior)

    @classmethod
    def _builds_later(cls) -> bool:
        """Whether the module builds layers in a hook: ``configure_model`` or ``setup``."""
        known = ("lightning.", "it3_lightning.")
        own = [c for c in cls.__mro__ if not c.__module__.startswith(known)]
        return any(name in vars(c) for c in own for name in ("configure_model", "setup"))
