"""vmap: every sample of a batch adapts at once, by `torch.func`, each with its own weights."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from it3_lightning.engine.evidence import run_by
from it3_lightning.engine.fast.grad_sample import Gradient, Layerwise, Product
from it3_lightning.engine.fast.stacked_weights import Compiled, Stacked, bytes_kept, samples_at_once
from it3_lightning.engine.optimizers import scaled_gradients
from it3_lightning.engine.passes import FunctionalPasses, Network, Sites, copied
from it3_lightning.engine.result import Adaptation
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.trees import batch_size, joined, leaves_of, taken, whole
from it3_lightning.engine.types import REASONS, SOURCE, Answer, SampleEvaluations, Weights
from it3_lightning.methods.base import Objective
from it3_lightning.utils.graphs import graph_count

_Result = TypeVar("_Result")

__all__ = ["Vectorised", "bytes_kept", "plain_attention", "release_switches", "samples_at_once"]


def mapped(one: Callable[..., Any], size: int, dims: tuple[int | None, ...], *given: Any) -> Any:
    """Call ``one`` for every sample of the last argument, a batch of one each.

    Args:
        one: takes the arguments, and returns tensors.
        size: the number of samples.
        dims: of the samples in the arguments but the last; ``None``: all samples share it.
        given: the arguments; the last are inputs of a network, ``(B, ...)``.

    >>> import torch
    >>> two = torch.tensor(2.0)
    >>> mapped(lambda scale, x: scale * x.sum(0), 3, (None,), two, torch.ones(3, 1))
    tensor([[2.],
            [2.],
            [2.]])
    """
    *others, inputs = given

    def dimension(leaf: Any) -> int | None:
        samples = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size
        return 0 if samples else None

    along = tree_map(dimension, inputs)

    def with_batch(*arguments: Any) -> Any:
        *rest, sample = arguments
        alone = tree_map(lambda leaf, dim: leaf if dim is None else leaf[None], sample, along)
        return one(*rest, alone)

    with uncompiled():
        return vmap(with_batch, in_dims=(*dims, along))(*others, inputs)


def without_batch(leaf: Tensor) -> Tensor:
    """Take away the dimension of a batch of one, where there is one.

    >>> import torch
    >>> without_batch(torch.ones(1, 2)).shape
    torch.Size([2])
    """
    return leaf[0] if leaf.ndim and leaf.shape[0] == 1 else leaf


class Switch:
    """A switch of the process, off while anybody needs it so; several threads may.

    Args:
        get: returns whether it is on.
        put: turns it on or off.
    """

    def __init__(self, get: Callable[[], bool], put: Callable[[bool], object]) -> None:
        self._get, self._put = get, put
        self._lock = threading.RLock()
        self._holders: set[object] = set()
        self._before = True

    def off(self, holder: object) -> bool:
        """Turn it off for a holder, and say whether it was not off for that one before."""
        with self._lock:
            new = holder not in self._holders
            if not self._holders:
                self._before = self._get()
            self._holders.add(holder)
            self._put(False)
            return new

    def release(self, holder: object) -> None:
        """Put it back if nobody else needs it off; a holder may release it twice."""
        with self._lock:
            if self._holders == {holder}:
                self._put(self._before)
            self._holders.discard(holder)


_CUDA, _MHA = torch.backends.cuda, torch.backends.mha
_WARNINGS = Switch(lambda: True, torch._C._functorch._set_vmap_fallback_warning_enabled)  # type: ignore[attr-defined]
_MHA_FAST = Switch(_MHA.get_fastpath_enabled, _MHA.set_fastpath_enabled)
_FUSED_ATTENTION = (
    Switch(_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    Switch(_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    Switch(_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp),
)
_FUSED_RECURRENT = (
    Switch(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    Switch(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
)
_STANCES: list[Any] = []


def _let_compiled_run(on: bool) -> None:
    """Let what is compiled run as such again, or as it was written."""
    while on and _STANCES:
        _STANCES.pop().__exit__(None, None, None)
    if not on:
        _STANCES.append(torch.compiler.set_stance("force_eager"))  # from here on


_COMPILED = Switch(lambda: True, _let_compiled_run)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let what ``torch.compile`` has made run as it was written, within.

    A compiled graph knows neither hooks that were registered since nor the weights of each sample,
    and which graph is taken depends on what has run before: it cannot be found right once for all.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    holder, outermost = threading.get_ident(), True
    try:
        outermost = _COMPILED.off(holder)
        yield
    finally:
        if outermost:
            _COMPILED.release(holder)


def release_switches(holder: object) -> None:
    """Put back what is off for a holder, and for passes of this thread; it may be called twice."""
    for switch in (_WARNINGS, _MHA_FAST, *_FUSED_ATTENTION, *_FUSED_RECURRENT):
        switch.release(holder)
    _COMPILED.release(threading.get_ident())


@contextmanager
def vmappable(module: nn.Module, holder: object) -> Iterator[None]:
    """Let a network run by operations that have a batching rule; the numbers are the same.

    Recurrent layers get the zero state that they would make themselves, as one that ``vmap`` knows
    of, and no fused kernels; on the CPU so does attention. What torch has no rule for runs sample
    by sample, which it warns of; the choice of a backend is made by the time taken.

    Args:
        module: the network.
        holder: for whom switches of the process are off within, see :func:`release_switches`.
    """
    layers = recurrent_layers(module)
    patched = [m for m in layers if "forward" not in vars(m)]
    try:
        for switch in (_WARNINGS, *(_FUSED_RECURRENT if layers else ())):
            switch.off(holder)
        for layer in patched:
            vars(layer)["forward"] = partial(_recurrent, layer, layer.forward)
        with plain_attention(module, holder):
            yield
    finally:
        for layer in patched:
            vars(layer).pop("forward", None)
        release_switches(holder)


@contextmanager
def plain_attention(module: nn.Module, holder: object) -> Iterator[None]:
    """Let the attention of a network on the CPU run unfused, as ``vmap`` needs it.

    Args:
        module: the network.
        holder: see :func:`vmappable`.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    switches = _MHA_FAST, *(_FUSED_ATTENTION if on_cpu else ())
    try:
        for switch in switches:
            switch.off(holder)
        yield
    finally:
        for switch in switches:
            switch.release(holder)


def recurrent_layers(module: nn.Module) -> list[nn.Module]:
    """Return the recurrent layers and cells of a network."""
    return [m for m in module.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]


def without_graph(run: Callable[..., _Result], *arguments: Any) -> _Result:
    """Run inside ``vmap`` without a graph, but by the operations that a graph is made of.

    Outside of ``torch.func.grad``, recurrent layers are single operations without a rule.
    """

    def beside(nothing: Tensor) -> tuple[Tensor, _Result]:
        with torch.no_grad():
            return nothing, run(*arguments)

    result: _Result = grad(beside, has_aux=True)(torch.zeros(()))[1]
    return result


def _recurrent(layer: nn.Module, own: Callable[..., Any], inputs: Any, hx: Any = None) -> Any:
    """Run a recurrent layer, by a state of its own where it is given none."""
    if hx is None and isinstance(inputs, Tensor):
        hx = _zeros(layer, inputs)
    return own(inputs, hx)


def _zeros(layer: Any, inputs: Tensor) -> Any:
    if isinstance(layer, nn.RNNCellBase):
        state = inputs.new_zeros(*inputs.shape[:-1], layer.hidden_size)
        return (state, state) if isinstance(layer, nn.LSTMCell) else state
    batch = [] if inputs.ndim == 2 else [inputs.shape[0 if layer.batch_first else 1]]
    depth = layer.num_layers * (2 if layer.bidirectional else 1)
    state = inputs.new_zeros(depth, *batch, layer.proj_size or layer.hidden_size)
    if not isinstance(layer, nn.LSTM):
        return state
    return state, inputs.new_zeros(depth, *batch, layer.hidden_size)


_FEW = 4  # samples whose gradients are found both ways


class Gradients:
    """Finds the gradients of every sample's loss by its own weights.

    Args:
        module: whose weights; none of its parameters may need gradients.
        selected: the adapting parameters by name.
        network: runs the passes; has run an ordinary one.
        settings: how to adapt.
        shared: whether the first gradients may be found by shared passes.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        network: Network,
        settings: Settings,
        shared: bool,
    ) -> None:
        self._selected = selected
        self._sites = Sites(module, selected)
        self._network = network
        self._method = settings.method
        self._layerwise = Layerwise(module, selected, network, settings.method)
        on_cpu = next(iter(selected.values())).device.type == "cpu"  # faster there, as measured
        self._may_share = shared and on_cpu and not settings.compile and settings.anchor != "live"
        self._agreed: dict[Any, int | None] = {}  # see `_ask`
        self._conditions: Any = None
        self._compiled: dict[bool, Compiled] = {}
        if settings.compile:
            self._compiled = {r: Compiled(partial(self._step, r)) for r in (False, True)}
        self._optimizer = settings.optimizer
        self._unused: frozenset[str] | None = None if callable(settings.optimizer) else frozenset()
        self._passes: dict[bool, int] = {}

    def under(self, conditions: Any) -> None:
        """Go by what is known of networks and inputs under these conditions."""
        if conditions != self._conditions and callable(self._optimizer):
            self._unused = None
        self._conditions = conditions

    def first(self, stacked: Stacked, inputs: Any) -> tuple[Weights, SampleEvaluations]:
        """Return the gradients at the source, layer by layer where that is known to agree."""
        if _in_float16(stacked):  # the loss of each sample has a scale of its own
            return self._by_func(stacked, inputs, at_source=True)
        agreed = self._agreed.get(self._conditions, 0)
        if agreed is not None and (agreed > 1 or stacked.size <= agreed):
            try:
                return self._layer_by_layer(stacked, inputs)
            except Exception:  # torch.func is asked, and raises what is no fault of the rules
                self._agreed[self._conditions] = agreed = None
                stacked.forget()
        gradients, seen = self._by_func(stacked, inputs, at_source=True)
        if self._may_share and agreed in (0, 1):  # one tells nothing of several
            self._ask(inputs, gradients, seen)
        return gradients, seen

    def further(self, stacked: Stacked, inputs: Any) -> tuple[Weights, SampleEvaluations]:
        """Return the gradients ``(B, *shape)`` at weights of each sample's own."""
        return self._by_func(stacked, inputs, at_source=False)

    def _layer_by_layer(self, stacked: Stacked, inputs: Any) -> tuple[Weights, SampleEvaluations]:
        gradients: Weights = {}

        def take(name: str, gradient: Gradient) -> None:
            if isinstance(gradient, Product):
                if stacked.use_up(name, gradient):
                    return
                gradient = gradient.whole(self._selected[name].shape)
            gradients[name] = gradient

        with uncompiled():
            seen = self._layerwise(inputs, take)
        return self._used(gradients), seen

    def _ask(self, inputs: Any, gradients: Weights, seen: SampleEvaluations) -> None:
        """Find out whether the gradients can be found layer by layer, from some that are known.

        The answer holds under the conditions of now: the number of samples on which they agree, or
        ``None`` where they do not.
        """
        few = range(min(_FEW, len(seen.loss)))
        if bool(trouble_of(seen).any()) or not bool(seen.moves[: len(few)].any()):
            return  # another batch will tell
        network = self._network
        counts = network.forwards, network.cache.hits
        network.cache.clear()
        known = {name: gradient[: len(few)] for name, gradient in gradients.items()}
        with uncompiled():
            agrees = self._layerwise.agrees(taken(inputs, few), known)
        self._agreed[self._conditions] = len(few) if agrees else None
        network.forwards, network.cache.hits = counts

    def _used(self, gradients: Weights) -> Weights:
        return {n: g for n, g in gradients.items() if n not in (self._unused or ())}

    def _by_func(
        self, stacked: Stacked, inputs: Any, *, at_source: bool
    ) -> tuple[Weights, SampleEvaluations]:
        """Return gradients ``(B, *shape)`` of every sample's loss by its weights."""
        cached = at_source and stacked.anchor is not None
        step = self._compiled.get(cached) or partial(self._step, cached)
        given = (stacked.weights, stacked.dim), (stacked.anchor, stacked.anchor_dim)
        seen: list[SampleEvaluations] = []

        def find(scale: float | None = None) -> Weights:
            if scale is not None:  # it may be the second pass over these inputs
                self._network.cache.clear()
            factor = None if scale is None else torch.tensor(scale, dtype=torch.float32)
            before = self._network.forwards
            gradients, values = step(stacked.size, *given, factor, inputs)
            if self._network.forwards == before:  # compiled: counted when it was traced
                self._network.forwards += self._passes.get(cached, 0)
            else:
                self._passes[cached] = self._network.forwards - before
            seen.append(SampleEvaluations(*values))
            return self._used(gradients)

        return scaled_gradients(find) if _in_float16(stacked) else find(), seen[0]

    def _step(
        self,
        cached: bool,
        size: int,
        weights: tuple[Weights, int | None],
        anchor: tuple[Weights | None, int | None],
        scale: Tensor | None,
        inputs: Any,
    ) -> tuple[Weights, tuple[Tensor, ...]]:
        """Return gradients and evaluations; weights and anchor come with their dimension.

        The gradients are those of the losses times a scale, if there is one.
        """

        def one(weights: Weights, anchor: Weights | None, sample: Any) -> Any:
            def loss(own: Weights) -> Any:
                loss, seen = self._loss(own, anchor, sample, cached)
                return loss if scale is None else loss.float() * scale, seen

            return grad(loss, has_aux=True)(weights)

        dims = (weights[1], anchor[1])
        gradients, seen = mapped(one, size, dims, weights[0], anchor[0], inputs)
        return gradients, seen

    def _loss(
        self, own: Weights, anchor: Weights | None, sample: Any, cached: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return one sample's loss, and what :class:`SampleEvaluations` holds of it."""
        network, version = self._network, SOURCE if cached else None

        def second(y0: Tensor) -> Tensor:
            return network.second(sample, y0, own if anchor is None else anchor, version)

        def evaluated() -> tuple[Tensor, Objective]:
            outputs = network.first(sample, SOURCE) if cached else network.run(sample, None)
            y0 = network.to_label(outputs)
            passes = FunctionalPasses(outputs, y0, second, network.valid(sample, y0))
            return outputs, self._method.loss(passes)

        outputs, objective = self._sites.run_with(own, evaluated)
        loss = objective.loss()
        if self._unused is None:
            self._unused = _without_influence(loss, own)
        seen = objective.measure[0], objective.reliable[0], objective.moves[0]
        return loss, tuple(value.detach() for value in (outputs[0], *seen, loss))


def _in_float16(stacked: Stacked) -> bool:
    return any(weights.dtype == torch.float16 for weights in stacked.weights.values())


def _changed(stacked: Stacked, rows: Tensor) -> Tensor:
    """Return ``(B,)``, those of these rows that have any weight which is not the source's."""
    same = rows.nonzero()[:, 0]
    sizes = {n: w.numel() for n, w in stacked.source.items()} if stacked.dim == 0 else {}
    for name in sorted(sizes, key=sizes.__getitem__):
        weights, source = stacked.weights[name], stacked.source[name]
        alike = (weights[same.to(weights.device)] == source)[..., None].flatten(1).all(1)
        same = same[alike.to(same.device)]
        if not len(same):
            break
    return rows.index_fill(0, same, False)


def trouble_of(seen: SampleEvaluations) -> Tensor:
    """Return ``(B,)`` on the CPU: 0, or the number of the reason not to go on.

    >>> one = torch.ones(2)
    >>> trouble_of(SampleEvaluations(torch.tensor([[1.0], [torch.nan]]), one, one, one, one))
    tensor([0, 1])
    """
    output = ~seen.outputs.isfinite().flatten(1).all(1)
    return torch.where(output, 1, 2 * ~seen.loss.isfinite()).cpu()


def _without_influence(loss: Tensor, weights: Weights) -> frozenset[str]:
    """Return the weights that a loss does not depend on: optimizers leave those alone."""
    found = torch.autograd.grad(loss, [*weights.values()], retain_graph=True, allow_unused=True)
    return frozenset(name for name, g in zip(weights, found, strict=True) if g is None)


_LARGE = 1 << 20  # elements of a sample's weights: to read them takes longer than calling layers


class Vectorised:
    """Adapts to every sample of a batch at once.

    Args:
        module: whose parameters adapt; none of them may need gradients.
        selected: the adapting parameters by name.
        network: runs the passes; has run an ordinary one.
        settings: how to adapt, in at least one step.
        shared: whether the first gradients may be found by shared passes.
        believe: returns the norm statistics of a sample, which the network takes beside it, see
            :func:`~it3_lightning.engine.evidence.run_by`.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        network: Network,
        settings: Settings,
        shared: bool,
        believe: Callable[[Any], Any] | None = None,
    ) -> None:
        self._believe = believe
        self._module = module
        self._recurrent = bool(recurrent_layers(module))
        self._selected = selected
        self._sites = Sites(module, selected)
        self._network = network
        self._settings = settings
        self._method = settings.method
        self._gradients = Gradients(module, selected, network, settings, shared)
        self._device = next(iter(selected.values())).device.type
        self._large = sum(p.numel() for p in selected.values()) >= _LARGE and self._device == "cpu"
        self._memory: Weights = {}

    def release(self) -> None:
        """Give back the memory that is kept for the next batch."""
        self._memory.clear()

    def __call__(self, inputs: Any, answer: Answer, conditions: Any = None) -> Adaptation:
        """Adapt to every sample of the inputs, and answer with its weights.

        Args:
            inputs: of the network.
            answer: inputs to outputs, and what is answered with them.
            conditions: of the network and the inputs: what was found out under others does not
                count.

        Raises:
            Exception: whatever ``torch.func`` says of a network that cannot be vectorised.
        """
        leaves = tree_leaves(inputs, is_leaf=whole)
        objects = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        if any(graph_count(leaf) for leaf in objects if leaf is not None):
            raise NotImplementedError("torch.func takes tensors, not batches of graphs.")
        for leaf in objects:
            opens = isinstance(leaf, PackedSequence | Mapping) or is_dataclass(leaf)
            if opens and any(isinstance(held, Tensor | PackedSequence) for held in leaves_of(leaf)):
                raise NotImplementedError(
                    "torch.func takes tensors in tuples, lists and dicts, not in a "
                    f"{type(leaf).__name__}."
                )
        if not self._method.vmappable:
            raise NotImplementedError(f"{type(self._method).__name__} asks for further passes")
        self._network.restart()
        self._gradients.under(conditions)
        try:
            with (
                torch.autocast(self._device, enabled=False),
                vmappable(self._module, self),
            ):
                if self._believe is not None:
                    believe = self._graphless(self._believe)
                    inputs = inputs, mapped(believe, batch_size(inputs), (), inputs)
                    answer = partial(run_by, self._module, answer)
                return self._adapt(inputs, answer)
        finally:
            self._network.cache.clear()

    def _adapt(self, inputs: Any, answer: Answer) -> Adaptation:
        size = batch_size(inputs)
        started = time.perf_counter()
        stacked = Stacked(self._selected, self._settings, size, self._memory)
        failed = torch.zeros(size, dtype=torch.long)
        active = torch.ones(size, dtype=torch.bool)
        first: SampleEvaluations | None = None
        for _ in range(self._settings.steps):
            find = self._gradients.further if first else self._gradients.first
            gradients, seen = find(stacked, inputs)
            first = first or seen
            failed = torch.where(active, trouble_of(seen), failed)
            active &= (failed == 0) & seen.moves.cpu()
            if active.any():
                finite = stacked.step(gradients, active, seen.loss)
                failed[active & ~finite] = len(REASONS)
                active &= finite
            del gradients
        assert first is not None
        bad = failed > 0
        stacked.back_to_source(bad)
        seconds = time.perf_counter() - started
        outputs, answers = self._answers(stacked, inputs, answer)
        adapted = self._measured(stacked, inputs, outputs) if self._settings.measure else None
        known = ~bad.to(outputs.device)
        reasons = [REASONS[code - 1] for code in sorted(set(failed[failed > 0].tolist()))]
        return Adaptation(
            outputs=outputs,
            source_outputs=first.outputs,
            distance_source=first.measure.where(known, torch.nan),
            distance_adapted=None if adapted is None else adapted.where(known, torch.nan),
            reliable=_changed(stacked, first.reliable & known),
            skipped=bad,
            reason=", ".join(reasons) or None,
            weights={},
            forwards=self._network.forwards,
            backwards=self._settings.steps,
            cache_hits=self._network.cache.hits,
            seconds=seconds,
            answers=answers,
        )

    def _answers(self, stacked: Stacked, inputs: Any, answer: Answer) -> tuple[Tensor, Any]:
        """Return outputs ``(B, ...)`` and answers with every sample's own weights."""
        if stacked.dim is not None and self._large:
            return self._answers_one_by_one(stacked.weights, inputs, answer)

        def one(weights: Weights, sample: Any) -> Any:
            self._network.forwards += 1
            outputs, answers = self._sites.run_with(weights, lambda: answer(copied(sample)))
            return tree_map(without_batch, (outputs, () if answers is None else answers))

        given = stacked.weights, inputs
        outputs, answers = mapped(self._graphless(one), stacked.size, (stacked.dim,), *given)
        return outputs, None if isinstance(answers, tuple) and not answers else answers

    def _answers_one_by_one(
        self, weights: Weights, inputs: Any, answer: Answer
    ) -> tuple[Tensor, Any]:
        """Do the same sample by sample."""
        parts = []
        for row in range(len(next(iter(weights.values())))):
            self._network.forwards += 1
            own = {name: w[row] for name, w in weights.items()}
            alone = copied(taken(inputs, range(row, row + 1)))
            with uncompiled():
                parts.append(self._sites.run_with(own, partial(answer, alone)))
        outputs, answers = joined(parts)
        return outputs, answers

    def _measured(self, stacked: Stacked, inputs: Any, outputs: Tensor) -> Tensor:
        """Return the objective's measure ``(B,)`` of outputs with the adapted weights."""

        def one(weights: Weights, anchor: Weights | None, last: Tensor, sample: Any) -> Any:
            def second(prior: Tensor) -> Tensor:
                own = weights if anchor is None else anchor
                return self._network.second(sample, prior, own, None)

            alone = last[None]
            y0 = self._network.to_label(alone)
            passes = FunctionalPasses(alone, y0, second, self._network.valid(sample, y0))
            return self._method.loss(passes).measure[0]

        dims = (stacked.dim, stacked.anchor_dim, 0)
        given = stacked.weights, stacked.anchor, outputs
        measure: Tensor = mapped(self._graphless(one), stacked.size, dims, *given, inputs)
        return measure

    def _graphless(self, one: Callable[..., Any]) -> Callable[..., Any]:
        return partial(without_graph, one) if self._recurrent else torch.no_grad()(one)
