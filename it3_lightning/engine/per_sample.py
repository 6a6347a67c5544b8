"""Scope `sample`: every sample of a batch gets its own adapted weights, as if it had come alone.

The loop over batches of one is the reference. Where a fast path adapts to many samples at once with
the same result, and in less time, it is taken; which of both is found out on a few samples, and
again where the conditions change. Which is faster is remembered of a module while it lives, for
other adapters of it that do the same; that both agree each adapter finds out by itself.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
from types import FunctionType, MappingProxyType
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from it3_lightning.engine import fast
from it3_lightning.engine.adapter import BatchAdapter
from it3_lightning.engine.evidence import SourceMoments, believed, run_by
from it3_lightning.engine.passes import Network, copied
from it3_lightning.engine.restore import Snapshot, Undo, stop_watching, without_side_effects
from it3_lightning.engine.result import Adaptation, merged, replaced
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.trees import (
    Shared,
    batch_size,
    candidates,
    cast_like,
    laid_out,
    leaves_of,
    sealed,
    sequence_first,
    taken,
)
from it3_lightning.engine.types import (
    Answer,
    Enters,
    Forward,
    InputsIn,
    Isolation,
    Plain,
    SampleDims,
    ToLabel,
    ValidIn,
)
from it3_lightning.utils.graphs import graph_count

_LOOPED = 2  # samples that the loop is timed and compared on: its cost is always the same
_MOST = 64  # samples that tell how fast many at once are
_DOUBTFUL = 3.0  # times as long as the loop: a first run may take, which allocates and compares
_ROUNDING = 1e3  # units of rounding that the backends' outputs may lie apart, at least
_MOVEMENT = 0.01  # or this share of how far the steps moved them
_ROUGHLY = 0.5  # the same in low precision, where Adam makes whole steps of rounding errors
_LOW = 1e-3  # unit of rounding of TF32; half precision has larger ones
_ALWAYS = 2**62  # samples: whatever their number
_KEPT = 64  # selections that are remembered of a module, the latest


@dataclass(frozen=True)
class BackendSelection:
    """The backend taken.

    Args:
        backend: its name.
        chunk_size: samples that are vectorised at once.
        tried: the number of samples it was selected by.
        reason: why, in words.
    """

    backend: Literal["vectorised", "loop"]
    chunk_size: int
    tried: int
    reason: str

    def serves(self, size: int) -> bool:
        """Whether it still holds for batches of this size, or should be made anew."""
        return min(size, self.chunk_size, _MOST) < 2 * self.tried

    def __str__(self) -> str:
        return f"backend {self.backend!r}: {self.reason}"


class SampleAdapter:
    """Adapts a module to each sample of one batch after another.

    Args:
        module: whose parameters adapt.
        forward: ``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one.
        to_label: brings outputs into label space, ``(B, C, ...)``.
        settings: how to adapt.
        enters: see :class:`~it3_lightning.engine.BatchAdapter`, as of the others.
        isolation: likewise.
        known_as: plain data that tells what the functions above do from what those of other
            adapters of this module do: where it is equal, and all else that a selection is made
            under, one adapter goes by what another has measured. ``None``: it measures for itself.

    Attributes:
        selected: the adapting parameters by name.
        backend_selection: the backend of the last batch; ``None`` before the first.

    Raises:
        ValueError: the selection of parameters matches nothing.

    >>> net, x = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
    >>> _ = nn.init.ones_(net.weight)
    >>> def forward(x, prior):  # knows the second prediction: half of the first
    ...     return net(x) if prior is None else prior / 2
    >>> settings = Settings(scope="sample", lr=0.1, optimizer="sgd")
    >>> with SampleAdapter(net, forward, lambda y: y, settings).adapted(x) as adaptation:
    ...     adaptation.outputs.flatten()  # w = 1 - 0.1 x^2 / 2, each by its own x
    tensor([0.9500, 1.6000])
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        to_label: ToLabel,
        settings: Settings,
        *,
        enters: Enters = MappingProxyType({}),
        isolation: Isolation = nullcontext,
        inputs_in: InputsIn | None = None,
        sample_dims: SampleDims | None = None,
        valid_in: ValidIn | None = None,
        moments: SourceMoments | None = None,
        known_as: tuple[str | None, ...] | None = None,
    ) -> None:
        self._sample_dims = sample_dims
        self._module = module
        self._settings = settings
        self._forward = forward
        self._isolation = isolation
        given: dict[str, Any] = {"enters": enters, "isolation": isolation, "inputs_in": inputs_in}
        given |= {"valid_in": valid_in, "moments": moments}
        alone = replace(settings, scope="batch", gate=None, compile=False)
        self._alone = BatchAdapter(module, forward, to_label, alone, **given)
        self._common = module, forward, to_label, alone, given
        self.selected = self._alone.selected
        self.undo = Undo()
        self.drawn = False  # whether the passes of the last batch drew random numbers
        self._fast = fast.path("vmap")
        self._vectorised: Callable[[Any, Answer, Any], Adaptation] | None = None
        self._own_statistics = self._alone.believes or settings.norm_stats == "mixed"
        vectorises = settings.method.vmappable and settings.norm_stats != "mixed"
        if self._fast is not None and vectorises:
            network, shared = self._alone.network, fast.enabled("grad_sample")
            believe: Callable[[Any], Any] | None = None
            if self._own_statistics:  # they come with each sample
                given = {"inputs_in": inputs_in}
                if valid_in is not None:
                    given["valid_in"] = lambda pair, y0: valid_in(pair[0], y0)
                run, shared, believe = partial(run_by, module, forward), False, self._believe
                network = Network(module, self.selected, run, to_label, enters, **given)
            self._vectorised = self._fast.Vectorised(
                module, self.selected, network, settings, shared, believe
            )
        self._known: dict[Any, BackendSelection] = {}  # by the conditions they were made under
        self._alike: Any = None  # what adapters that do the same have in common
        if known_as is not None and settings.backend == "auto":
            self._alike = _plainly(
                (*known_as, fast.enabled("grad_sample"), *self.selected, settings)
            )
        self.backend_selection: BackendSelection | None = None
        self._told = False  # which tensors hold the samples of the batch at hand
        self._under: Any = None  # the conditions of the batch at hand
        self._like: dict[Any, Any] = {}  # outputs and answers of the loop, in their data types

    def restart(self) -> None:
        """Do nothing: no sample leaves anything to the next."""

    @contextmanager
    def adapted(self, inputs: Any, answer: Answer | None = None) -> Iterator[Adaptation]:
        """Adapt to each sample and run the body, with the source weights in place.

        Args:
            inputs: what ``forward`` takes: tensors ``(B, ...)``, possibly nested. Never labels.
            answer: what to run with each sample's adapted weights: inputs to outputs ``(B, ...)``
                and what becomes :attr:`Adaptation.answers`. Default: the neutral forward pass.
        """
        with self.undo as undo, torch.inference_mode(False), torch.no_grad():
            self.drawn = False  # samples taken out, in these modes, are ordinary tensors
            undo.add(stop_watching)
            if self._fast is not None and self._vectorised is not None:
                undo.add(partial(self._fast.release_switches, self._vectorised))
            undo.add(self._alone.undo.run)
            adaptation = self._adapt(inputs, answer or Plain(self._forward))
        yield adaptation

    def _adapt(self, inputs: Any, answer: Answer) -> Adaptation:
        dims = None if self._sample_dims is None else self._sample_dims(inputs)
        inputs = sealed(inputs) if dims is None else laid_out(inputs, dims)
        self._told = dims is not None
        if self._settings.steps == 0:
            return self._source(inputs, answer)
        if self._settings.gate is None:
            return self._each(inputs, answer)
        return self._gated(inputs, answer, self._settings.gate)

    def _believe(self, sample: Any) -> Any:
        """Return the statistics of a sample by its own evidence, possibly inside ``torch.func``."""
        network, moments = self._alone.network, self._alone.moments
        assert moments is not None
        run = partial(network.run, sample, None)
        return believed(self._module, sample, run, network.to_label, moments)

    def _source(self, inputs: Any, answer: Answer) -> Adaptation:
        """Predict with the source weights; measure the samples whose prediction is finite."""
        self.undo.add(self._still.undo.run)
        if self._own_statistics and (size := batch_size(inputs)):
            return merged([self._one(inputs, i, answer, self._still) for i in range(size)])
        with self._still.adapted(inputs, answer) as source:
            pass
        self.drawn |= self._still.drawn
        if source.reason is None or source.outputs is None:
            return source
        rows = source.outputs.isfinite().flatten(1).all(1).nonzero()[:, 0].tolist()
        if not rows:
            return source
        with self._still.adapted(taken(inputs, rows), answer) as finite:
            pass
        both = replaced(source, finite, rows)
        return replace(both, outputs=source.outputs, answers=source.answers)

    @cached_property
    def _still(self) -> BatchAdapter:
        """What predicts and measures with the source weights."""
        module, forward, to_label, alone, given = self._common
        measure = self._settings.measure or self._settings.gate is not None
        known = frozenset(self.selected)  # by name: they may be frozen by now
        still = replace(alone, steps=0, measure=measure, parameters=lambda name, _: name in known)
        return BatchAdapter(module, forward, to_label, still, **given)

    def _gated(self, inputs: Any, answer: Answer, gate: float) -> Adaptation:
        """Adapt to the samples beyond the gate; the others keep the source prediction."""
        source = self._source(inputs, answer)
        if source.distance_source is None:  # no sample is finite
            return source
        within = source.distance_source <= gate
        rows = (~within.cpu() & ~source.skipped).nonzero()[:, 0].tolist()
        source = replace(
            source,
            reliable=torch.zeros_like(within),
            gated=within.cpu(),
            distance_adapted=source.distance_adapted if self._settings.measure else None,
        )
        if not rows:
            return source
        return replaced(source, self._each(taken(inputs, rows), answer), rows)

    def _each(self, inputs: Any, answer: Answer) -> Adaptation:
        """Adapt to each sample by the backend that serves these conditions."""
        size, conditions = batch_size(inputs), self._conditions(inputs)
        self._under = conditions
        known = self._known.get(conditions)
        if known is None and size and not self._told:
            self._check_samples(inputs, answer, size)
        if not size:
            return self._source(inputs, answer)
        if known is None or not known.serves(size):
            adaptation, known = self._selecting(inputs, answer, size)
        elif known.backend == "loop":
            adaptation = self._looped(inputs, answer)
        else:
            adaptation, known = self._at_once(inputs, answer, known)
        if known != self._known.get(conditions):
            self._keep(known)
        self.backend_selection = known
        if known.backend == "loop" and self._vectorised is not None:
            self._vectorised.release()  # type: ignore[attr-defined]
        return adaptation

    def _looped(self, inputs: Any, answer: Answer) -> Adaptation:
        """Adapt to one sample after the other: the reference."""
        return merged([self._one(inputs, i, answer) for i in range(batch_size(inputs))])

    def _one(
        self, inputs: Any, index: int, answer: Answer, adapter: BatchAdapter | None = None
    ) -> Adaptation:
        adapter = adapter or self._alone
        with adapter.adapted(taken(inputs, range(index, index + 1)), answer) as adaptation:
            pass
        self.drawn |= adapter.drawn
        if len(adaptation.skipped) != 1 and not any(map(graph_count, _objects(inputs))):
            raise ValueError(
                f"Expected outputs (1, ...) of one sample, got {len(adaptation.skipped)} rows. "
                f"{_WHICH.format(_named(inputs, batch_size(inputs)))}"
            )
        like = tree_map(_empty, (adaptation.outputs, adaptation.answers))
        self._like[self._under] = like
        return replace(adaptation, weights={})

    def _at_once(
        self, inputs: Any, answer: Answer, selection: BackendSelection
    ) -> tuple[Adaptation, BackendSelection]:
        """Adapt to many samples at once, to fewer where memory runs out; else one by one."""
        parts: list[Adaptation] = []
        size, start, chunk = batch_size(inputs), 0, selection.chunk_size
        while start < size:
            stop = min(start + chunk, size)
            try:
                parts.append(self._chunk(taken(inputs, range(start, stop)), answer))
                start = stop
            except Exception as error:  # of a batch unlike the one the selection was made by
                if _out_of_memory(error) and stop - start > 1:
                    chunk = max(1, (stop - start) // 2)
                    self._halved(chunk)
                    continue
                looped = self._looped(inputs, answer)  # raises what is no fault of torch.func
                return looped, _fallen_back(chunk, _in_words(error))
        return merged(parts), replace(selection, chunk_size=chunk)

    def _halved(self, chunk: int) -> None:
        assert self._vectorised is not None
        self._vectorised.release()  # type: ignore[attr-defined]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        warnings.warn(
            f"Memory ran out: no more than {chunk} sample(s) are adapted to at once from now on. "
            f"Give chunk_size={chunk} to begin so, or a smaller memory.",
            stacklevel=2,
        )

    def _chunk(self, inputs: Any, answer: Answer) -> Adaptation:
        """Adapt to all samples by ``torch.func``; what goes wrong in the end keeps the source."""
        assert self._vectorised is not None
        assert self._fast is not None
        snapshot = Snapshot(self._module)
        self.undo.add(snapshot.restore)
        draws = partial(self._alone.draws, inputs)
        without = without_side_effects(snapshot, self._isolation, draws)
        with torch.inference_mode(False), torch.enable_grad(), without:
            snapshot.detach_parameters()
            self._alone.network.forwards = 0
            adaptation = self._vectorised(inputs, answer, self._under)
            if self._own_statistics:  # whose passes are those of another network
                forwards = adaptation.forwards + self._alone.network.forwards
                adaptation = replace(adaptation, forwards=forwards)
        self.drawn |= snapshot.drawn
        assert adaptation.outputs is not None
        both = adaptation.outputs, adaptation.answers
        outputs, answers = cast_like(both, self._like[self._under])
        source = cast_like(adaptation.source_outputs, outputs)
        adaptation = replace(adaptation, outputs=outputs, answers=answers, source_outputs=source)
        bad = ~outputs.isfinite().flatten(1).all(1).cpu() & ~adaptation.skipped
        if self._own_statistics and adaptation.skipped.any():  # which have the source's as well
            rows = adaptation.skipped.nonzero()[:, 0].tolist()
            adaptation = replaced(adaptation, self._looped(taken(inputs, rows), answer), rows)
        if not bad.any():
            return adaptation
        rows = bad.nonzero()[:, 0].tolist()
        kept = self._source(taken(inputs, rows), answer)
        kept = replace(
            kept,
            skipped=torch.ones_like(kept.skipped),
            reason="non-finite output",
            distance_source=None,
            distance_adapted=None,
            reliable=None,
        )
        return replaced(adaptation, kept, rows)

    # Which tensors hold the samples

    def _check_samples(self, inputs: Any, answer: Answer, size: int) -> None:
        """Refuse inputs whose samples, taken by the rule, are not those that the network sees.

        Where several tensors may hold them, or layers expect them along another dimension, outputs
        of single samples are held against their rows in the outputs of the batch.

        Raises:
            ValueError: they differ, or there are more outputs than samples, or fewer.
        """
        if any(map(graph_count, _objects(inputs))):
            return
        if len(candidates(inputs, size)) < 2 and not sequence_first(self._module):
            return
        with without_side_effects(Snapshot(self._module), self._isolation), torch.no_grad():
            whole = answer(copied(inputs))[0]
            if len(whole) != size:
                raise ValueError(
                    f"Expected outputs of {size} samples, got {len(whole)} rows. "
                    f"{_WHICH.format(_named(inputs, size))}"
                )
            for row in sorted({0, size - 1}):
                alone = answer(copied(taken(inputs, range(row, row + 1))))[0]
                same = alone.shape[0] == 1 and alone.shape[1:] == whole.shape[1:]
                if not same or not _rounded(alone[0], whole[row], whole):
                    break
            else:
                return
            if same and not torch.equal(whole, answer(copied(inputs))[0]):
                return  # random: nothing can be told by it
        raise ValueError(
            "Expected of a sample alone the outputs that it has in its batch, got others. "
            f"{_WHICH.format(_named(inputs, size))}"
        )

    # Backend selection

    def _conditions(self, inputs: Any) -> Any:
        """Return what a selection was made under; where it changes, another one is made.

        It keeps neither layers nor code alive.
        """
        device = next(iter(self.selected.values())).device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        layers = tuple(map(_state, list(self._module.modules())[1:]))  # calls of itself are ours
        own = self._module.training, _itself(type(self._module).forward), *_tensors(self._module)
        process = autocast, torch.get_num_threads(), torch.get_float32_matmul_precision()
        return tuple(map(_kind, tree_leaves(inputs))), own, layers, process

    def _keep(self, selection: BackendSelection) -> None:
        """Keep a selection for the conditions of now; what was measured, for others alike too."""
        self._known[self._under] = selection
        if self._alike is None or not 0 < selection.tried < _ALWAYS:
            return
        measured, key = _MEASURED.setdefault(self._module, {}), (self._alike, self._under)
        measured.pop(key, None)  # the latest stands last
        measured[key] = selection
        if len(measured) > _KEPT:
            measured.pop(next(iter(measured)))

    def _measured(self, size: int) -> BackendSelection | None:
        """Return what an adapter alike has measured under the conditions of now."""
        found = _MEASURED.get(self._module, {}).get((self._alike, self._under))
        return found if found is not None and found.serves(size) else None

    def _selecting(
        self, inputs: Any, answer: Answer, size: int
    ) -> tuple[Adaptation, BackendSelection]:
        """Adapt to a batch, and select the backend meanwhile: what is tried is not done twice.

        Where the time is known, what is vectorised is still compared with the loop, on one sample.
        """
        reason = self._why_loop()
        if reason is not None:
            return self._looped(inputs, answer), BackendSelection("loop", 1, _ALWAYS, reason)
        known = self._measured(size)
        if known is not None and known.backend == "loop":
            return self._looped(inputs, answer), known
        auto = self._settings.backend == "auto" and known is None
        chunk = self._chunk_size(inputs) if known is None else known.chunk_size
        together_size = min(size, chunk)
        few, looping = [], float("inf")
        count = _LOOPED if auto else 1  # one tells no time
        for index in range(min(size, count)):
            one, seconds = _timed(partial(self._one, inputs, index, answer))
            few.append(one)
            looping = min(looping, seconds)
        expected = merged(few)
        many = taken(inputs, range(together_size))
        try:
            found, seconds = _timed(partial(self._chunk, many, answer))
        except Exception as error:  # torch.func has no class of errors of its own
            if _out_of_memory(error) and together_size > 1:
                asked = BackendSelection("vectorised", chunk, _LOOPED, "memory ran out at first")
                return self._at_once(inputs, answer, asked)
            looped = self._rest(inputs, answer, few)
            return looped, _fallen_back(chunk, _in_words(error))
        together = seconds / together_size
        apart = _apart(expected, found)
        if apart is None:
            reason = "no finite sample yet to compare by"
            return self._rest(inputs, answer, few), BackendSelection("loop", chunk, 0, reason)
        if not apart[0] <= apart[1]:
            cause = f"its outputs differ by {apart[0]:.2g}, where {apart[1]:.2g} may be rounding."
            return self._rest(inputs, answer, few), _fallen_back(chunk, cause)
        tried = min(together_size, _MOST)
        if auto and looping < together < _DOUBTFUL * looping:
            found, seconds = _timed(partial(self._chunk, many, answer))
            together = seconds / together_size
        slower = auto and looping < together
        reason = f"loop {1e3 * looping:.3g}, vectorised {1e3 * together:.3g} ms a sample, {tried}"
        reason = f"{reason} at once" if auto else "as asked for"
        backend: Literal["loop", "vectorised"] = "loop" if slower else "vectorised"
        selection = known or BackendSelection(backend, chunk, tried, reason)
        rest = range(together_size, size)
        if not rest:
            return found, selection
        if slower:
            return merged([found, self._looped(taken(inputs, rest), answer)]), selection
        others, selection = self._at_once(taken(inputs, rest), answer, selection)
        return merged([found, others]), selection

    def _why_loop(self) -> str | None:
        """Say why the loop is taken without a trial."""
        if self._settings.backend == "loop":
            return "as asked for"
        if self._fast is None:
            return "fast paths are turned off"
        if self._settings.norm_stats == "mixed":
            return "norm_stats='mixed' is not vectorised"
        if self._vectorised is None:
            return f"{type(self._settings.method).__name__} asks for further passes"
        return None

    def _rest(self, inputs: Any, answer: Answer, few: list[Adaptation]) -> Adaptation:
        """Adapt to the samples after the first few, one by one."""
        rest = range(len(few), batch_size(inputs))
        return merged([*few, *(self._one(inputs, index, answer) for index in rest)])

    def _chunk_size(self, inputs: Any) -> int:
        """Return how many samples are adapted to at once."""
        size = self._settings.chunk_size
        if size != "auto":
            return size
        assert self._fast is not None
        with self._fast.plain_attention(self._module, self._vectorised):
            count = partial(self._fast.bytes_kept, module=self._module)
            kept = self._alone.bytes_of_step(taken(inputs, range(1)), count)
        return int(self._fast.samples_at_once(self._settings, self.selected.values(), kept))


def _fallen_back(chunk_size: int, cause: str) -> BackendSelection:
    """Return the loop, for good, and warn why."""
    cause = " ".join(cause.split())[:300]
    warnings.warn(
        f"The network cannot be vectorised, so samples are adapted to one by one. {cause} "
        "(backend='loop' says so at once.)",
        stacklevel=2,
    )
    return BackendSelection("loop", chunk_size, _ALWAYS, f"cannot be vectorised: {cause}")


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"


def _out_of_memory(error: Exception) -> bool:
    """Whether an error says so: of an accelerator, of the CPU's allocator, of Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _apart(expected: Adaptation, found: Adaptation) -> tuple[float, float] | None:
    """Return by how much the outputs differ of samples that both have, and what is allowed."""
    count = min(expected.skipped.numel(), found.skipped.numel())
    kept = (expected.outputs, expected.source_outputs, found.outputs)
    theirs, source, mine = (t[:count] for t in kept if t is not None)
    finite = mine.isfinite() & theirs.isfinite() & source.isfinite()
    if not finite.any():
        return None
    mine, theirs, source = (t[finite].double() for t in (mine, theirs, source))
    moved = (theirs - source).abs().max()
    unit = _unit(expected.outputs, found.outputs)
    share = _MOVEMENT if unit < _LOW else _ROUGHLY
    allowed = torch.maximum(_rounding(theirs, unit), share * moved)
    return float((mine - theirs).abs().max()), float(allowed)


def _rounding(outputs: Tensor, unit: float) -> Tensor:
    """Return by how much outputs may differ that only rounding sets apart."""
    spread = outputs.std(correction=0) + 1e-3 * outputs.abs().mean() + 1e-12
    return min(_ROUNDING * unit, 0.05) * spread


def _unit(*outputs: Tensor | None) -> float:
    """Return the unit of rounding of the arithmetic that made these outputs."""
    units = [_LOW if t.device.type != "cpu" else 0.0 for t in outputs if t is not None]
    units += [torch.finfo(t.dtype).eps for t in outputs if t is not None]
    for device in {t.device.type for t in outputs if t is not None}:
        if torch.is_autocast_enabled(device):
            units.append(torch.finfo(torch.get_autocast_dtype(device)).eps)
    return max(units)


def _timed(run: Callable[[], Adaptation]) -> tuple[Adaptation, float]:
    """Return what comes of a run, and the seconds it took."""
    _wait()
    started = time.perf_counter()
    result = run()
    _wait()
    return result, time.perf_counter() - started


def _wait() -> None:
    """Wait until the accelerator has done what it was told."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


_WHICH = (
    "Taken as samples, by their number of rows, are the tensors of shape {}. Say what holds them: "
    "let it3_sample_dims(inputs) of the module, sample_dims of the engine, return for each tensor "
    "the dimension of its samples, None where all samples share it; or use scope='batch'."
)


def _objects(inputs: Any) -> list[Any]:
    """Return what is no tensor, and might be a batch of graphs."""
    leaves = leaves_of(inputs)
    return [leaf for leaf in leaves if not isinstance(leaf, Tensor | tuple) and leaf is not None]


def _named(inputs: Any, size: int) -> str:
    """Return the shapes of the tensors that are taken for samples."""
    return ", ".join(str(tuple(tensor.shape)) for tensor in candidates(inputs, size))


def _rounded(mine: Tensor, theirs: Tensor, whole: Tensor) -> bool:
    """Whether two rows of outputs differ by rounding alone."""
    finite = mine.isfinite() & theirs.isfinite()
    if not finite.any():
        return True
    mine, theirs, every = (t.double() for t in (mine[finite], theirs[finite], whole))
    return bool((mine - theirs).abs().max() <= _rounding(every[every.isfinite()], _unit(whole)))


_MEASURED: WeakKeyDictionary[nn.Module, dict[Any, BackendSelection]] = WeakKeyDictionary()
"""The selections that were measured of each module, by what was measured and under what."""


def _plainly(value: Any) -> Any:
    """Return what equal values have in common, and keep none of them alive.

    Functions and classes are themselves; dataclasses are equal where their fields are; what may
    change unseen equals nothing.
    """
    if value is None or isinstance(value, str | int | float):
        return type(value).__name__, value
    if isinstance(value, tuple | list):
        return tuple(map(_plainly, value))
    if isinstance(value, FunctionType | type):
        return ref(value)
    if is_dataclass(value):
        return ref(type(value)), *(_plainly(getattr(value, each.name)) for each in fields(value))
    return object()


def _itself(code: Any) -> Any:
    """Return what tells code from other code, and does not keep it alive."""
    try:
        return None if code is None else ref(code)
    except TypeError:
        return id(code)


def _tensors(layer: nn.Module) -> Iterator[Any]:
    """Yield what a layer's own parameters are like, whatever their values."""
    for each in vars(layer).get("_parameters", {}).values():
        yield None if each is None else (each.shape, each.dtype, each.device)


def _kind(leaf: Any) -> Any:
    """Return what inputs of a kind have in common, whatever their number."""
    if isinstance(leaf, Tensor):
        return leaf.shape[1:], leaf.dtype, leaf.device
    if isinstance(leaf, Shared):
        return leaf.tensor.shape, leaf.tensor.dtype
    if isinstance(leaf, Mapping):
        return tuple(leaf), tuple(map(_kind, tree_leaves(list(leaf.values()))))
    return ref(type(leaf))


def _state(layer: nn.Module) -> tuple[Any, ...]:
    """Return what a layer's code runs by: what is found of other code does not hold for it."""
    own = vars(layer)
    compiled = own.get("_compiled_call_impl") is not None
    hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks)
    return (
        ref(layer),
        layer.training,
        _itself(getattr(type(layer), "forward", None)),
        _itself(own.get("forward")),
        compiled,
        hooks,
        *_tensors(layer),
    )


def _empty(leaf: Any) -> Any:
    return leaf.new_empty(0) if isinstance(leaf, Tensor) else leaf
