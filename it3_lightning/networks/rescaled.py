"""A network whose outputs are put into the units of the target."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Rescaled(nn.Module):
    r"""Returns :math:`a + b f(x)`, so that ``f`` may learn values about 0 of size 1.

    A network that predicts 100 +- 30 from its first step on learns faster than one that has to grow
    there; the target, the prior and the error keep their units.

    Args:
        network: ``f``; its layers are named ``network.…``.
        mean: ``a``, in the units of the target: about the mean of the training targets.
        std: ``b``, in the same units: about their standard deviation.

    Raises:
        ValueError: ``std`` is not positive.

    >>> import torch
    >>> Rescaled(nn.Identity(), mean=100.0, std=30.0)(torch.tensor([[2.0]]))
    tensor([[160.]])
    """

    def __init__(self, network: nn.Module, *, mean: float, std: float) -> None:
        super().__init__()
        if std <= 0:
            raise ValueError(f"Expected std > 0, in the units of the target, got {std}.")
        self.network = network
        self.mean, self.std = mean, std

    def forward(self, inputs: Any) -> Tensor:
        """Return the outputs in the units of the target."""
        outputs: Tensor = self.mean + self.std * self.network(inputs)
        return outputs
