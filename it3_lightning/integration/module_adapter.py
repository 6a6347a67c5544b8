"""Module adapter: the engine for a LightningModule, and its step with adapted weights in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from it3_lightning.conditioning import Conditioning
from it3_lightning.engine import (
    Adaptation,
    Answer,
    BatchAdapter,
    Enters,
    SampleAdapter,
    Settings,
    SourceMoments,
)
from it3_lightning.engine.passes import copied
from it3_lightning.engine.restore import Snapshot, undisturbed_rng, without_side_effects
from it3_lightning.engine.types import Forward, InputsIn, Isolation, SampleDims, ValidIn
from it3_lightning.integration import batches
from it3_lightning.integration.batches import normal
from it3_lightning.integration.isolation import hooked_by, muted, patched, without_logs
from it3_lightning.integration.module import (
    Conditioned,
    IT3Module,
    PlainModule,
    outputs_in,
    replaced,
)
from it3_lightning.priors.prior import Carried

WhichPrediction = Literal["first", "second", "mean"]
Adapter = BatchAdapter | SampleAdapter


_NO_COMPANY = (
    "scope='sample' adapts to each sample as if it had come alone, and the prior has "
    "context='batch', of its whole batch. Use scope='batch', or a module whose prior was "
    "trained without a context."
)


def adapter_of(
    module: LightningModule,
    host: IT3Module,
    settings: Settings,
    *,
    forward: Forward | None = None,
    inputs_in: InputsIn | None = None,
    sample_dims: SampleDims | None = None,
    moments: SourceMoments | None = None,
    prediction: WhichPrediction = "first",
    step: str | None = None,
    silent: bool = False,
    alone: bool = False,
) -> Adapter:
    """Return the engine for a module, and say which weights it adapts.

    Args:
        module: whose weights adapt.
        host: the same, as what predicts with a prior.
        settings: how to adapt.
        forward: of the engine; default: ``host.predict_with``.
        inputs_in: finds the module's inputs in what the engine is given.
        sample_dims: says which dimensions of that hold samples; default: as the module does.
        moments: of source data, for ``norm_stats="evidence"``.
        prediction: which one is wanted.
        step: that asks for it, where ``forward`` is given: adapters of a module for one step and
            one prediction do the same.
        silent: say nothing.
        alone: whether the caller sees to it that the context of each sample is its own.

    Raises:
        MisconfigurationException: the selection of parameters matches nothing, moments are needed
            and unknown, or second predictions that see the context of a batch are asked for, of
            single samples.
    """
    kind = SampleAdapter if settings.scope == "sample" else BatchAdapter
    measured = settings.steps or settings.measure or settings.predicts
    asked = prediction != "first" or (settings.method.needs_prior and measured)
    context = getattr(host.it3_prior, "context", None) if asked and not alone else None
    if context == "batch" and kind is SampleAdapter:
        raise MisconfigurationException(_NO_COMPANY)
    if context == "stream":  # the mean of first predictions: they have to be there
        settings = replace(settings, measure=True)
    more: dict[str, Any] = {"in_company": True} if context and kind is BatchAdapter else {}
    if kind is SampleAdapter and (forward is None or step is not None):
        outputs = host.outputs if isinstance(host, PlainModule) else None
        more = {"known_as": (step, prediction, outputs)}
    frozen = getattr(module, "it3_frozen", None) is not None  # while it is fitted
    trainable: Isolation = module.it3_trainable if frozen else nullcontext  # type: ignore[assignment]
    to_label = host.it3_prior.from_output
    try:
        with trainable():
            made = kind(
                module,
                forward or host.predict_with,
                to_label,
                settings,
                enters=_enters(host),
                isolation=partial(without_logs, module),
                inputs_in=inputs_in,
                sample_dims=sample_dims or sample_dims_of(module),
                valid_in=valid_in(module, host, inputs_in),
                moments=moments,
                **more,
            )
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    if not silent:
        rank_zero_info(_announced(made))
    if context == "stream":
        return cast(Adapter, ContextStream(made, host, alone=kind is SampleAdapter))
    return made


class ContextStream:
    """An adapter that carries the context of a stream from batch to batch.

    Args:
        adapter: adapts.
        host: the module, as what predicts with a prior; the context is in place while it adapts.
        alone: whether each sample is adapted to by itself.
    """

    def __init__(self, adapter: Adapter, host: IT3Module, *, alone: bool) -> None:
        self._adapter, self._prior = adapter, host.it3_prior
        self._carried = self._at_first = Carried(alone)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def restart(self) -> None:
        """Forget what was carried along."""
        self._adapter.restart()
        self._carried = self._at_first
        vars(self._prior).pop("carried", None)

    @contextmanager
    def adapted(self, inputs: Any, answer: Answer | None = None) -> Iterator[Adaptation]:
        """Adapt with the context of the stream so far; what is not skipped becomes part of it."""
        self._prior.carried = self._carried
        try:
            with self._adapter.adapted(inputs, answer) as adaptation:
                yield adaptation
            if adaptation.outputs is not None:
                self._carried = self._followed(adaptation.outputs, adaptation.skipped)
        finally:
            vars(self._prior).pop("carried", None)

    def _followed(self, outputs: Tensor, skipped: Tensor) -> Carried:
        """Return what is carried on, with the first predictions of a batch that are good."""
        with torch.inference_mode(False), torch.no_grad():
            first = self._prior.from_output(outputs)
            good = first.isfinite().all(1) & ~skipped.to(first.device)
            rows = self._prior.context_rows(first[good])
            return self._carried.followed(rows, self._prior.window)


def in_precision(
    tensors: Sequence[Tensor],
    ordinary: Callable[[], Sequence[Tensor]],
    adapter: Adapter,
    module: LightningModule,
) -> list[Tensor]:
    """Return tensors in the types of an ordinary pass: ``torch.func`` runs without autocast.

    Args:
        tensors: that came of an adaptation.
        ordinary: what makes the same tensors, of any sample, in an ordinary pass.
        adapter: what adapted.
        module: whose pass it is; it is left as it was.
    """
    selection = getattr(adapter, "backend_selection", None)
    autocast = torch.is_autocast_enabled(next(iter(adapter.selected.values())).device.type)
    if not autocast or selection is None or selection.backend == "loop":
        return list(tensors)
    without = without_side_effects(Snapshot(module), partial(without_logs, module))
    with torch.inference_mode(False), without, torch.no_grad():
        types = [tensor.dtype for tensor in ordinary()]
    return [tensor.to(dtype) for tensor, dtype in zip(tensors, types, strict=True)]


def sample_dims_of(module: LightningModule) -> SampleDims | None:
    """Return what says which dimensions of a module's inputs hold samples; ``None``: the rule."""
    own = getattr(type(module), "it3_sample_dims", None)
    return None if own in (None, Conditioned.it3_sample_dims) else module.it3_sample_dims  # type: ignore[return-value]


def valid_in(
    module: LightningModule, host: IT3Module, inputs_in: InputsIn | None = None
) -> ValidIn | None:
    """Return what says which positions of a module's predictions count; ``None``: all do.

    Args:
        module: whose ``it3_valid`` is asked, where it has one of its own.
        host: the same, as what predicts with a prior; without positions in its label space only a
            module's own is asked.
        inputs_in: finds the module's inputs in what the engine is given.
    """
    own = getattr(type(module), "it3_valid", None)
    told = own not in (None, Conditioned.it3_valid)
    if not told and not getattr(host.it3_prior, "positions", False):
        return None
    asked: Callable[[Any], Tensor | None] = module.it3_valid if told else batches.valid_in  # type: ignore[assignment]

    def valid(given: Any, y0: Tensor) -> Tensor | None:
        found = asked(given if inputs_in is None else inputs_in(given))
        positions = (y0.shape[0], *y0.shape[2:])
        if found is None or (y0.ndim > 2 and found.shape == positions):
            return None if found is None else found.to(y0.device) != 0
        if not told:  # a mask of something else: of what is encoded, not of what is predicted
            return None
        raise ValueError(
            _VALID.format(
                name=type(module).__name__,
                got=tuple(found.shape),
                positions=positions,
                y0=tuple(y0.shape),
            )
        )

    return valid


_VALID = """Expected it3_valid of {name} to return booleans {positions}, one for each position of \
predictions {y0} in label space, or None where all count, got {got}."""


def _announced(made: Adapter) -> str:
    names = list(made.selected)
    weights = sum(parameter.numel() for parameter in made.selected.values())
    some = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return f"IT3 adapts {weights:,} weights in {len(names)} parameters: {some}"


def _enters(host: IT3Module) -> Enters:
    """Return where the prior enters, where that is known."""
    conditioning = getattr(host, "it3_conditioning", None)
    if not isinstance(conditioning, Conditioning):
        return {}
    return dict.fromkeys(conditioning.layers, conditioning.enters)


def mean_prediction(host: IT3Module, first: Any, second: Any) -> Any:
    """Return the first outputs with a prediction whose label-space values are the mean of both.

    Args:
        host: knows what outputs mean, and which of them is the prediction.
        first: what ``forward`` returned with the neutral prior.
        second: what it returned with the first prediction as prior.

    Raises:
        MisconfigurationException: nothing tells which tensor in them is the prediction.
    """
    other = outputs_in(host, second)
    return replaced(host, first, lambda own: host.it3_prior.mean_output(own, other))


def answer_of(host: IT3Module, prediction: WhichPrediction) -> Answer | None:
    """Return what the engine is to run with adapted weights; ``None``: the first prediction alone.

    Args:
        host: what predicts with a prior.
        prediction: which one becomes the answers, beside the outputs of the neutral pass.
    """
    if prediction == "first":
        return None

    def answer(inputs: Any) -> tuple[Tensor, Tensor]:
        prior = host.it3_prior
        first = host.predict_with(copied(inputs), None)  # the next pass needs them too
        second = host.predict_with(inputs, prior.from_output(first))
        return first, second if prediction == "second" else prior.mean_output(first, second)

    return answer


def owned(hook: Any, host: IT3Module) -> bool:
    """Whether a hook is that of a module's conditioning."""
    conditioning = getattr(host, "it3_conditioning", None)
    return isinstance(conditioning, Conditioning) and conditioning.owns(hook)


_NEVER_ASKED = """A step of {name} never called self(...), so there was nothing to average.
    wrong:  logits = self.net(x)
    right:  logits = self(x)  # with def forward(self, x): return self.net(x)
prediction='mean' averages what self(...) returns; 'first' and 'second' serve any step."""


_NEVER_ANSWERED = """A step of {name} never called self(...), so the method could not predict.
    wrong:  logits = self.net(x)
    right:  logits = self(x)  # with def forward(self, x): return self.net(x)
A method that predicts by itself answers calls of self(...)."""


class BatchStep:
    """Runs a step of scope ``"batch"``, or of no steps: its weights are in place meanwhile.

    Args:
        module: whose step runs.
        host: the same, as what predicts with a prior.
        adapter: puts the weights in place.
        prediction: ``"first"``; ``"second"``: every forward of the step sees the first
            prediction as its prior; ``"mean"``: ``self(...)`` returns the mean of both.
    """

    def __init__(
        self,
        module: LightningModule,
        host: IT3Module,
        adapter: Adapter,
        prediction: WhichPrediction,
    ) -> None:
        self.adapter = adapter
        self.undo, self.restart = adapter.undo, adapter.restart
        self._module = module
        self._host = host
        self._prediction = prediction

    def run(self, inputs: Any, step: Callable[[], Any]) -> tuple[Any, Adaptation]:
        """Adapt to the inputs and run the step, to the end of what it yields."""
        own = normal(inputs)
        with ExitStack() as stack:
            adaptation = stack.enter_context(self.adapter.adapted(own))
            if self._prediction == "second":
                stack.enter_context(self._host.it3_given(self._first(own)))
            elif self._prediction == "mean":
                stack.enter_context(averaged(self._module, self._host, self._first(own)))
            elif adaptation.prediction is not None:
                answer = adaptation.prediction
                stack.enter_context(answering(self._module, self._host, answer))
            output = step()
            return run_through(output) if isinstance(output, Iterator) else output, adaptation

    def _first(self, inputs: Any) -> Tensor:
        """Return the first prediction, in label space."""
        with torch.no_grad(), undisturbed_rng(), muted(self._module):
            outputs = self._host.predict_with(inputs, None)
            return self._host.it3_prior.from_output(outputs)


@contextmanager
def answering(module: LightningModule, host: IT3Module, prediction: Tensor) -> Iterator[None]:
    """Let calls of a module return what a method has predicted within.

    Args:
        module: whose calls; hooks of its own see the prediction.
        host: the same, as what knows what outputs mean.
        prediction: of the batch, in label space.

    Raises:
        MisconfigurationException: the module was never called.
    """
    asked, calls = [], []

    def before(*_: Any) -> None:
        calls.append(True)

    def after(_: Any, __: Any, output: Any) -> Any:
        asked.append(calls.pop())
        return replaced(host, output, lambda own: host.it3_prior.to_output(prediction, own))

    with ExitStack() as stack:
        stack.enter_context(_forward_called(module, calls))
        stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
        stack.callback(module.register_forward_hook(after, prepend=True).remove)
        yield
    if not asked:
        raise MisconfigurationException(_NEVER_ANSWERED.format(name=type(module).__name__))


def run_through(output: Iterator[Any]) -> Iterator[Any]:
    """Run a step that yields to its end, while weights are in place, and return what it yields.

    >>> list(run_through(letter for letter in "ab"))
    ['a', 'b']
    """
    values = list(output)
    return (value for value in values)


def _forward_called(module: LightningModule, calls: list[Any]) -> patched:
    """Let ``self.forward(...)`` be ``self(...)`` within, hooks and all.

    Args:
        module: whose.
        calls: that have begun; in one of them ``forward`` is what it is.
    """
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if calls else module(*args, **kwargs)

    return patched(module, forward=forward)


@dataclass
class _Asked:
    """Calls of the module that have begun, and what the step gives by itself."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    priors: int = 0
    answered: bool = False


@contextmanager
def averaged(module: LightningModule, host: IT3Module, prior: Tensor) -> Iterator[None]:
    """Let calls of a module return the mean of both predictions within.

    A call that the step gives a prior of its own returns what it always does. What the second pass
    logs, counts or draws is not kept.

    Args:
        module: whose calls; hooks of its own see the mean.
        host: the same, as what predicts with a prior.
        prior: the first prediction, in label space.

    Raises:
        MisconfigurationException: the module was never called, or returned no tensor.
    """
    asked, own = _Asked([]), host.it3_given

    @contextmanager
    def given(theirs: Tensor | None) -> Iterator[None]:
        asked.priors += 1
        try:
            with own(theirs):
                yield
        finally:
            asked.priors -= 1

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        asked.calls.append(copied((args, kwargs)))  # the first pass may write into its inputs

    def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        args, kwargs = asked.calls[-1]  # the second pass belongs to the call
        asked.answered = True
        try:
            if asked.priors:
                return output
            with (
                undisturbed_rng(),
                muted(module),
                hooked_by(module, lambda hook: owned(hook, host)),
                own(prior),
            ):
                second = module(*args, **kwargs)
        finally:
            asked.calls.pop()
        return mean_prediction(host, output, second)

    with ExitStack() as stack:
        stack.enter_context(_forward_called(module, asked.calls))
        stack.callback(
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove
        )
        stack.callback(module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)
        stack.enter_context(patched(module, it3_given=given))
        yield
    if not asked.answered:
        raise MisconfigurationException(_NEVER_ASKED.format(name=type(module).__name__))
