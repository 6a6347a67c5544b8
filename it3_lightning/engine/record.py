"""What cannot differ is not computed twice: modules that finished early answer from a record.

The anchor sees the same inputs as the adapting network, so what it computes before the prior enters
is known already where its weights are those of the first pass. The same holds for a further first
pass up to the first adapting weight. Modules that finished before that moment put out what was
recorded; everything else runs. Where that would not be exact, nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from it3_lightning.engine.calls import Call, Calls, Place, recordable
from it3_lightning.engine.traces import Marks, Traces, differ, state
from it3_lightning.engine.uses import told_of_uses

Enters = Mapping[str, Literal["input", "output"]]
Moment = Literal["prior", "weights"]

_MOMENTS: tuple[Moment, ...] = ("prior", "weights")


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
        ids = {id(parameter) for parameter in selected.values()}
        self._module = module
        self._selected = list(selected.values())
        self._calls = Calls(module, self._begun, self._finished)
        inputs_last = sorted(enters.items(), key=lambda entry: entry[1] == "input")
        self._entries = {named[name]: where for name, where in inputs_last}  # which come first
        self._owners = [
            m for m in module.modules() if any(id(p) in ids for p in m._parameters.values())
        ]
        self._inside = {m: tuple(m.modules())[1:] for m in recordable(module)}
        self._readable = {module, *self._inside}
        self._useful: list[nn.Module] | None = None
        self._probed = False
        self._written_into: set[nn.Module] = set()
        self.exact = bool(self._inside)
        self.clear()

    @property
    def answered(self) -> int:
        """Calls that were answered since this was last set to 0."""
        return self._calls.answered

    @answered.setter
    def answered(self, count: int) -> None:
        self._calls.answered = count

    def clear(self) -> None:
        """Forget the last batch."""
        self._functional = False
        self._finished_calls: list[Call] = []
        self._before: dict[Moment, list[Call]] = {}
        self._entered: set[nn.Module] = set()
        self._states: list[Marks | None] = []
        self._traces: Traces | None = None
        self._taken = False
        if self._useful is not None:
            self._calls.watched = self._useful

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
            with self._answering(self._before["weights"]):
                yield
        elif self._repeatable(inputs):
            with self._taking(inputs):
                yield
        else:
            yield

    @contextmanager
    def second_pass(self, *, same: bool) -> Iterator[None]:
        """Answer the anchor's pass up to where the prior enters.

        Args:
            same: whether the anchor has the weights of the recorded pass; else only what comes
                before the adapting weights, too, is answered.
        """
        if not (self.exact and self._taken):
            yield
            return
        earlier = next(iter(self._before))
        with self._answering(self._before["prior" if same else earlier], prior=True):
            yield

    def _repeatable(self, inputs: Any) -> bool:
        """Whether another pass would do the same: not with dropout, nor where writes go unseen."""
        if any(m.training and not isinstance(m, _BatchNorm) for m in self._module.modules()):
            return False
        leaves = tree_leaves(inputs)
        return not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves)

    @contextmanager
    def _taking(self, inputs: Any) -> Iterator[None]:
        traces = None if self._functional else Traces(self._module, inputs, not self._probed)
        if not self._entries:
            self._close("prior")
        with ExitStack() as stack:
            if self._functional or not torch.is_grad_enabled():
                self._close("weights")  # nothing tells what depends on them
            elif not self._readable.issuperset(self._owners):
                self._close("weights")
            else:
                stack.enter_context(
                    told_of_uses(self._owners, self._selected, lambda: self._close("weights"))
                )
            stack.enter_context(self._calls.taken())
            yield
        if self._entered != set(self._entries):  # it may enter earlier, where it is not seen
            self._before.pop("prior", None)
        for moment in _MOMENTS:
            if moment not in self._before:
                self._before = {moment: [], **self._before}
        self._taken = True
        if traces is not None:
            self._judge(traces)

    def _judge(self, traces: Traces) -> None:
        """Find out whether the pass can be recorded, thoroughly after the first."""
        if not self._probed:
            self.exact &= not traces.written()
            self._probed = True
        self.exact &= not traces.disturbed()
        self._traces = traces
        self._finished_calls = []
        if self._useful is None and torch.is_grad_enabled():
            calls = [call.module for kept in self._before.values() for call in kept]
            self._useful = list(dict.fromkeys([*calls, *self._entries]))

    @contextmanager
    def _answering(self, calls: Sequence[Call], *, prior: bool = False) -> Iterator[None]:
        """Answer these calls, except where an output was written into after its module finished."""
        if not self._functional:
            if self._traces is not None and self._traces.spoilt():
                self.exact, calls = False, []
            self._written_into |= {call.module for call in calls if call.written_into}
        kept = [call for call in calls if call.module not in self._written_into]
        with self._calls.answering(kept, copied=kept[-1] if kept and prior else None):
            yield

    def _begun(self, module: nn.Module) -> None:
        if self._entries.get(module) == "input":
            self._enter(module)
        watched = len(self._before) < 2 and not self._probed and _own_code(module)
        self._states.append(state(self._module) if watched else None)

    def _finished(self, module: nn.Module, place: Place, output: Any) -> None:
        before = self._states.pop()
        if len(self._before) < 2:
            if before is not None and differ(before, state(self._module)):
                self.exact = False  # it leaves to others what they would miss
            if _needs_grad(output):
                self._close("weights")
            self._keep(module, place, output)
        if self._entries.get(module) == "output":
            self._enter(module)

    def _keep(self, module: nn.Module, place: Place, output: Any) -> None:
        """Keep a call instead of those inside it, unless hooks of theirs would miss it."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in self._inside[module]):
            return
        call = Call.of(module, place, output)
        if call is None:
            return
        while self._finished_calls and self._finished_calls[-1].place[: len(place)] == place:
            self._finished_calls.pop()
        self._finished_calls.append(call)

    def _enter(self, module: nn.Module) -> None:
        self._entered.add(module)
        self._close("prior")

    def _close(self, moment: Moment) -> None:
        """Keep what has finished by now."""
        self._before.setdefault(moment, list(self._finished_calls))


def _own_code(module: nn.Module) -> bool:
    """Whether a module's forward is not torch's, which writes nothing that buffers do not show."""
    return not type(module).__module__.startswith("torch.nn.")


def _needs_grad(output: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))
