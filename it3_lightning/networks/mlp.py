"""Multilayer perceptron with named layers, and any network in the units of its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers ``layer0``, ``layer1``, ... with ReLU between, and a linear ``head``.

    Args:
        in_features: features ``F`` of the input.
        out_features: outputs ``C``.
        hidden: widths of the hidden layers.
        batch_norm: whether a BatchNorm ``norm0``, ``norm1``, ... follows each hidden layer.
        output_mean: about the mean of the values to predict, where these are large; with
            ``output_std`` it lets the last layer learn numbers around 0 of size 1.
        output_std: about their standard deviation.

    Shapes:
        ``(B, F) -> (B, C)``.

    Raises:
        ValueError: there is no hidden layer, or ``output_std`` is not positive.

    >>> import torch
    >>> network = MLP(4, 1, output_mean=22.0, output_std=9.0)
    >>> _ = nn.init.zeros_(network.head.weight), nn.init.ones_(network.head.bias)
    >>> network(torch.zeros(2, 4)).flatten()  # 22 + 9 * 1
    tensor([31., 31.], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (64, 64),
        *,
        batch_norm: bool = False,
        output_mean: float = 0.0,
        output_std: float = 1.0,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("Expected at least one hidden layer, got none.")
        if output_std <= 0:
            raise ValueError(f"Expected output_std > 0, got {output_std}.")
        self.in_features, self.out_features = in_features, out_features
        self.output_mean, self.output_std = output_mean, output_std
        self.depth = len(hidden)
        widths = [in_features, *hidden]
        for index in range(self.depth):
            self.add_module(f"layer{index}", nn.Linear(widths[index], widths[index + 1]))
            if batch_norm:
                self.add_module(f"norm{index}", nn.BatchNorm1d(widths[index + 1]))
        self.batch_norm = batch_norm
        self.head = nn.Linear(widths[-1], out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs."""
        for index in range(self.depth):
            features = self.get_submodule(f"layer{index}")(features)
            if self.batch_norm:
                features = self.get_submodule(f"norm{index}")(features)
            features = features.relu()
        outputs: Tensor = self.head(features)
        return self.output_mean + self.output_std * outputs

    def extra_repr(self) -> str:
        """Return what the layers do not show."""
        return f"output_mean={self.output_mean}, output_std={self.output_std}"


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
