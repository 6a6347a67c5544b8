"""The prior as something added to features in the middle of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning.conditioning.conditioning import Conditioning, key
from it3_lightning.conditioning.layout import Layout
from it3_lightning.priors import Prior

Mode = Literal["add", "film"]


class FeatureInjection(Conditioning):
    """Adds an embedding of the prior to the output of one or several layers.

    The neutral pass leaves the layers alone, so it is the plain network bit for bit. The last layer
    of the embedder starts at zero: an untrained conditioning changes nothing.

    Args:
        layer: name of the layer, or names; ``model.named_modules()`` lists them.
        mode: ``"add"``: ``h + e``; ``"film"``: ``(1 + scale) * h + shift``; or one per layer.
        channels: width of the layer's output, where it cannot be told from the layer.
        hidden: width of the embedder.

    Shapes:
        features ``(B, C)``, tokens ``(B, T, C)`` or ``(T, B, C)``, ``(B, C, L)``, ``(B, C, H, W)``
        or ``(B, H, W, C)``, alone or first in a tuple.

    Raises:
        ValueError: a mode is unknown, or their number is not that of the layers.

    >>> from it3_lightning.priors import ClassPrior
    >>> layer, injection = nn.Linear(2, 4), FeatureInjection("0")
    >>> injection.attach(nn.Sequential(layer), ClassPrior(3))
    >>> x, prior = torch.ones(1, 2), torch.tensor([[0.0, 1.0, 0.0]])
    >>> _ = nn.init.ones_(injection.embedders["0"].last.bias)
    >>> with injection.given(prior):
    ...     conditioned = layer(x)
    >>> (conditioned - layer(x)).mean().item()
    1.0
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        *,
        mode: Mode | Sequence[Mode] = "add",
        channels: int | None = None,
        hidden: int = 64,
    ) -> None:
        layers = [layer] if isinstance(layer, str) else list(layer)
        super().__init__(layers)
        modes = [mode] * len(layers) if isinstance(mode, str) else list(mode)
        if len(modes) != len(layers) or not set(modes) <= {"add", "film"}:
            raise ValueError(
                f"Expected mode 'add' or 'film', one for all or one per layer, got {mode!r} for "
                f"{len(layers)} layer(s)."
            )
        self.modes = dict(zip(layers, modes, strict=True))
        self.channels = channels
        self.hidden = hidden
        self.embedders = nn.ModuleDict()

    def _attach(self, name: str, modules: Mapping[str, nn.Module], prior: Prior) -> None:
        layer, layout = modules[name], Layout.of(name, modules, self.channels)
        parts = 2 if self.modes[name] == "film" else 1
        neutral = None if prior.neutral_is_zero else prior.neutral_input(1, torch.zeros(1))
        channels = prior.channels + prior.context_channels
        embedder = Embedder(channels, self.hidden, parts * layout.channels, neutral)
        weight = next(layer.parameters(), None)
        self.embedders[key(name)] = embedder if weight is None else embedder.to(weight.device)
        layer.register_forward_hook(partial(self._inject, layout, key(name)))

    def _inject(self, layout: Layout, own: str, _: nn.Module, __: Any, output: Any) -> Any:
        self.shown.ran.add(layout.name)
        if self.shown.prior is None:
            return None
        features = output[0] if isinstance(output, tuple) else output
        if not isinstance(features, Tensor):
            raise ValueError(
                f"Expected layer {layout.name!r} to put out a tensor, or a tuple that starts with "
                f"one, got {type(features).__name__}. Inject at a layer that does."
            )
        injected = self._combined(layout, own, features, self.shown.prior)
        if not isinstance(output, tuple):
            return injected
        if hasattr(output, "_replace"):  # a named tuple
            return output._replace(**{output._fields[0]: injected})  # type: ignore[attr-defined]
        return (injected, *output[1:])

    def _combined(self, layout: Layout, own: str, features: Tensor, prior: Tensor) -> Tensor:
        embedding, present = self.embedders[own](prior).to(features.dtype), self.shown.present
        if present is not None and present.ndim > 1:  # positions without a prior add nothing
            embedding, present = torch.where(present.unsqueeze(1), embedding, 0.0), None
        parts, batch_axis = layout.laid_out(embedding, features, averaged=self._source.averaged)
        injected = features + parts[0] if len(parts) == 1 else features * (1 + parts[0]) + parts[1]
        if present is None:
            return injected
        shape = [-1 if axis == batch_axis else 1 for axis in range(features.ndim)]
        return torch.where(present.reshape(shape), injected, features)

    @property
    def untrained(self) -> bool:
        """Whether the last layers of all embedders are zero, as they start."""
        lasts = [cast(Embedder, embedder).last for embedder in self.embedders.values()]
        return not any(p.any() for last in lasts for p in last.parameters())

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "layer": list(self.layers),
            "mode": list(self.modes.values()),
            "channels": self.channels,
            "hidden": self.hidden,
        }


class Embedder(nn.Module):
    """A small MLP over the prior's channels, ``(B, C, ...) -> (B, out, ...)``, zero at first.

    Args:
        channels: of the prior.
        hidden: width of the hidden layer.
        out: channels of the result.
        neutral: a neutral prior ``(1, C)`` whose embedding is subtracted, so that "don't know" adds
            nothing; ``None`` where that is zero input and no subtraction is wanted.

    >>> import torch
    >>> Embedder(3, 4, 2, None)(torch.eye(3)).shape
    torch.Size([3, 2])
    """

    neutral: Tensor | None

    def __init__(self, channels: int, hidden: int, out: int, neutral: Tensor | None) -> None:
        super().__init__()
        self.first = nn.Linear(channels, hidden)
        self.last = nn.Linear(hidden, out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        values = None if neutral is None else neutral[:, :channels].flatten(1)
        self.register_buffer("neutral", values, persistent=False)

    def forward(self, prior: Tensor) -> Tensor:
        """Embed each position's prior."""
        rows = prior.movedim(1, -1).to(self.first.weight.dtype)
        embedded = self._mlp(rows)
        if self.neutral is not None:
            embedded = embedded - self._mlp(self.neutral.to(rows.dtype))
        return embedded.movedim(-1, 1)

    def _mlp(self, rows: Tensor) -> Tensor:
        embedded: Tensor = self.last(F.relu(self.first(rows)))
        return embedded
