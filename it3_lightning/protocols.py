"""What the callback needs of a module; the mixin provides it, and so can any module by itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from it3_lightning.priors import Prior


@runtime_checkable
class IT3Module(Protocol):
    """A module that predicts with and without a prior."""

    it3_prior: Prior

    def it3_inputs(self, batch: Any) -> Any:
        """Return the inputs of a batch, without its target."""

    def predict_with(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Return outputs ``(B, ...)`` given a prior in label space, or the neutral one."""

    def it3_given(self, prior: Tensor | None) -> AbstractContextManager[None]:
        """Condition every forward pass within on this prior, or on the neutral one."""


def check_parts(module: object) -> None:
    """Refuse a module that was given no prior or no conditioning.

    Raises:
        MisconfigurationException: one of its parts is ``None``.
    """
    parts = [
        part for part in ("prior", "conditioning") if getattr(module, f"it3_{part}", 0) is None
    ]
    if parts:
        name = type(module).__name__
        raise MisconfigurationException(
            f"{name} has no {' and no '.join(parts)}. Give both, for example "
            f"{name}(..., prior=ClassPrior(10), conditioning=FeatureInjection('layer'))."
        )
