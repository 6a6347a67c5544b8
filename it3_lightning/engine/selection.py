"""Selection: which parameters adapt, by kind, by name or by a function; which samples move them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from it3_lightning.engine.types import Evaluation
from it3_lightning.methods.base import Layers, Masked, TestTimeMethod
from it3_lightning.utils.messages import closest, unknown

Predicate = Callable[[str, nn.Parameter], bool]


Selection = Literal["all", "norm", "bias"] | Sequence[str] | Predicate


OWN = "it3_"  # prefix of what this library adds to a module; never adapted


_MOST = 10  # parameters named in an error


_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm of every dimension
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def select(module: nn.Module, selection: Selection) -> dict[str, nn.Parameter]:
    """Return the selected parameters by name, in the module's order.

    Args:
        module: whose parameters. Those of modules named ``it3_*`` are never selected.
        selection: ``"all"``, ``"norm"`` (scale and shift of norm layers) or ``"bias"``, each among
            the parameters with ``requires_grad``; names or patterns as ``"encoder.*"``; or a
            callable ``(name, parameter) -> bool``. The last two also take frozen parameters.

    Raises:
        ValueError: nothing is selected, or one of the patterns matches nothing.

    >>> list(select(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "norm"))
    ['1.weight', '1.bias']
    """
    candidates = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and not _own(name)
    }
    chosen = _choose(module, candidates, selection)
    if not chosen:
        raise ValueError(_nothing(candidates, selection))
    return chosen


def layers_of(module: nn.Module, wanted: Layers) -> dict[str, nn.Module]:
    """Return the layers of these names; of ``"norm"``, the norm layers in the module's order.

    Args:
        module: that has them. Norm layers of modules named ``it3_*`` are not among them.
        wanted: names, or ``"norm"``.

    Raises:
        ValueError: there is no layer of a name, or no norm layer.

    >>> list(layers_of(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "norm"))
    ['1']
    """
    if wanted == "norm":
        named = module.named_modules()
        norms: dict[str, nn.Module] = {
            name: each for name, each in named if isinstance(each, _NORM_LAYERS) and not _own(name)
        }
        if not norms:
            raise ValueError("Expected a module with norm layers, got one without. Name layers.")
        return norms
    layers = dict(module.named_modules(remove_duplicate=False))
    for name in wanted:
        if name not in layers:
            raise ValueError(unknown("layer", name, layers))
    return {name: layers[name] for name in wanted}


def _own(name: str) -> bool:
    return any(part.startswith(OWN) for part in name.split("."))


def _choose(
    module: nn.Module, candidates: dict[str, nn.Parameter], selection: Selection
) -> dict[str, nn.Parameter]:
    if callable(selection):
        return {name: p for name, p in candidates.items() if selection(name, p)}
    if selection in ("all", "norm", "bias"):
        wanted = _named(module, str(selection))
        return {n: p for n, p in candidates.items() if p.requires_grad and wanted(n, p)}
    patterns = [selection] if isinstance(selection, str) else list(selection)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(_nothing(candidates, pattern))
    return {n: p for n, p in candidates.items() if any(fnmatchcase(n, pat) for pat in patterns)}


def _named(module: nn.Module, selection: str) -> Predicate:
    if selection == "bias":
        return lambda name, _: name.rpartition(".")[2] == "bias"
    if selection == "all":
        return lambda *_: True
    layers = [layer for layer in module.modules() if isinstance(layer, _NORM_LAYERS)]
    ids = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    return lambda _, parameter: id(parameter) in ids


def _nothing(candidates: dict[str, nn.Parameter], selection: object) -> str:
    trainable = sum(p.requires_grad for p in candidates.values())
    hint = closest(selection, candidates) if isinstance(selection, str) else ""
    some = ", ".join(list(candidates)[:_MOST])
    more = ", ..." if len(candidates) > _MOST else ""
    return (
        f"The selection {selection!r} matches no trainable parameter.{hint} The module has "
        f"{len(candidates)} parameters, {trainable} of them trainable: {some}{more}. "
        "Choose 'all', 'norm', 'bias', patterns such as 'layer1.*', or a function."
    )


@dataclass(frozen=True)
class Movers:
    """Which samples of a batch move the weights: those whose distance is unusual.

    Args:
        before: the evaluation it says so by.
        within: ``(B,)`` booleans, samples that do not move the weights.
        movers: inputs to step on: the samples beyond the gate, or all where BatchNorm needs them.
        alone: whether these are only the samples beyond.
    """

    before: Evaluation
    within: Tensor
    movers: Any
    alone: bool

    @property
    def closed(self) -> bool:
        """Whether no sample moves the weights."""
        return bool(self.within.all())

    def method(self, method: TestTimeMethod) -> TestTimeMethod:
        """Return a method in which no sample within the gate counts."""
        return method if self.alone else Masked(method, ~self.within)

    def whole(self, first: Evaluation | None) -> Evaluation:
        """Return the evaluation before the first step, of the whole batch."""
        reliable = torch.zeros_like(self.within)
        if first is not None:
            theirs = first.objective.reliable
            reliable[~self.within] = theirs if self.alone else theirs[~self.within]
        return replace(self.before, objective=replace(self.before.objective, reliable=reliable))
