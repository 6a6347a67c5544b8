"""Other weights in the place of a module's own, for one pass, without a copy of the module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

Site = tuple[nn.Module, str, str]
"""A module, what it calls a parameter, and the parameter's name in the network."""


def sites_of(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Site]:
    """Return every place where given parameters are registered, tied ones included.

    >>> layer = nn.Linear(1, 1)
    >>> sites_of(nn.Sequential(layer), {"0.bias": layer.bias})
    [(Linear(in_features=1, out_features=1, bias=True), 'bias', '0.bias')]
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [
        (owner, key, names[id(parameter)])
        for owner in module.modules()
        for key, parameter in owner._parameters.items()
        if id(parameter) in names
    ]


class Sites:
    """Puts other tensors in every place where given parameters are registered.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> sites = Sites(layer, {"weight": layer.weight})
    >>> with sites.swapped({"weight": layer.weight.detach() + 1}):
    ...     inside = layer.weight.requires_grad
    >>> inside, layer.weight.requires_grad
    (False, True)
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sites = sites_of(module, parameters)

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Put these tensors in the parameters' places; gradients stop at those that need none."""
        before = [owner._parameters[key] for owner, key, _ in self._sites]
        try:
            for owner, key, name in self._sites:
                owner._parameters[key] = tensors[name]  # type: ignore[assignment]
            yield
        finally:
            for (owner, key, _), parameter in zip(self._sites, before, strict=True):
                owner._parameters[key] = parameter
