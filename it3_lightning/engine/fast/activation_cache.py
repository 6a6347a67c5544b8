"""Activation cache: outputs of layers in the first pass, reused where they cannot differ.

The anchor sees the same inputs as the adapting network. So what runs before the prior enters need
not run again where both passes have the same weights. The rule is a static one: reused are the
outermost modules that finish before the first layer where the prior enters, in a network that is in
evaluation mode and draws no random numbers. What a module keeps on itself, writes into its inputs,
or is watched for by hooks inside, is not reused.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from it3_lightning.engine.selection import OWN
from it3_lightning.engine.types import Enters

_DEPTH = 3  # of containers and objects inside attributes
_OF_TORCH = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
_OURS = tuple(f"{__package__}.{name}" for name in ("vmap", "grad_sample", "activation_cache"))
_PLAIN = (Tensor, int, float, str, type(None))


Marks = list[tuple[Any, Any]]
"""Objects, kept alive so that no other takes their address, and what else tells their state."""


def cache_for(module: nn.Module, enters: Enters) -> ActivationCache | None:
    """Return a cache, or ``None`` where nothing tells where the prior enters."""
    named = dict(module.named_modules(remove_duplicate=False))
    entries = {named[name]: where == "input" for name, where in enters.items() if name in named}
    return ActivationCache(module, entries) if entries and any(_reusable(module)) else None


@dataclass(frozen=True)
class _Output:
    """What a module put out, to be put out again."""

    leaves: list[Any]
    structure: TreeSpec
    versions: list[int]

    @classmethod
    def of(cls, output: Any) -> _Output | None:
        leaves, structure = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = all(isinstance(leaf, _PLAIN) for leaf in leaves)
        if not plain or any(tensor.is_inference() for tensor in tensors):
            return None
        return cls(leaves, structure, _versions(leaves))

    @property
    def intact(self) -> bool:
        """Whether nobody has written into it since."""
        return _versions(self.leaves) == self.versions

    def again(self, *, copied: bool) -> Any:
        """Return it without its graph; ``copied``: fit to be written into."""
        return tree_unflatten([_detached(leaf, copied) for leaf in self.leaves], self.structure)


@dataclass
class _Run:
    """One pass whose modules are watched.

    Args:
        entries: where the prior enters, and whether before the layer runs.
        finished: calls that have ended, the outermost only, before the prior entered.
        state: notes what the network keeps on itself.
        entered: the layers where the prior has entered.
        disturbed: whether a module leaves to others what they would miss.
        calls: of each module, by its ``id``: one that runs several times is not reused.
    """

    entries: dict[nn.Module, bool]
    state: Callable[[], Marks]
    finished: list[tuple[nn.Module, _Output | None]] = field(default_factory=list)
    entered: set[nn.Module] = field(default_factory=set)
    disturbed: bool = False
    calls: Counter[int] = field(default_factory=Counter)


class ActivationCache:
    """Answers a later pass over the same inputs from the first one.

    Args:
        module: whose layers.
        entries: the layers where the prior enters, and whether at their input.
    """

    def __init__(self, module: nn.Module, entries: dict[nn.Module, bool]) -> None:
        self._module = module
        self._entries = entries
        self._plans: dict[Any, tuple[nn.Module, ...]] = {}  # reused, by inputs and code
        self.hits = 0
        self.clear()

    def clear(self) -> None:
        """Forget the last inputs."""
        self._inputs: Any = None
        self._version: int | None = None
        self._outputs: dict[nn.Module, _Output] = {}
        self._left: dict[nn.Module, _Output] = {}  # of them, those not answered in this pass

    def first(self, inputs: Any, version: int, run: Callable[[], Any]) -> Any:
        """Run the first pass, and keep what layers put out, over these inputs by this version."""
        if inputs is self._inputs:
            return run()
        leaves, layers = tree_leaves(inputs), list(self._module.modules())
        if not (_ordinary(leaves) and _in_evaluation(layers)):
            return run()
        self.clear()
        key = tuple(map(_kind, leaves)), tuple(map(_state, layers[1:]))
        wrapped = any(map(_is_wrapped, leaves))
        plan = self._plans.get(key)
        if plan == () or (plan is None and wrapped):  # in torch.func nothing can be found out
            return run()
        before = None if wrapped else _outside(leaves)
        result = self._found(key, run) if plan is None else _run_patched(plan, self._keep, run)
        if before is not None and differ(before, _outside(leaves)):
            self._plans[key] = ()
            self._outputs = {}
        self._inputs, self._version = inputs, version
        return result

    def second(self, inputs: Any, version: int | None, run: Callable[[], Any]) -> Any:
        """Run another pass, with what was kept of these inputs by this version."""
        known = self._outputs if inputs is self._inputs and version == self._version else {}
        self._left = {module: output for module, output in known.items() if output.intact}
        if not self._left:
            return run()
        again = partial(self._again, list(self._left)[-1])
        return _run_patched(list(self._left), again, run)

    def _keep(self, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        kept = _Output.of(output)
        if kept is not None and module not in self._outputs:
            self._outputs[module] = kept
        return output

    def _again(
        self,
        last: nn.Module,
        module: nn.Module,
        own: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = self._left.pop(module, None)
        if output is None:  # it runs a second time
            return own(*args, **kwargs)
        self.hits += 1
        return output.again(copied=module is last)

    def _found(self, key: Any, run_pass: Callable[[], Any]) -> Any:
        """Find out, thoroughly and once, which modules can be reused for inputs of a kind."""
        run = _Run(self._entries, partial(noted, self._module))
        before, values = run.state(), _values(self._module)
        reusable = list(_reusable(self._module))
        watched = [*reusable, *(e for e in self._entries if e not in reusable)]
        result = _run_patched(watched, partial(_watch, run), run_pass)
        kept: dict[nn.Module, _Output] = {}
        same = all(map(torch.equal, values, _values(self._module)))
        if run.entered == set(self._entries) and same and not differ(before, run.state()):
            once = [(m, output) for m, output in run.finished if run.calls[id(m)] == 1]
            kept = {m: out for m, out in once if out is not None and m in reusable}
        self._plans[key] = () if run.disturbed else tuple(kept)
        self._outputs = {} if run.disturbed else kept
        return result


def _watch(run: _Run, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a call; note it if it ends before the prior enters, instead of those inside it."""
    if run.entries.get(module, False):
        run.entered.add(module)
    early = not run.entered
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    versions = _versions(given)
    before = run.state() if early and _own_code(module) else None
    place = len(run.finished)
    run.calls[id(module)] += 1  # torch 2.6 compiles no counter of modules
    output = own(*args, **kwargs)
    if not run.entered:
        run.disturbed |= before is not None and differ(before, run.state())
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in list(module.modules())[1:])
        if versions == _versions(given) and not hooked:
            del run.finished[place:]
            run.finished.append((module, _Output.of(output)))
    if module in run.entries:
        run.entered.add(module)
    return output


def _run_patched(
    modules: Iterable[nn.Module], forward: Callable[..., Any], run: Callable[[], Any]
) -> Any:
    """Run with ``forward(module, own forward, ...)`` in the place of each module's own."""
    patched = [m for m in modules if "forward" not in vars(m) and not _compiled(m)]
    for module in patched:
        vars(module)["forward"] = partial(forward, module, module.forward)
    try:
        return run()
    finally:
        for module in patched:
            vars(module).pop("forward", None)


def _reusable(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the submodules, but not this library's own, nor what is inside compiled ones.

    Nor metrics, which are modules whose hash changes with what they have counted.
    """
    if _compiled(module):
        return
    for name, child in module.named_children():
        if name.startswith(OWN) or isinstance(child, torch.jit.ScriptModule):
            continue
        if type(child).__hash__ is object.__hash__:
            if not _compiled(child):
                yield child
            yield from _reusable(child)


def _compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _in_evaluation(layers: Iterable[nn.Module]) -> bool:
    """Whether another pass would do the same: BatchNorm may look at the batch, dropout may not."""
    return not any(m.training and not isinstance(m, _BatchNorm) for m in layers)


def _own_code(module: nn.Module) -> bool:
    """Whether a module's forward is not torch's, which writes nothing that buffers do not show."""
    return not type(module).__module__.startswith("torch.nn.")


def noted(module: nn.Module) -> Marks:
    """Note every attribute of every submodule but this library's own, which each pass sets."""
    parts = [part for name, part in module.named_children() if name.startswith(OWN)]
    own = {id(m) for part in parts for m in part.modules()}
    marks: Marks = [(random, random.getstate())]
    for owner in module.modules():
        for name, value in vars(owner).items() if id(owner) not in own else ():
            if name not in _OF_TORCH and name != "forward":
                marks += ((each, (name, mark)) for each, mark in _marks(value, _DEPTH))
        if isinstance(owner, torch.jit.ScriptModule):
            marks += _script_marks(owner)
    return marks


def differ(before: Marks, after: Marks) -> bool:
    """Whether two notes are of different states."""
    pairs = zip(before, after, strict=False)
    return len(before) != len(after) or any(a is not b or x != y for (a, x), (b, y) in pairs)


def _marks(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Note a value and, to a depth, what is inside."""
    if isinstance(value, Tensor):
        yield value, -1 if value.is_inference() else value._version
    elif isinstance(value, torch.Generator):
        yield value, value.get_state().numpy().tobytes()
    elif isinstance(value, nn.Module):
        yield value, None
    else:
        inside = _inside(value) if depth else []
        yield value, len(inside)
        for item in inside:
            yield from _marks(item, depth - 1)


def _script_marks(module: Any) -> Marks:
    """Note what a scripted module keeps on itself: it lies outside of Python, which gets copies."""
    names = module._concrete_type.get_attributes()
    leaves = tree_leaves([getattr(module, name) for name in names])
    return [(leaf, leaf._version) if isinstance(leaf, Tensor) else (None, leaf) for leaf in leaves]


def _inside(value: Any) -> list[Any]:
    """Return what a container holds, or an object in its attributes; not what runs the network."""
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    runs_it = type(value).__module__.startswith(("lightning.", "pytorch_lightning."))
    if runs_it or isinstance(value, type | ModuleType):
        return []
    return list(getattr(value, "__dict__", {}).values())


def _values(module: nn.Module) -> list[Tensor]:
    """Copy the values of the buffers, as bytes: writing into ``.data`` counts no version."""
    return [
        buffer.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        for buffer in module.buffers()
        if buffer.layout == torch.strided and not buffer.is_quantized
    ]


def _outside(leaves: list[Any]) -> Marks:
    """Note the random state, and inputs that are objects, which a pass may write into."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state())
    objects = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    marks: Marks = [(None, state.numpy().tobytes()) for state in states]
    return [*marks, *(mark for leaf in objects for mark in _marks(leaf, _DEPTH))]


def _ordinary(leaves: list[Any]) -> bool:
    return not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves)


def _kind(leaf: Any) -> Any:
    """Return what inputs of a kind have in common, whatever their number."""
    if isinstance(leaf, Tensor):
        return leaf.shape[1:], leaf.dtype, leaf.device
    return type(leaf)


def _state(layer: nn.Module) -> tuple[Any, ...]:
    """Return what a layer's code runs by: what is found of other code does not hold for it."""
    patch = vars(layer).get("forward")
    own = None if isinstance(patch, partial) else patch  # ours are partial functions
    theirs = 0
    if layer._forward_hooks or layer._forward_pre_hooks:
        hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
        theirs = sum(getattr(hook, "__module__", None) not in _OURS for hook in hooks)
    code = getattr(type(layer), "forward", None)
    return id(layer), layer.training, code, id(own), _compiled(layer), theirs


def _is_wrapped(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf)


def _versions(leaves: Iterable[Any]) -> list[int]:
    return [t._version for t in leaves if isinstance(t, Tensor) and not t.is_inference()]


def _detached(leaf: Any, copied: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone() if copied else leaf.detach()
