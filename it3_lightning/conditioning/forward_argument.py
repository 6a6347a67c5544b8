"""The prior as an argument of a forward that takes one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from it3_lightning.conditioning.conditioning import Conditioning, seen
from it3_lightning.priors import Prior
from it3_lightning.utils.graphs import first_floats, graph_count, is_graph


class ForwardArgument(Conditioning):
    """Hands the prior to a forward that takes it, as a keyword argument.

    The forward gets ``(B, C, ...)`` with any presence flag, or the neutral prior; ``None`` where
    the prior's ``neutral`` is ``"none"``. A prior that the caller hands over goes first.

    Args:
        argument: the keyword.
        layer: name of the module whose forward takes it; ``""`` is the LightningModule itself,
            called as ``self(x)``.

    >>> import torch
    >>> from it3_lightning.priors import ClassPrior
    >>> class Net(nn.Module):
    ...     def forward(self, x, prior=None):
    ...         return prior
    >>> net, argument = Net(), ForwardArgument()
    >>> argument.attach(net, ClassPrior(2, neutral="uniform"))
    >>> net(torch.zeros(1, 3))
    tensor([[0.5000, 0.5000]])
    """

    enters = "input"

    def __init__(self, argument: str = "prior", *, layer: str = "") -> None:
        super().__init__([layer])
        self.argument = argument

    def _attach(self, name: str, modules: Mapping[str, nn.Module], prior: Prior) -> None:
        modules[name].register_forward_pre_hook(partial(self._hand_over, name), with_kwargs=True)

    def _hand_over(
        self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs.get(self.argument) is not None:
            return None
        self.shown.ran.add(name)
        return args, {**kwargs, self.argument: self._seen((args, kwargs))}

    def _seen(self, inputs: Any) -> Tensor | None:
        if self.shown.prior is None and self._source.neutral == "none":
            return None
        leaves = tree_leaves(inputs)
        size, like = next(filter(None, map(_samples, leaves)), (0, None))
        if like is None:
            raise ValueError(
                f"Expected the forward that takes {self.argument!r} to be called with a tensor "
                "(B, ...) or a batch of graphs, got "
                f"{', '.join(type(leaf).__name__ for leaf in leaves) or 'nothing'}."
            )
        return seen(self._source, self.shown.prior, self.shown.present, size, like)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"argument": self.argument, "layer": self.layers[0]}


def _samples(leaf: Any) -> tuple[int, Tensor] | None:
    """Return the number of samples, and a tensor of their device and data type, where told."""
    if isinstance(leaf, Tensor):
        return (leaf.shape[0], leaf) if leaf.ndim else None
    count, values = (graph_count(leaf), first_floats(leaf)) if is_graph(leaf) else (None, None)
    return None if count is None or values is None else (count, values)
