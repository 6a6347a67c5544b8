"""Scope `sample` under a Trainer: the step runs once, and `self(...)` in it is intercepted.

The step runs on the whole batch, with the source weights in place. What it asks the module for by
``self(...)`` is computed with weights adapted to each sample, and answered in the structure that
the module's ``forward`` returns.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_leaves

from it3_lightning.engine import Adaptation, Settings, SourceMoments, batch_size
from it3_lightning.engine.passes import copied
from it3_lightning.engine.restore import Snapshot, Undo, undisturbed_rng
from it3_lightning.engine.trees import dims_by, laid_out, taken, told_dims
from it3_lightning.engine.types import Answer, Plain
from it3_lightning.integration.batches import normal
from it3_lightning.integration.isolation import hooked_by, muted, patched
from it3_lightning.integration.module import IT3Module
from it3_lightning.integration.module_adapter import (
    WhichPrediction,
    adapter_of,
    in_precision,
    mean_prediction,
    owned,
    run_through,
    sample_dims_of,
)
from it3_lightning.integration.namespaces import NO_FORWARDS
from it3_lightning.integration.output_tree import OutputTree
from it3_lightning.utils.graphs import graph_count, is_graph

_NEVER_ASKED = """{step} of {name} never called self(...), so nothing of it saw the adapted weights.
    wrong:  logits = self.net(x)
    right:  logits = self(x)  # with def forward(self, x): return self.net(x)
scope='sample' answers self(...) with each sample's own weights. scope='batch' serves any step."""

_BESIDE = """{step} of {name} ran {layer!r} by itself, and so with the source weights.
scope='sample' answers only self(...) with each sample's own weights. scope='batch' serves any."""


class Call(NamedTuple):
    """A call of a module's ``forward``, all tensors ``(B, ...)``.

    Args:
        inputs: of the batch, which the weights adapt to.
        args: of the call.
        kwargs: of the call.
        prior: that the caller gives; ``None``: none, or the neutral one.
    """

    inputs: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prior: Tensor | None = None


class PerSampleStep:
    """Runs a step of scope ``"sample"``: its calls of ``self(...)`` are answered.

    The weights adapt to what ``it3_inputs`` finds in the batch. A call with other arguments, such
    as augmented views of as many samples, is answered with those weights; each such call adapts
    anew. A call under ``self.it3_given(prior)``, as ``self.predict_with`` makes it, is answered
    with that prior. What ``forward`` itself logs, counts or keeps on the module is not kept: it ran
    for single samples, possibly inside ``torch.func``; log in the step.

    Args:
        module: whose step runs.
        host: the same, as what predicts with a prior.
        settings: how to adapt.
        prediction: what ``self(...)`` returns: the ``"first"`` prediction, the ``"second"``, which
            sees the first as its prior, or the ``"mean"`` of both.
        step: name of the step.
        moments: of source data, for ``norm_stats="evidence"``.

    Raises:
        MisconfigurationException: the selection of parameters matches nothing, or the module has no
            ``forward``.
    """

    def __init__(
        self,
        module: LightningModule,
        host: IT3Module,
        settings: Settings,
        *,
        prediction: WhichPrediction = "first",
        step: str = "step",
        moments: SourceMoments | None = None,
    ) -> None:
        self._names = {"step": step, "name": type(module).__name__}
        if getattr(module.forward, "__func__", None) in NO_FORWARDS:
            raise MisconfigurationException(_NEVER_ASKED.format(**self._names))
        self._dims_of_inputs = sample_dims_of(module)
        self.adapter = adapter_of(
            module,
            host,
            settings,
            forward=lambda call, prior: host.predict_with(_inputs_in(call), prior),
            inputs_in=_inputs_in,
            sample_dims=self._dims if self._dims_of_inputs is not None else None,
            moments=moments,
            prediction=prediction,
            step=step,
        )
        self.undo, self.restart = Undo(), self.adapter.restart
        self._module = module
        self._host = host
        self._prediction = prediction
        ids = {id(parameter) for parameter in self.adapter.selected.values()}
        self._adapting = {
            name: owner
            for name, owner in list(module.named_modules())[1:]
            if not isinstance(owner, torch.jit.ScriptModule)  # which takes no hooks
            and any(id(parameter) in ids for parameter in owner.parameters(recurse=False))
        }

    def run(self, inputs: Any, step: Callable[[], Any]) -> tuple[Any, Adaptation]:
        """Run the step and return what it returned, and the adaptation to the inputs.

        Raises:
            MisconfigurationException: the step never calls the module.
            ValueError: it calls it with another number of samples.
        """
        interception = _Interception(self._module, self._host, self._answer, normal(inputs))
        with self.undo as undo:
            undo.add(Snapshot(self._module).restore)
            undo.add(self.adapter.undo.run)  # which knows less, and so is run first
            try:
                with interception.listening(self._adapting):
                    output = step()
                    if isinstance(output, Iterator):
                        output = run_through(output)
            except Exception:  # what the step itself has written stays, unless it is interrupted
                undo.end()
                raise
        if not interception.answered:
            raise MisconfigurationException(_NEVER_ASKED.format(**self._names))
        if interception.ran:
            rank_zero_warn(_BESIDE.format(**self._names, layer=interception.ran[0]))
            self._adapting = {}  # once is enough
        parts = [adaptation for *_, adaptation in interception.answered]
        return output, replace(parts[0], seconds=sum(part.seconds for part in parts))

    def _answer(
        self, call: Call, given: bool, interception: _Interception
    ) -> tuple[Any, Adaptation, bool]:
        """Return what ``forward`` returns with each sample's weights, and their adaptation.

        And whether random numbers were drawn.

        Args:
            call: to answer.
            given: whether the caller gives a prior, which may be the neutral one.
            interception: lets calls through meanwhile.

        Raises:
            ValueError: the call has another number of samples, or returns no samples.
        """
        dims = self._dims(call)
        laid = call if dims is None else laid_out(call, dims)
        if self._check(laid) == 0:
            return *self._empty(call, "first" if given else self._prediction), False
        prediction = "first" if given else self._prediction
        plain = prediction == "first" and call.prior is None
        usual = plain and interception.reaches(call, lambda: self._neutral(call))

        graphs = _graphs_in(call)

        def answer(asked: Call) -> tuple[Tensor, OutputTree]:
            interception.returned = None
            outputs = self._neutral(asked)
            value = interception.returned
            if not usual:
                value = self._predicted(asked, outputs, prediction)
            return outputs, OutputTree.of(value, None if graphs else len(outputs))

        with self.adapter.adapted(call, _Neutral(self._neutral, answer) if usual else answer) as a:
            tree: OutputTree = a.answers

        def ordinary() -> list[Tensor]:
            tensors: list[Tensor] = answer(copied(taken(laid, range(1))))[1].tensors
            return tensors

        tensors = in_precision(tree.tensors, ordinary, self.adapter, self._module)
        return tree.filled(tensors), a, self.adapter.drawn

    def _dims(self, call: Any) -> Any:
        """Return the dimensions of the samples in a call, as the module says, if it does.

        Arguments are told by the inputs that are equal to them, or have their shape; others go by
        the rule.
        """
        own = self._dims_of_inputs
        dims = None if own is None else own(_inputs_in(call))
        if dims is None or not isinstance(call, Call):
            return dims
        told = told_dims(call.inputs, dims)
        size = batch_size(laid_out(call.inputs, dims))

        def dim(leaf: Any) -> int | None:
            if not isinstance(leaf, Tensor):
                return None
            same = [d for tensor, d in told if _equal(tensor, leaf)]
            same += [d for tensor, d in told if tensor.shape == leaf.shape]
            return same[0] if same else 0 if leaf.ndim and len(leaf) == size else None

        args, kwargs = dims_by(dim, call.args), dims_by(dim, call.kwargs)
        return Call(dims, args, kwargs, 0)  # type: ignore[arg-type]

    def _empty(self, call: Call, prediction: WhichPrediction) -> tuple[Any, Adaptation]:
        """Return what ``forward`` returns of no samples, and that nothing came of them."""
        with self.adapter.adapted(call, Plain(self._neutral)) as adaptation:
            pass
        with torch.no_grad(), undisturbed_rng(), muted(self._module):
            outputs = self._neutral(call)
            return self._predicted(call, outputs, prediction), adaptation

    def _check(self, call: Call) -> int:
        size = batch_size(call.inputs)
        try:
            asked = batch_size((call.args, call.kwargs))
        except ValueError:
            asked = 0
        if size != asked:
            raise ValueError(
                f"{type(self._module).__name__} was called with {asked} samples in a batch of "
                f"{size}. With scope='sample' each sample has weights of its own: call it on all "
                "of them, once for each view, or use scope='batch'."
            )
        return size

    def _predicted(self, asked: Call, outputs: Tensor, prediction: WhichPrediction) -> Any:
        """Return what ``forward`` returns; ``outputs`` are those of the neutral pass."""
        if prediction == "first":
            return self._called(asked, asked.prior)
        second = self._called(asked, self._host.it3_prior.from_output(outputs))
        if prediction == "second":
            return second
        return mean_prediction(self._host, self._called(asked, None), second)

    def _neutral(self, asked: Call, prior: Tensor | None = None) -> Tensor:
        return self._host.predict_with(asked.inputs, prior)

    def _called(self, asked: Call, prior: Tensor | None) -> Any:
        given = nullcontext() if prior is None else self._host.it3_given(prior)
        args, kwargs = copied((asked.args, asked.kwargs))  # each pass may write into its own
        with given, hooked_by(self._module, lambda hook: owned(hook, self._host)):
            return self._module(*args, **kwargs)


class _Interception:
    """The calls that one step makes of a module, and what they were answered.

    One flag says what a call of ``forward`` is: ``"answer"``: the step asks; ``"run"``: the engine
    itself runs the network; ``"probe"``: only the arguments are wanted.

    Args:
        module: whose ``forward`` is intercepted.
        host: the same, as what predicts with a prior.
        answer: answers a call, given whether it comes with a prior.
        inputs: of the batch.
    """

    def __init__(
        self,
        module: LightningModule,
        host: IT3Module,
        answer: Callable[[Call, bool, _Interception], tuple[Any, Adaptation, bool]],
        inputs: Any,
    ) -> None:
        self._module = module
        self._host = host
        self._answer = answer
        self._inputs = inputs
        self._forward = module.forward
        self._mode: Literal["answer", "run", "probe"] = "answer"
        self._listening = ExitStack()  # while the step asks
        self._adapting: dict[str, nn.Module] = {}
        self._priors: list[Tensor | None] = []  # given by the step, innermost last
        self.answered: list[tuple[Any, Any, Adaptation]] = []
        self._drawn = 0  # calls that drew random numbers
        self.ran: list[str] = []  # adapting layers that the step ran by itself
        self.returned: Any = None  # what the network's own forward returned first in a pass

    @contextmanager
    def listening(self, adapting: dict[str, nn.Module]) -> Iterator[None]:
        """Intercept calls within, and note the adapting layers that run without one."""
        self._adapting = adapting
        forward = self.forward
        if "torch._dynamo" in sys.modules:  # a compiled step runs it as it is
            forward = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
        with patched(self._module, forward=forward):
            try:
                self._listen()
                yield
            finally:
                self._listening.close()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call; one that was answered before, with the same again."""
        if self._mode == "probe":
            raise _ReachedError(args, kwargs)
        if self._mode == "run":
            value = self._forward(*args, **kwargs)
            self.returned = value if self.returned is None else self.returned
            return value
        given = bool(self._priors)
        call = Call(self._inputs, *normal((args, kwargs, self._priors[-1] if given else None)))
        for former, answer, _ in self.answered:
            if former is not None and _same(former, (call[1:], given)):
                return copy.deepcopy(answer)  # the step may write into it
        with self._mode_of("run"), undisturbed_rng() if self._drawn else nullcontext():
            torch.rand(self._drawn)  # each call, even the same, draws other numbers
            answer, adaptation, drawn = self._answer(call, given, self)
        self._drawn += drawn
        self.answered.append((None if drawn else (call[1:], given), answer, adaptation))
        return copy.deepcopy(answer)

    @contextmanager
    def given(self, prior: Tensor | None) -> Iterator[None]:
        """Let the step's calls within be answered with a prior."""
        self._priors.append(prior)
        try:
            yield
        finally:
            self._priors.pop()

    def reaches(self, call: Call, run: Callable[[], Any]) -> bool:
        """Whether a pass calls ``forward`` with the arguments of a call."""
        with torch.no_grad(), undisturbed_rng(), muted(self._module), self._mode_of("probe"):
            try:
                run()
            except _ReachedError as reached:
                asked = _by_name(self._forward, call.args, call.kwargs)
                return _same(_by_name(self._forward, *reached.args), asked)
        return False

    @contextmanager
    def _mode_of(self, mode: Literal["run", "probe"]) -> Iterator[None]:
        before, self._mode = self._mode, mode
        self._listening.close()
        if mode == "probe":
            self._keep_conditioning_out()
        try:
            yield
        finally:
            self._mode = before
            self._listening.close()
            if before == "answer":
                self._listen()

    def _listen(self) -> None:
        """Take what the step gives as a prior, and note the adapting layers that it runs itself."""
        self._listening.enter_context(patched(self._module, it3_given=self.given))
        self._keep_conditioning_out()
        for name, layer in self._adapting.items():
            hook = layer.register_forward_pre_hook(self._note(name))
            self._listening.callback(hook.remove)

    def _keep_conditioning_out(self) -> None:
        """Let hooks of the conditioning on the module itself not run: they come with the engine."""
        hooks = (*self._module._forward_pre_hooks.values(), *self._module._forward_hooks.values())
        if any(owned(hook, self._host) for hook in hooks):
            others = hooked_by(self._module, lambda hook: not owned(hook, self._host))
            self._listening.enter_context(others)

    def _note(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.ran.append(name)

        return hook


@dataclass(frozen=True)
class _Neutral(Plain):
    """An answer whose pass is the first of a step: what cannot differ need not be computed."""

    answer: Answer

    def __call__(self, inputs: Any) -> tuple[Tensor, Any]:
        return self.answer(inputs)


class _ReachedError(BaseException):
    """The ``forward`` of a module was reached; carries its arguments."""


def _inputs_in(given: Any) -> Any:
    """Return the inputs of a call; augmented views come without one."""
    return given.inputs if isinstance(given, Call) else given


def _graphs_in(call: Call) -> bool:
    """Whether there are graphs, whose outputs may be those of nodes."""
    leaves = tree_leaves(call.inputs, is_leaf=lambda value: isinstance(value, PackedSequence))
    return any(graph_count(leaf) for leaf in leaves if not isinstance(leaf, Tensor | tuple))


def _by_name(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Return arguments by name, however they are given.

    Raises:
        TypeError: the function does not take them.
    """
    return dict(inspect.signature(function).bind(*args, **kwargs).arguments)


def _same(a: Any, b: Any) -> bool:
    """Whether two structures of arguments are equal, to the last bit."""
    (mine, structure), (theirs, other) = tree_flatten(a), tree_flatten(b)
    return structure == other and all(map(_equal, mine, theirs))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        if a.layout != torch.strided or b.layout != torch.strided:
            return alike and a.layout == b.layout and torch.equal(a.to_dense(), b.to_dense())
        return alike and torch.equal(a, b)
    if is_graph(a) and is_graph(b):
        return _same([dict(store) for store in a.stores], [dict(store) for store in b.stores])
    return a is b or (isinstance(a, str | int | float) and type(a) is type(b) and a == b)
