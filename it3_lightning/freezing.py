"""A network that is left alone while its conditioning learns: frozen, then as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from torch import nn

from it3_lightning.conditioned import Conditioned


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


class Freezable(Conditioned):
    """Conditioned, and all but the conditioning can be frozen."""

    it3_frozen: Frozen | None = None

    def it3_freeze(self) -> None:
        """Freeze the network, unless it is frozen."""
        if self.it3_frozen is None:
            self.it3_frozen = Frozen(self, self.it3_parts()[1])

    def it3_thaw(self) -> None:
        """Undo the freezing of post-hoc training."""
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

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen network stays in evaluation mode."""
        super().train(mode)
        if self.it3_frozen is not None:
            self.it3_frozen.stay_in_eval()
        return self
