"""What cannot differ is not computed twice: modules that finished early answer from a record.

The anchor sees the same inputs as the adapting network, so what it computes before the prior enters
is known already where its weights are those of the first pass. The same holds for a further first
pass up to the first adapting weight. Modules that finished before that moment put out what was
recorded; everything else runs. Where that would not be exact, nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from it3_lightning.engine.traces import Traces
from it3_lightning.selection import OWN

Enters = Mapping[str, Literal["input", "output"]]
Moment = Literal["prior", "weights"]

_PLAIN = (Tensor, int, float, str, type(None))


@dataclass(frozen=True)
class _Call:
    """A finished call of a module: its output, and the version of each tensor in it."""

    module: nn.Module
    output: Any
    versions: tuple[int, ...]


class Record:
    """Takes down the first pass over a batch and answers later passes from it.

    Args:
        module: whose submodules are recorded.
        enters: names of the submodules at whose input or output the prior enters; empty: unknown,
            then only what comes before the adapting weights is recorded.
        selected: the adapting parameters.
    """

    def __init__(
        self, module: nn.Module, enters: Enters, selected: Mapping[str, nn.Parameter]
    ) -> None:
        named = dict(module.named_modules(remove_duplicate=False))
        self._module = module
        self._wrapped = {m: self._wrap(m) for m in _recordable(module)}
        self._entries = {named[name]: where for name, where in enters.items()}
        self._known = bool(enters) and all(m in self._wrapped for m in self._entries)
        ids = {id(parameter) for parameter in selected.values()}
        self._adapting = {
            m for m in module.modules() if any(id(p) in ids for p in m.parameters(recurse=False))
        }
        self._patched: Sequence[nn.Module] = list(self._wrapped)
        self._probed = False
        self._written_into: set[nn.Module] = set()
        self._functional = False
        self.exact = True
        self.answered = 0
        self.clear()

    def clear(self) -> None:
        """Forget the last batch."""
        self._functional = False
        self._calls: list[_Call] = []
        self._before: dict[Moment, list[_Call]] = {}
        self._taken = False
        self._mode: Literal["take", "answer", "run"] = "run"
        self._cursor = 0

    def vectorised(self) -> Record | None:
        """Begin a pass inside ``torch.func``, where only what ordinary passes taught is known.

        Returns:
            The record, or ``None`` where no ordinary pass has been seen or recording is not exact.
        """
        if not (self._probed and self.exact):
            return None
        self.clear()
        self.answered = 0
        self._functional = True
        return self

    @contextmanager
    def first_pass(self, inputs: Any) -> Iterator[None]:
        """Take down the first pass; answer further ones up to where the adapting weights enter."""
        if not self.exact:
            yield
        elif self._taken:
            with self._answering(self._before.get("weights", [])):
                yield
        else:
            with self._taking(inputs):
                yield

    @contextmanager
    def second_pass(self, *, same: bool) -> Iterator[None]:
        """Answer the anchor's pass up to where the prior enters.

        Args:
            same: whether the anchor has the weights of the recorded pass; else only what comes
                before the adapting weights, too, is answered.
        """
        calls = self._before.get("prior", [])
        if not same:
            calls = min(calls, self._before.get("weights", []), key=len)
        with self._answering(calls if self.exact else []):
            yield

    @contextmanager
    def _taking(self, inputs: Any) -> Iterator[None]:
        if any(m.training and not isinstance(m, _BatchNorm) for m in self._module.modules()):
            yield  # dropout and the like: each pass draws its own
            return
        traces = None if self._functional else Traces(self._module, inputs, not self._probed)
        self._before = {} if self._known else {"prior": []}
        if (
            self._functional or not torch.is_grad_enabled()
        ):  # nothing tells what depends on the adapting weights
            self._close("weights")
        with self._installed("take"):
            yield
        self._before = {"prior": [], "weights": [], **self._before}
        self._taken = True
        if traces is None:
            return
        if not self._probed:
            self.exact = not traces.written()
            self._probed = True
            self._patched = self._useful()
        if not self.exact or traces.disturbed():
            self._before = {}
            self.exact = False

    @contextmanager
    def _answering(self, calls: Sequence[_Call]) -> Iterator[None]:
        """Answer these calls, except where an output was written into after its module finished."""
        if not self._functional:
            changed = {c.module for c in calls if _versions(c.output) != c.versions}
            self._written_into |= changed
        self._answers = [call for call in calls if call.module not in self._written_into]
        self._cursor = 0
        if not self._answers:
            yield
            return
        with self._installed("answer"):
            yield

    @contextmanager
    def _installed(self, mode: Literal["take", "answer"]) -> Iterator[None]:
        """Put the wrappers in the place of the modules' own ``forward``."""
        patched = [m for m in self._patched if "forward" not in vars(m)]
        for m in patched:
            vars(m)["forward"] = self._wrapped[m]
        self._mode = mode
        try:
            yield
        finally:
            self._mode = "run"
            for m in patched:
                del vars(m)["forward"]

    def _wrap(self, module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._mode == "answer":
                return self._answer(module, own, args, kwargs)
            if self._mode == "take":
                return self._take(module, own, args, kwargs)
            return own(*args, **kwargs)

        return forward

    def _answer(self, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._cursor == len(self._answers) or self._answers[self._cursor].module is not module:
            return own(*args, **kwargs)
        call = self._answers[self._cursor]
        self._cursor += 1
        self.answered += 1
        return tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, call.output)

    def _take(self, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        start = len(self._calls)
        if module in self._adapting:
            self._close("weights")
        where = self._entries.get(module)
        if where == "input":
            self._close("prior")
        output = own(*args, **kwargs)
        if len(self._before) == 2:
            return output
        if _needs_grad(output):
            self._close("weights")
        if all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(output)):
            self._calls[start:] = [_Call(module, output, _versions(output))]
        if where == "output":
            self._close("prior")
        return output

    def _close(self, moment: Moment) -> None:
        """Keep what has finished by now."""
        self._before.setdefault(moment, list(self._calls))

    def _useful(self) -> list[nn.Module]:
        """Return the modules that need to be watched from now on."""
        calls = [call.module for kept in self._before.values() for call in kept]
        return list(dict.fromkeys([*calls, *(m for m in self._entries if m in self._wrapped)]))


def _recordable(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the submodules, but not this library's own, nor what is inside compiled ones."""
    for name, child in module.named_children():
        if name.startswith(OWN) or isinstance(child, torch.jit.ScriptModule):
            continue
        yield child
        if not hasattr(child, "_orig_mod"):
            yield from _recordable(child)


def _needs_grad(output: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))


def _versions(output: Any) -> tuple[int, ...]:
    return tuple(leaf._version for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
