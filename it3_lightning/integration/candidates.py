"""Candidate layers: where a prior may enter a network, what comes after them, what they cost."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from it3_lightning.conditioning.feature_injection import Embedder
from it3_lightning.conditioning.layout import Layout, width
from it3_lightning.engine.restore import Snapshot, without_side_effects
from it3_lightning.engine.selection import OWN
from it3_lightning.integration.batches import normal
from it3_lightning.integration.isolation import without_logs
from it3_lightning.integration.module import PlainModule

_BEST = 2 / 3  # of the layers with weights come before the layer that is suggested


@dataclass(frozen=True)
class Candidate:
    """A layer where a prior may enter by :class:`~it3_lightning.FeatureInjection`.

    Args:
        name: of the layer.
        kind: its class.
        shape: of its output.
        depth: layers with weights of their own that have begun when it ends.
        layers: those that have when the network ends.
        after: share of the network's multiplications that come after it: what a second prediction
            costs, in forward passes, where the first one's features are kept; NaN: not known.
        weights: that the conditioning would have.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    depth: int
    layers: int
    after: float
    weights: int


@dataclass(frozen=True)
class Candidates:
    """Layers where a prior may enter, in the order in which they end; printed as a table.

    Args:
        rows: the layers.
        ends: layers that are left out as their output is the prediction.
    """

    rows: tuple[Candidate, ...]
    ends: tuple[str, ...]

    @property
    def best(self) -> Candidate | None:
        """A layer two thirds of the way, give or take a sixth, the outermost of such."""

        def away(row: Candidate) -> float:
            return abs(row.depth / row.layers - _BEST)

        near = [row for row in self.rows if away(row) <= 0.17]
        level = min((row.name.count(".") for row in near), default=0)
        outermost = [row for row in near if row.name.count(".") == level]
        return min(outermost or self.rows, key=away, default=None)

    def most(self, count: int = 24) -> tuple[Candidate, ...]:
        """Return at most so many of them, less those deepest inside of others, and the best."""
        levels = sorted({row.name.count(".") for row in self.rows}, reverse=True)
        rows, best = self.rows, self.best
        for level in levels[:-1]:
            if len(rows) <= count:
                break
            rows = tuple(r for r in rows if r.name.count(".") < level or r is best)
        return rows

    def __str__(self) -> str:
        rows = [("", "layer", "class", "output", "depth", "after", "weights")]
        for row in self.most():
            marked = "*" if row is self.best else ""
            output = "x".join(["B", *map(str, row.shape[1:])])
            after = "-" if row.after != row.after else f"{row.after:.0%}"
            depth = f"{row.depth}/{row.layers}"
            rows.append((marked, row.name, row.kind, output, depth, after, f"{row.weights:,}"))
        lines = _aligned(rows)
        left = len(self.rows) - (len(rows) - 1)
        lines += [f"{left} layers inside of these are left out."] * bool(left)
        if self.ends:
            names = ", ".join(repr(name) for name in self.ends[:3]) + ", ..." * (len(self.ends) > 3)
            text = f"Left out, as what they put out is the prediction: {names}."
            lines += textwrap.wrap(text, 100, break_long_words=False)
        return "\n".join([*lines, *_LEGEND])


_LEGEND = (
    "*: a middle-to-late layer, two thirds of the way: try it first.  depth: layers with weights",
    "that have run by its end.  after: share of the multiplications that follow; a second",
    "prediction costs that share of a forward pass, where the features before it are kept.",
    "weights: those of FeatureInjection(layer).",
)


def _aligned(rows: Sequence[tuple[str, ...]], limit: int = 100) -> list[str]:
    """Return lines of at most 100 columns; a name that is too long has a line of its own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = limit - sum(widths[3:]) - 2 * 5 - widths[0] - 1
    widths[2] = min(widths[2], 20)
    widths[1] = min(widths[1], room - widths[2])
    lines = []
    for mark, name, kind, *figures in rows:
        if len(name) > widths[1]:
            lines.append(f"{mark:{widths[0]}} {name}")
            mark = name = ""
        cells = [f"{name:{widths[1]}}", f"{kind[: widths[2]]:{widths[2]}}"]
        cells += [f"{cell:>{size}}" for cell, size in zip(figures, widths[3:], strict=True)]
        lines.append(f"{mark:{widths[0]}} {'  '.join(cells)}")
    return lines


def suggest_layers(module: LightningModule, batch: Any) -> Candidates:
    """Return the layers of a module where a prior may enter, as one batch shows them.

    One forward pass in evaluation mode, without gradients; the module stays what it is.

    Args:
        module: any LightningModule, with priors or without.
        batch: as its steps take it; it is not changed.

    Raises:
        MisconfigurationException: the module has no layer that a prior could enter, or predicts no
            tensor from the inputs of the batch.

    >>> from it3_lightning.tasks import Classifier
    >>> network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    >>> found = suggest_layers(Classifier(network), (torch.zeros(4, 2), torch.zeros(4)))
    >>> [(row.name, row.depth, round(row.after, 2), row.weights) for row in found.rows]
    [('network.0', 1, 0.85, 776), ('network.2', 2, 0.23, 776)]
    >>> found.best.name, found.ends
    ('network.2', ('network', 'network.3'))
    """
    host = PlainModule(module, "logits")
    unseen = without_side_effects(Snapshot(module), partial(without_logs, module))
    with torch.inference_mode(False), unseen, torch.no_grad():
        module.eval()
        inputs = normal(host.it3_inputs(move_data_to_device(batch, module.device)))
        with _watched(module) as watched:
            prediction: Any = host.predict_with(inputs, None)
    if not isinstance(prediction, Tensor) or not prediction.ndim:
        raise MisconfigurationException(
            f"Expected {type(module).__name__} to predict a tensor (B, ...), got "
            f"{type(prediction).__name__}. Override it3_outputs(self, returned)."
        )
    found = _candidates(module, watched, prediction)
    if not found.rows:
        raise MisconfigurationException(
            f"Expected {type(module).__name__} to run a layer of known width before its last, got "
            "none. FeatureInjection(layer, channels=...) takes others; ForwardArgument needs none."
        )
    return found


@dataclass
class _End:
    """How a layer ended, the last time that it ran."""

    output: Tensor
    depth: int
    work: int


@dataclass
class _Watched:
    """What the hooks have seen of a pass."""

    counter: FlopCounterMode
    ends: dict[str, _End] = field(default_factory=dict)
    depth: int = 0
    extra: int = 0  # multiplications of recurrent layers, which the counter does not know

    @property
    def work(self) -> int:
        return self.counter.get_total_flops() + self.extra


@contextmanager
def _watched(module: nn.Module) -> Iterator[_Watched]:
    """Note within when which layer ends, and what it has taken until then."""
    with ExitStack() as stack, FlopCounterMode(display=False) as counter:
        seen = _Watched(counter)

        def begin(layer: nn.Module, _: Any) -> None:
            started[layer] = seen.work
            seen.depth += _weighted(layer)

        def end(name: str, layer: nn.Module, _: Any, output: Any) -> None:
            features = _features(output)
            if features is None:
                return
            if isinstance(layer, nn.RNNBase) and seen.work == started.get(layer):
                rows = features.numel() // (width(layer) or 1)
                seen.extra += 2 * rows * sum(p.numel() for p in layer.parameters())
            seen.ends[name] = _End(features, seen.depth, seen.work)

        started: dict[nn.Module, int] = {}
        for name, layer in module.named_modules():
            if name and not name.startswith(OWN) and not isinstance(layer, torch.jit.ScriptModule):
                stack.callback(layer.register_forward_pre_hook(begin).remove)
                stack.callback(layer.register_forward_hook(partial(end, name)).remove)
        yield seen


def _candidates(module: nn.Module, seen: _Watched, prediction: Tensor) -> Candidates:
    modules = dict(module.named_modules())
    channels = prediction.shape[1] if prediction.ndim > 1 else 1
    prior = getattr(module, "it3_prior", None)
    if prior is not None:
        channels = prior.channels + prior.context_channels
    rows, ends = [], []
    for name, end in seen.ends.items():
        if end.depth == seen.depth and end.work == seen.work:
            ends.append(name)
            continue
        layout = _layout(name, modules, end.output, len(prediction))
        if layout is None or not end.depth:
            continue
        after = 1 - end.work / seen.work if seen.work else float("nan")
        with torch.device("meta"):  # without values, and without drawing any
            embedder = Embedder(channels, 64, layout.channels, None)
        weights = sum(parameter.numel() for parameter in embedder.parameters())
        kind, shape = type(modules[name]).__name__, tuple(end.output.shape)
        rows.append(Candidate(name, kind, shape, end.depth, seen.depth, after, weights))
    return Candidates(tuple(rows), tuple(sorted(ends, key=lambda name: name.count("."))))


def _layout(name: str, modules: dict[str, nn.Module], output: Tensor, size: int) -> Layout | None:
    """Return where a layer's output has samples and channels, where that can be told."""
    try:
        layout = Layout.of(name, modules, None)
        layout.axes(output, size)
    except ValueError:
        return None
    return layout


def _features(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) and first.ndim > 1 else None


def _weighted(layer: nn.Module) -> bool:
    """Whether a layer has a weight of its own, not only a scale or a bias."""
    return any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False))


@contextmanager
def ending(module: nn.Module, names: Sequence[str]) -> Iterator[Callable[[Tensor], list[str]]]:
    """Watch a pass within; return what names those layers whose output is the prediction.

    Args:
        module: whose pass.
        names: of layers.
    """
    last: dict[str, Tensor] = {}

    def end(name: str, _: Any, __: Any, output: Any) -> None:
        features = output[0] if isinstance(output, tuple) and output else output
        if isinstance(features, Tensor):
            last[name] = features

    def begin(layer: nn.Module, _: Any) -> None:
        last.clear()  # something that learns comes after them

    modules = dict(module.named_modules(remove_duplicate=False))
    learning = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    own = {id(m) for n, m in modules.items() if n.startswith(OWN)}
    with ExitStack() as stack:
        for layer in learning:
            if layer is not module and id(layer) not in own:
                stack.callback(layer.register_forward_pre_hook(begin).remove)
        for name in names:
            if name in modules:
                stack.callback(modules[name].register_forward_hook(partial(end, name)).remove)
        yield lambda prediction: [n for n, f in last.items() if f.numel() == prediction.numel()]
