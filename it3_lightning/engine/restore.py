"""Restore: what a module was, its norm statistics and the random state; undone however it ends.

Parameters are held by reference, not copied: adaptation puts *other* storage behind a parameter, so
putting the first one back is exact and costs nothing. What a network may write into (buffers,
tensors and containers among its attributes, random generators of its own) is copied.

Everything is put back by functions that can run again and again. They are handed to :class:`Undo`
before the change that they undo, so that an interruption, wherever it comes, loses none of them.
"""

from __future__ import annotations

import ctypes
import operator
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
)

from it3_lightning.engine.types import Isolation, NormStats

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}  # parameters, buffers, submodules, hooks
_HOOKS = frozenset(name for name in _OF_TORCH if "hook" in name)
_RUNS_IT = {"_trainer", "_fabric"}  # references from a module to what runs it
_NOT_LOOKED_INTO = _OF_TORCH | _RUNS_IT
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.device, torch.dtype})
_DEPTH = 4  # of containers and objects inside attributes
_FEW = 64  # items of a container that are looked into: longer ones collect results
_MANY = 10_000  # items of a container that are copied, unless it is an attribute of a module
_LARGE = 1 << 24  # bytes of a tensor or array that are copied: larger ones are data
_CONTAINERS = (list, dict, set, deque)
_LIBRARIES = sys.stdlib_module_names | {
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "torchvision",
    "numpy",
}


Draws = Callable[[], frozenset[str] | None]
"""Returns the names of the generators that passes draw from; ``None``: it may be any."""


class Undo:
    """What is to be put back, the latest first, however often that is tried.

    >>> done = []
    >>> with Undo() as undo:
    ...     undo.add(lambda: done.append("put back"))
    >>> done  # the body ended: it has put back what it had to
    []
    >>> undo.add(lambda: done.append("put back"))
    >>> undo.run(), undo.run(), done
    (None, None, ['put back'])
    """

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []

    def begin(self) -> Undo:
        """Put back what was left over, and return what a generator registers in, apart from it.

        One that is closed late, because a traceback kept it alive, finds that empty.
        """
        self.run()
        begun = Undo()
        self.add(begun.run)
        return begun

    def __enter__(self) -> Self:
        """Put back what was left over."""
        self.run()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Put everything back where the body was cut short."""
        if kind is not None:
            self.run()
        self.end()

    def end(self, *actions: Callable[[], object]) -> None:
        """Put back by these actions instead, and forget the others."""
        for action in actions:
            action()
        self._actions.clear()

    def add(self, action: Callable[[], object]) -> None:
        """Register what undoes a change, before the change; it must be able to run twice."""
        self._actions.append(action)

    def run(self) -> None:
        """Put everything back; what is interrupted is done again in the next run."""
        while self._actions:
            self._actions[-1]()
            self._actions.pop()


class Snapshot:
    """What a module was, to be put back bit for bit.

    Parameters, gradients and attributes are kept by reference; what is in buffers, and in tensors,
    arrays, containers and generators among the attributes, by value.

    Args:
        module: of which everything is noted, and of modules that it keeps unregistered.

    >>> layer = nn.Linear(1, 1)
    >>> before = layer.weight.item()
    >>> snapshot = Snapshot(layer)
    >>> layer.weight.data = torch.ones(1, 1)
    >>> snapshot.restore()
    >>> layer.weight.item() == before
    True
    """

    def __init__(self, module: nn.Module) -> None:
        owners, kept, self._made_in_inference = _kept_by(module)
        self._attributes = [(owner, dict(vars(owner))) for owner in owners]
        self._registered = [(owner, dict(owner._parameters), _hooks(owner)) for owner in owners]
        self._computed = [each for o, named, _ in self._registered for each in _computed(o, named)]
        registered = [p for _, named, _ in self._registered for p in named.values()]
        unique = {id(p): p for p in registered if p is not None}
        self.parameters: list[nn.Parameter] = list(unique.values())
        self._saved = [(p, p.data, p.requires_grad, p.grad) for p in self.parameters]
        self._buffers = [(owner, dict(owner._buffers), _copies(owner._buffers)) for owner in owners]
        self._contents = [(each, _copied(each)) for each in kept]
        self._random = RandomState()
        self.draws: frozenset[str] | None = None
        self.drawn = False

    def restore(self) -> None:
        """Put everything back, outside inference mode, so that no inference tensor stays."""
        self.restore_attributes()
        for owner, parameters, hooks in self._registered:
            if isinstance(owner._parameters, dict):
                _refill(owner._parameters, parameters)
            for name in _HOOKS:
                now = vars(owner).get(name)
                if isinstance(now, dict):
                    _refill(now, hooks.get(name, {}))
        with torch.inference_mode(False):
            self.restore_parameters()
            self.restore_written()
        self.restore_random()
        stop_watching()
        torch.clear_autocast_cache()

    def undo_passes(self) -> None:
        """Put back what passes have drawn and written, but not the parameters."""
        self.restore_random()
        self.restore_written()
        self.restore_attributes()
        self.restore_flags()
        torch.clear_autocast_cache()

    @property
    def disturbed(self) -> bool:
        """Whether anybody has drawn random numbers since."""
        return bool(self._random.drawn())

    def restore_random(self) -> None:
        """Put the generators back that passes have drawn from, and note whether any has."""
        self.drawn |= self._random.restore(self.draws)

    def detach_parameters(self) -> None:
        """Let no parameter need a gradient or have one, until it is put back."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    def restore_attributes(self) -> None:
        """Put back each attribute that was set, replaced or removed, and so every mode."""
        for owner, before in self._attributes:
            now = vars(owner)
            if _same(now, before):
                continue
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)

    def restore_weights(self) -> None:
        """Put the parameters back, and each submodule into training or evaluation mode."""
        self.restore_parameters()
        for owner, before in self._attributes:
            mode = before.get("training")  # a compiled module keeps it elsewhere
            if mode is not None and owner.training is not mode:
                owner.training = mode
        torch.clear_autocast_cache()

    def restore_parameters(self) -> None:
        """Put the first storage back behind each parameter, with its flags and its gradient."""
        for parameter, data, _, _ in self._saved:
            parameter.data = data
        self.restore_flags()
        for owner, name, value in self._computed:
            vars(owner)[name] = value

    def restore_flags(self) -> None:
        """Put back ``requires_grad`` and ``.grad`` of each parameter."""
        for parameter, _, requires_grad, gradient in self._saved:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    def restore_written(self, *, norms: bool = True) -> None:
        """Put each buffer back, and what was written into buffers and attributes.

        Args:
            norms: also the buffers of normalisation layers.
        """
        into: list[Tensor] = []
        values: list[Tensor] = []
        for owner, tensors, copies in self._buffers:
            now = owner._buffers
            if not (now or tensors) or (not norms and isinstance(owner, _NormBase)):
                continue
            if isinstance(now, dict):  # those of scripted modules are not: their tensors stay
                for name in [name for name in now if name not in tensors]:
                    del now[name]
                now.update(tensors)
            into += [tensor for n, tensor in tensors.items() if n in copies and tensor is not None]
            values += copies.values()
        for each, copy in self._contents:
            if isinstance(each, Tensor):
                into.append(each)
                values.append(copy)
            else:
                _refill(each, copy)
        if into:
            _write(into, values)

    def replace_inference_tensors(self) -> None:
        """Let the module keep ordinary tensors for those of inference mode, until it is restored.

        A table that a network made in an ordinary test, and keeps, could not be part of a graph.
        """
        for owner, tensors, _ in self._buffers:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    owner._buffers[name] = tensor.clone()
        for keeper, key, tensor in self._made_in_inference:
            keeper[key] = tensor.clone()


Kept = tuple[list[nn.Module], list[Any], list[tuple[Any, Any, Tensor]]]
"""Modules; what else may be written into; where tensors of inference mode are, and these."""


def _kept_by(module: nn.Module) -> Kept:
    """Return all that a module keeps: registered, in attributes, and inside of these."""
    found: Kept = (list(module.modules()), [], [])
    owners, seen = found[0], set(map(id, found[0]))
    for owner in owners:  # which grows meanwhile
        attributes = vars(owner)
        for name in [name for name in attributes if name not in _NOT_LOOKED_INTO]:
            value = attributes[name]
            if type(value) not in _PLAIN:
                _look_into(value, attributes, name, _DEPTH, found, seen)
    return found


def _look_into(value: Any, keeper: Any, key: Any, depth: int, found: Kept, seen: set[int]) -> None:
    """Note a value that may be written into, and, to a depth, what is inside."""
    if type(value) in _PLAIN or id(value) in seen:
        return
    seen.add(id(value))
    owners, written, made_in_inference = found
    if isinstance(value, tuple | frozenset):
        nothing = len(value) > _FEW or _PLAIN.issuperset(map(type, value))
        for inner in () if nothing else value:
            _look_into(inner, value, None, depth - 1, found, seen)
    elif isinstance(value, Tensor):
        if isinstance(value, nn.Parameter):
            return
        if value.is_inference() and isinstance(keeper, dict | list):
            made_in_inference.append((keeper, key, value))
        if _writable(value) and value.numel() * value.element_size() <= _LARGE:
            written.append(value)
    elif isinstance(value, np.ndarray):
        if value.nbytes <= _LARGE and value.flags.writeable:
            written.append(value)
    elif isinstance(value, nn.Module):
        new = [m for m in value.modules() if m is value or id(m) not in seen]
        seen.update(map(id, new))
        owners += new
    elif isinstance(value, _CONTAINERS):
        if depth == _DEPTH or len(value) <= _MANY:
            written.append(value)
        if depth and len(value) <= _FEW:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for inner_key, inner in list(pairs):
                _look_into(inner, value, inner_key, depth - 1, found, seen)
    elif _is_generator(value):
        written.append(value)
    elif depth and _is_own_object(value):
        _look_into(vars(value), None, None, depth - 1, found, seen)


def _is_generator(value: Any) -> bool:
    """Whether it draws random numbers; of Python's told by name, so that dynamo can follow."""
    python = hasattr(value, "getstate") and hasattr(value, "setstate")
    return python or isinstance(value, torch.Generator | np.random.Generator)


def _is_own_object(value: Any) -> bool:
    """Whether an object is of a class of the user's, with attributes of its own."""
    if isinstance(value, type | ModuleType | FunctionType) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in _LIBRARIES


def _copied(each: Any) -> Any:
    """Return a copy of what an object holds, for :func:`_refill`."""
    if isinstance(each, Tensor):
        return each.detach().clone()
    if isinstance(each, torch.Generator):
        return each.get_state()
    if isinstance(each, np.random.Generator):
        return each.bit_generator.state
    return each.copy() if hasattr(each, "copy") else each.getstate()


def _refill(each: Any, copy: Any) -> None:
    """Let an object hold what it held; others may hold the object too."""
    if isinstance(each, torch.Generator):
        each.set_state(copy)
    elif isinstance(each, np.random.Generator):
        each.bit_generator.state = copy
    elif hasattr(each, "setstate"):
        each.setstate(copy)
    elif isinstance(each, np.ndarray):
        each[...] = copy
    elif not _same(each, copy):
        each.clear()
        each.extend(copy) if isinstance(each, list | deque) else each.update(copy)


def _same(now: Any, before: Any) -> bool:
    """Whether a container holds the same objects, in the same order."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        same = all(map(operator.is_, now.values(), before.values()))
        return same and list(now) == list(before)
    if isinstance(now, set):
        return bool(now == before)
    return all(map(operator.is_, now, before))


def _computed(owner: nn.Module, parameters: Iterable[str]) -> list[tuple[nn.Module, str, Any]]:
    """Return the weights that hooks compute of parameters, as ``weight_norm`` and pruning do."""
    of = [name.rpartition("_")[0] for name in parameters if name.endswith(("_orig", "_g"))]
    return [(owner, name, vars(owner)[name]) for name in of if name in vars(owner)]


def _hooks(owner: nn.Module) -> dict[str, dict[Any, Any]]:
    """Return the hooks of each kind that there are."""
    own = vars(owner)
    if not any(map(own.get, _HOOKS)):
        return {}
    found = [(name, own[name]) for name in _HOOKS if own.get(name)]
    return {name: dict(value) for name, value in found if isinstance(value, dict)}


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    given = buffers.items()
    return {k: t.detach().clone() for k, t in given if t is not None and _writable(t)}


def _writable(tensor: Tensor) -> bool:
    """Whether it can be written in place: not where elements share memory, as after ``expand``."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return True
    shape = zip(tensor.shape, tensor.stride(), strict=True)
    return all(stride > 0 or size <= 1 for size, stride in shape)


def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Write values into tensors, of which a graph may be made already."""
    plain = not any(t.is_inference() or t.layout != torch.strided for t in tensors)
    if plain:
        torch._foreach_copy_([tensor.data for tensor in tensors], values)
    for tensor, copy in zip(tensors, values, strict=True) if not plain else ():
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(copy)


class RandomState:
    """The state of the process's random generators: torch's, Python's and NumPy's.

    >>> state = RandomState()
    >>> first = torch.rand(1), random.random(), np.random.rand()
    >>> state.restore()
    True
    >>> first == (torch.rand(1), random.random(), np.random.rand())
    True
    """

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda: Tensor | None = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._cuda = torch.cuda.get_rng_state()
        self._python = random.getstate()
        self._numpy = _state_of_numpy()

    def restore(self, names: frozenset[str] | None = None) -> bool:
        """Put generators back, and say whether any had been drawn from.

        Args:
            names: of those that may be put back; default: all.
        """
        drawn = self.drawn() if names is None else self.drawn() & names
        if "torch" in drawn:
            torch.set_rng_state(self._torch)
        if "cuda" in drawn and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        if "python" in drawn:
            random.setstate(self._python)
        if "numpy" in drawn:
            np.random.set_state(self._numpy)
        return bool(drawn)

    def drawn(self) -> frozenset[str]:
        """Return the names of the generators that have been drawn from since, by whomever."""
        cuda = self._cuda
        same = {
            "torch": torch.equal(self._torch, torch.get_rng_state()),
            "cuda": cuda is None or torch.equal(cuda, torch.cuda.get_rng_state()),
            "python": self._python == random.getstate(),
            "numpy": self._numpy is _state_of_numpy(),
        }
        return frozenset(name for name, equal in same.items() if not equal)


_last_of_numpy: tuple[bytes, Any] = (b"", None)


def _state_of_numpy() -> Any:
    """Return the state of NumPy's generator; the same object while nothing has been drawn.

    To ask for it takes as long as a pass through a small network, so its memory is looked at first.
    """
    global _last_of_numpy
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if not isinstance(generator, np.random.MT19937):
        return np.random.get_state()
    memory = ctypes.string_at(generator.ctypes.state_address, _BYTES_OF_MT19937)
    if memory != _last_of_numpy[0]:
        _last_of_numpy = memory, np.random.get_state()
    return _last_of_numpy[1]


_BYTES_OF_MT19937 = 4 * 624 + 4  # its words and the place in them


def generators_drawn_by(run: Callable[[], object]) -> frozenset[str]:
    """Return the names of the generators that a pass draws from, while other threads may draw too.

    >>> generators_drawn_by(lambda: nn.functional.dropout(torch.ones(2))) >= {"torch"}
    True
    """
    before = RandomState()
    with _Drawn() as watched:
        run()
    of_torch = {"torch", "cuda"}
    return before.drawn() - of_torch | (of_torch if watched.drawn else set())


def stop_watching() -> None:
    """Take off what watches the passes of this thread, where an interruption has left it on.

    These are hooks for the tensors that autograd saves, and modes that see every operation; those
    of others stay. Before torch 2.8 nothing tells which hooks there are.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    while (hooks := top(False)) is not None and _is_ours(hooks[1]):
        torch._C._autograd._pop_saved_tensors_default_hooks()
    while (modes := _get_current_dispatch_mode_stack()) and _is_ours(type(modes[-1])):
        _pop_mode()


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


class _Drawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether operations of this thread draw random numbers."""

    drawn = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class undisturbed_rng:  # noqa: N801  # read as a context
    """Puts the random generators back on leaving.

    >>> before = torch.get_rng_state()
    >>> with undisturbed_rng():
    ...     _ = torch.rand(3)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """

    def __enter__(self) -> None:
        """Note their states."""
        self._state = RandomState()

    def __exit__(self, *_: object) -> None:
        """Put them back."""
        self._state.restore()


class without_side_effects:  # noqa: N801  # read as a context, beside torch's
    """Undoes what passes within write and draw.

    A class, as all contexts here that put something back: what a generator has changed would stay
    where an interruption comes as it begins. Passes need ``torch.inference_mode(False)`` and
    ``torch.enable_grad()`` around it.

    Args:
        snapshot: of the module that runs within.
        isolation: undoes what else its passes do, as logging.
        draws: finds out which generators passes draw from; asked where numbers were drawn and other
            threads may have drawn them: put back, theirs would come again.
    """

    def __init__(
        self, snapshot: Snapshot, isolation: Isolation = nullcontext, draws: Draws | None = None
    ) -> None:
        self._snapshot = snapshot
        self._isolation = isolation
        self._draws = draws

    def __enter__(self) -> None:
        """Begin."""
        self._among_others = threading.active_count() > 1
        try:
            self._snapshot.replace_inference_tensors()
            self._isolated = self._isolation()
            self._isolated.__enter__()
        except BaseException:
            self._snapshot.undo_passes()
            raise

    def __exit__(self, *_: object) -> None:
        """Put back what was written and drawn."""
        snapshot = self._snapshot
        try:
            others = self._among_others or threading.active_count() > 1
            if self._draws is not None and others and snapshot.disturbed:
                snapshot.draws = self._draws()
            snapshot.undo_passes()
        finally:
            self._isolated.__exit__(None, None, None)


class counted_once:  # noqa: N801  # read as a context
    """Puts back what passes within count: attributes, what is in them, and buffers.

    Buffers of normalisation layers are not put back: each pass of training is seen by them.

    >>> layer = nn.Linear(1, 1)
    >>> layer.seen = [1]
    >>> with counted_once(layer):
    ...     layer.seen.append(2)
    >>> layer.seen
    [1]
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        """Note what there is."""
        self._snapshot = Snapshot(self._module)

    def __exit__(self, *_: object) -> None:
        """Put it back."""
        self._snapshot.restore_written(norms=False)
        self._snapshot.restore_attributes()


class NormStatistics:
    r"""Lets BatchNorm layers normalise by the batch at hand; running statistics are never written.

    Args:
        module: whose BatchNorm layers.
        norm_stats: ``"source"`` leaves them as they are; ``"batch"`` uses the current batch;
            ``"mixed"`` both, :math:`\bar\mu = \frac{N}{N + n} \mu_s + \frac{n}{N + n} \mu_t` and
            likewise the variances, of :math:`n` samples (Schneider et al., NeurIPS 2020, eq. 3);
            ``"evidence"``: those that :mod:`it3_lightning.engine.evidence` puts in their place.
        undo: is given :meth:`restore` before anything is changed.
        prior: the number of samples ``N`` that the source's statistics count as.
    """

    def __init__(
        self, module: nn.Module, norm_stats: NormStats, undo: Undo, prior: int = 16
    ) -> None:
        layers = batch_norms(module) if norm_stats != "source" else []
        self._before = [(layer, layer.training, layer.track_running_stats) for layer in layers]
        self._mixed = layers if norm_stats == "mixed" else []
        held = layers if norm_stats == "evidence" else []
        self._buffers = [(layer._buffers, dict(layer._buffers)) for layer in held]
        undo.add(self.restore)
        for layer in self._mixed:
            layer.forward = partial(_mixed_norm, layer, prior)  # type: ignore[method-assign]
        for layer in layers if norm_stats == "batch" else ():
            layer.training, layer.track_running_stats = True, False

    def restore(self) -> None:
        """Put the layers' modes back."""
        for layer, training, tracking in self._before:
            layer.training, layer.track_running_stats = training, tracking
        for layer in self._mixed:
            vars(layer).pop("forward", None)
        for buffers, before in self._buffers:
            buffers.update(before)


def _mixed_norm(layer: _BatchNorm, prior: int, values: Tensor) -> Tensor:
    """Normalise by the statistics of the source, which count as ``prior`` samples, and a batch."""
    if layer.running_mean is None or layer.running_var is None:  # it has none: those of the batch
        return type(layer).forward(layer, values)
    over = [dim for dim in range(values.ndim) if dim != 1]
    var, mean = torch.var_mean(values, over, correction=0)
    share = len(values) / (prior + len(values))
    mean = torch.lerp(layer.running_mean, mean.to(layer.running_mean), share)
    var = torch.lerp(layer.running_var, var.to(layer.running_var), share)
    scale = (var + layer.eps).rsqrt()  # functional.batch_norm takes statistics without a graph
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    shape = [1, -1, *(1 for _ in over[1:])]
    return torch.addcmul(shift.view(shape).to(values), values, scale.view(shape).to(values))


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of a module, of any dimension."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
