"""The calls of submodules in a pass: taken down in one, answered by their place in another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from it3_lightning.selection import OWN

Place = tuple[int, ...]
"""Where in a pass a call is: its index among those of its caller, from the network down."""

_PLAIN = (Tensor, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class Call:
    """A finished call of a module.

    Args:
        module: that was called.
        place: where in the pass.
        leaves: of what it put out.
        structure: of the same; lists and dicts may be changed by whoever got them.
        versions: of the tensors among the leaves, to tell later whether they were written into.
    """

    module: nn.Module
    place: Place
    leaves: tuple[Any, ...]
    structure: TreeSpec
    versions: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, place: Place, output: Any) -> Call | None:
        """Return the call, or ``None`` where its output cannot be put out a second time."""
        leaves, structure = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(isinstance(leaf, _PLAIN) for leaf in leaves):
            return None
        if any(tensor.is_inference() for tensor in tensors):  # have no versions
            return None
        return cls(module, place, tuple(leaves), structure, _versions(leaves))

    @property
    def written_into(self) -> bool:
        """Whether the output was changed since."""
        return _versions(self.leaves) != self.versions

    def output(self, *, copied: bool) -> Any:
        """Return what was put out, without its graph; ``copied``: fit to be written into."""
        leaves = [_without_graph(leaf, copied=copied) for leaf in self.leaves]
        return tree_unflatten(leaves, self.structure)


class Calls:
    """Stands in for the ``forward`` of submodules during passes.

    Args:
        module: whose submodules.
        begun: told of a call that begins, in a pass that is taken down.
        finished: told of one that ends: the module, its place, its output.
    """

    def __init__(
        self,
        module: nn.Module,
        begun: Callable[[nn.Module], None],
        finished: Callable[[nn.Module, Place, Any], None],
    ) -> None:
        self._begun = begun
        self._finished = finished
        self._wrapped = {m: self._wrap(m) for m in recordable(module)}
        self._mode: Literal["take", "answer", "run"] = "run"
        self._answers: dict[Place, Call] = {}
        self._copied: Call | None = None
        self._place = [0]
        self.watched: Iterable[nn.Module] = list(self._wrapped)
        self.answered = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Tell of all calls of the watched modules within."""
        with self._installed("take"):
            yield

    @contextmanager
    def answering(self, calls: Iterable[Call], *, copied: Call | None) -> Iterator[None]:
        """Answer these calls within.

        Args:
            calls: of an earlier pass that was the same up to their ends.
            copied: the one whose output may be written into.
        """
        self._answers = {call.place: call for call in calls}
        self._copied = copied
        if not self._answers:
            yield
            return
        with self._installed("answer"):
            yield

    @contextmanager
    def _installed(self, mode: Literal["take", "answer"]) -> Iterator[None]:
        """Put the wrappers in the place of the modules' own ``forward``."""
        patched = [m for m in self.watched if m in self._wrapped and _patchable(m)]
        for m in patched:
            vars(m)["forward"] = self._wrapped[m]
        self._mode, self._place = mode, [0]
        try:
            yield
        finally:
            self._mode, self._answers, self._copied = "run", {}, None
            for m in patched:
                vars(m).pop("forward", None)

    def _wrap(self, module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._mode == "run":
                return own(*args, **kwargs)
            place = tuple(self._place)
            call = self._answers.get(place) if self._mode == "answer" else None
            if call is not None and call.module is module:
                self._place[-1] += 1
                self.answered += 1
                return call.output(copied=call is self._copied)
            return self._ran(module, place, lambda: own(*args, **kwargs))

        return forward

    def _ran(self, module: nn.Module, place: Place, run: Callable[[], Any]) -> Any:
        """Run a call, and tell of it in a pass that is taken down."""
        taking = self._mode == "take"
        self._place.append(0)
        try:
            if taking:
                self._begun(module)
            output = run()
        finally:
            self._place.pop()
            self._place[-1] += 1
        if taking:
            self._finished(module, place, output)
        return output


def recordable(module: nn.Module) -> Iterator[nn.Module]:
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
            yield from recordable(child)


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _patchable(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not _compiled(module)


def _versions(leaves: Iterable[Any]) -> tuple[int, ...]:
    return tuple(leaf._version for leaf in leaves if isinstance(leaf, Tensor))


def _without_graph(leaf: Any, *, copied: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone() if copied else leaf.detach()
