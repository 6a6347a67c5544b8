"""Networks, and runs of them with and without the activation cache."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from helpers.adapters import PUBLISHED
from helpers.modules import (
    bits,
    changed,
    takes_prior,
)
from helpers.reference import softmax_label
from it3_lightning.engine import Adaptation, BatchAdapter, Enters, Forward, Settings
from it3_lightning.engine.fast import NoCache

Log = list[str]


def adapter_of(
    net: nn.Module, enters: Enters, forward: Forward | None = None, **given: Any
) -> BatchAdapter:
    """Make what adapts a network whose prior enters at these layers."""
    made = Settings(**{"objective": PUBLISHED, "lr": 0.01, **given})
    return BatchAdapter(net, forward or takes_prior(net), softmax_label, made, enters=enters)


def run(adapter: BatchAdapter, batches: list[Any]) -> list[tuple[Adaptation, dict[str, Tensor]]]:
    """Adapt to one batch after another; return what came of each, with its weights."""
    kept = []
    for inputs in batches:
        with adapter.adapted(inputs) as adaptation:
            weights = {name: value.clone() for name, value in adaptation.weights.items()}
        kept.append((adaptation, weights))
    return kept


def assert_the_cache_changes_no_bit(
    make: Callable[[], nn.Module],
    batches: list[Any],
    enters: Enters,
    of: Callable[[nn.Module], Forward] = takes_prior,
    atol: float = 0.0,
    **given: Any,
) -> list[Adaptation]:
    """Compare with no cache at all, and with one that does not know where the prior enters."""
    found = []
    for known, exact in ((enters, True), ({}, True), (enters, False)):
        torch.manual_seed(0)
        net = make()
        before = bits(net)
        adapter = adapter_of(net, known, of(net), **given)
        if not exact:
            adapter.network.cache = NoCache()
        found.append(run(adapter, batches))
        assert changed(before, net) == []
    for first, second, third in zip(*found, strict=True):
        for other in (second, third):
            for name in ("outputs", "source_outputs", "distance_source", "distance_adapted"):
                assert equal(getattr(first[0], name), getattr(other[0], name), atol), name
            assert first[1].keys() == other[1].keys()
            assert all(equal(value, other[1][name], atol) for name, value in first[1].items())
        assert third[0].cache_hits == 0
        assert first[0].reason is None
    return [adaptation for adaptation, _ in found[0]]


def equal(a: Tensor | None, b: Tensor | None, atol: float = 0.0) -> bool:
    """Whether two tensors, if any, are equal to this error."""
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) or bool((a - b).abs().max() <= atol)


def told(layer: nn.Module, name: str, log: Log) -> nn.Module:
    """Let a layer write its name into a log, out of the sight of the cache, when it runs."""
    kind: Any = type(layer)

    class Told(kind):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            log.append(name)
            return super().forward(*args)

    layer.__class__ = Told
    return layer


class Deep(nn.Module):
    """`stem`, `trunk` of two blocks of two layers, `head`; the prior enters where it is told."""

    def __init__(self, entry: str = "trunk.0", where: str = "output", log: Log | None = None):
        super().__init__()
        log = [] if log is None else log
        self.stem = told(nn.Linear(16, 8), "stem", log)

        def block(name: str) -> nn.Module:
            first = told(nn.Linear(8, 8), f"{name}.0", log)
            return nn.Sequential(first, told(nn.Tanh(), f"{name}.1", log))

        self.trunk = nn.Sequential(block("trunk.0"), block("trunk.1"))
        self.head = told(nn.Linear(8, 3), "head", log)
        self.embed = nn.Linear(3, 3 if entry == "head" and where == "output" else 8)
        self.prior: Tensor | None = None
        layer = self.get_submodule(entry)
        if where == "output":
            layer.register_forward_hook(self._after)
        else:
            layer.register_forward_pre_hook(self._before)

    def _after(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        return None if self.prior is None else output + self.embed(self.prior)

    def _before(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self.prior is None else (args[0] + self.embed(self.prior),)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        self.prior = prior
        try:
            logits: Tensor = self.head(self.trunk(self.stem(x.flatten(1)).tanh()))
            return logits
        finally:
            self.prior = None
