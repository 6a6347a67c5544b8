"""Module with priors: what the library asks of one, adds to one, and takes any other one for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from it3_lightning.calibration import Calibration, fingerprint
from it3_lightning.conditioning import Conditioning, Shown
from it3_lightning.engine.selection import OWN
from it3_lightning.integration import batches
from it3_lightning.integration.checkpoints import KEPT, plain, plain_data
from it3_lightning.integration.namespaces import NO_FORWARDS, ModuleMixin
from it3_lightning.integration.output_tree import prediction_in, with_prediction
from it3_lightning.methods import TestTimeMethod
from it3_lightning.priors import Prior
from it3_lightning.priors.classes import (
    OutputKind,
    is_single,
    outputs_of,
    probabilities,
)
from it3_lightning.utils.specs import built


@runtime_checkable
class IT3Module(Protocol):
    """A module that predicts with and without a prior."""

    it3_prior: Prior

    def it3_inputs(self, batch: Any) -> Any:
        """Return the inputs of a batch, without its target."""

    def predict_with(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Return outputs ``(B, ...)`` given a prior in label space, or the neutral one."""

    def it3_given(self, prior: Tensor | None) -> AbstractContextManager[None]:
        """Condition every forward pass within on this prior, or on the neutral one."""


def check_parts(module: object) -> None:
    """Refuse a module that was given no prior or no conditioning.

    Raises:
        MisconfigurationException: one of its parts is ``None``.
    """
    parts = [
        part for part in ("prior", "conditioning") if getattr(module, f"it3_{part}", 0) is None
    ]
    if parts:
        name = type(module).__name__
        raise MisconfigurationException(
            f"{name} has no {' and no '.join(parts)}. Give both, for example "
            f"{name}(..., prior=ClassPrior(10), conditioning=FeatureInjection('layer'))."
        )


class Conditioned(ModuleMixin):
    """Adds a prior and its way into the network to the LightningModule it is mixed with.

    Args:
        prior: how labels and outputs become priors, or its ``class_path`` dict.
        conditioning: how a prior enters the network, or its ``class_path`` dict.

    Raises:
        TypeError: ``prior`` or ``conditioning`` is something else.
        ValueError: the conditioning names a layer that does not exist.
    """

    def __init__(
        self,
        *args: Any,
        prior: Prior | None = None,
        conditioning: Conditioning | None = None,
        **kwargs: Any,
    ) -> None:
        given = prior, conditioning
        prior, conditioning = map(plain, given)  # what save_hyperparameters() finds here
        super().__init__(*args, **kwargs)
        self.it3_prior = built(given[0], Prior)  # type: ignore[type-abstract]
        self.it3_conditioning = built(given[1], Conditioning)  # type: ignore[type-abstract]
        self.it3_calibration = Calibration()
        self._it3_attach(lazy=True)

    # What a user calls or overrides

    def it3_inputs(self, batch: Any) -> Any:
        """Return the inputs of a batch; override for a batch of another shape."""
        return batches.inputs_of(batch)

    def it3_target(self, batch: Any) -> Any:
        """Return the target of a batch; override for a batch of another shape."""
        return batches.target_of(batch)

    def it3_with_inputs(self, batch: Any, inputs: Any) -> Any:
        """Return a copy of the batch with other inputs; override it where ``it3_inputs`` is.

        Asked for where inputs are perturbed, by ``DualPass(perturb_inputs=...)``, post-hoc by
        default, and where the perturbation changes them: it leaves whole numbers alone.
        """
        return batches.with_inputs(batch, inputs)

    def it3_sample_dims(self, inputs: Any) -> Any:
        """Return for each tensor in the inputs the dimension of its samples.

        ``None`` where all samples share a tensor; in the structure of the inputs, of which a
        mapping may leave out what has the samples in front. By default ``None`` in place of it all:
        the samples are the rows of the first tensor, and of every other one with as many rows.
        Override where that is not so::

            def it3_sample_dims(self, inputs):  # words (T, B), and positions (T,)
                return {"words": 1, "positions": None}
        """
        return None

    def it3_valid(self, inputs: Any) -> Tensor | None:
        """Return which positions of a prediction count at test time, as the inputs say.

        Booleans ``(B, ...)``, for predictions ``(B, C, ...)`` in label space; ``None``: all. The
        others are padding: they have no part in distances, filters and what is minimised. By
        default what an ``attention_mask`` or ``pixel_mask`` says, where it has the positions of the
        prediction. Override for masks of other names::

            def it3_valid(self, inputs):  # True where there is nothing
                return ~inputs["padding_mask"]
        """
        return batches.valid_in(inputs)

    def it3_forward(self, inputs: Any) -> Tensor:
        """Return the network's outputs ``(B, ...)``; override where ``self(inputs)`` does not.

        A tuple or a list is spread over the arguments; a packed sequence is not. So is a mapping of
        names of transformers, such as ``input_ids``, over arguments of these names.
        """
        plain = isinstance(inputs, Tensor)
        outputs = self(inputs) if plain else batches.called_on(self, inputs)
        return outputs if isinstance(outputs, Tensor) else self.it3_outputs(outputs)

    def it3_outputs(self, returned: Any) -> Tensor:
        """Return the prediction ``(B, ...)`` among what ``forward`` returns, where that is several.

        By default the tensor named ``logits``, ``out`` or ``prediction``, or the only one. Override
        where that is not so::

            def it3_outputs(self, returned):
                return returned[0]

        Raises:
            MisconfigurationException: nothing tells which it is.
        """
        return prediction_in(returned)

    def predict_with(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Run one forward pass on a prior, :math:`f(x, p)`.

        Args:
            inputs: of the network.
            prior: ``(B, C, ...)`` in label space, as ``it3_prior`` makes it; ``None``: neutral.

        Returns:
            The network's outputs, ``(B, ...)``.
        """
        with self.it3_given(prior):
            return self.it3_forward(inputs)

    @contextmanager
    def it3_given(self, prior: Tensor | None) -> Iterator[None]:
        """Condition every forward pass within on this prior, or on the neutral one (``None``)."""
        source, conditioning = self.it3_parts()
        if prior is not None and source.joins:
            prior = source.joined(prior)
        outer, conditioning.shown = conditioning.shown, Shown(prior)
        try:
            yield
            if len(conditioning.shown.ran) < len(conditioning.layers):
                raise conditioning.unreached()
        finally:
            conditioning.shown = outer

    def it3_parts(self) -> tuple[Prior, Conditioning]:
        """Return prior and conditioning.

        Raises:
            MisconfigurationException: one of them was not given.
        """
        check_parts(self)
        assert self.it3_prior is not None
        assert self.it3_conditioning is not None
        return self.it3_prior, self.it3_conditioning

    # What Lightning calls

    def configure_model(self) -> None:
        """Attach the conditioning to what the module builds here."""
        super().configure_model()
        self._it3_attach(lazy=False)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; a plain checkpoint may lack all ``it3_*`` keys, but no others.

        Version 0.1.0 kept the calibration among them.
        """
        state, former = dict(state_dict), f"{OWN}calibration."
        names = [key for key in state if key.startswith(former)]
        calibration = {key.removeprefix(former): state.pop(key) for key in names}
        if strict and not any(key.startswith(OWN) for key in state):
            state |= {k: v for k, v in self.state_dict().items() if k.startswith(OWN)}
        with self._it3_reading():
            loaded = super().load_state_dict(state, strict=strict, assign=assign)
            if calibration:
                self.it3_calibration.take_former(calibration)
                self.it3_calibration.weights = fingerprint(self)
        return loaded

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the parts, and the checkpoint plain data: as ``class_path`` dicts."""
        super().on_save_checkpoint(checkpoint)
        parts = plain_data(prior=self.it3_prior, conditioning=self.it3_conditioning)
        checkpoint[KEPT] = {"calibration": self.it3_calibration.state_dict(), **parts}
        hparams = checkpoint.get("hyper_parameters", {})
        hparams.update({name: plain(value) for name, value in hparams.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the calibration that was kept beside the weights, and parts that were not given.

        Raises:
            TypeError: a part is something else.
            ValueError: the calibration is none.
        """
        super().on_load_checkpoint(checkpoint)
        with self._it3_reading():
            kept = checkpoint.get(KEPT, {})
            if not isinstance(kept, Mapping):
                raise ValueError(f"Expected a mapping as its {KEPT!r}, got {type(kept).__name__}.")
            self.it3_calibration.load_state_dict(kept.get("calibration", {}))
            if self.it3_prior is None or self.it3_conditioning is None:
                prior, own = self.it3_prior, self.it3_conditioning
                self.it3_prior = built(prior or kept.get("prior"), Prior)  # type: ignore[type-abstract]
                self.it3_conditioning = built(own or kept.get("conditioning"), Conditioning)  # type: ignore[type-abstract]
                self._it3_attach(lazy=True)

    # How it works

    @contextmanager
    def _it3_reading(self) -> Iterator[None]:
        """Name the checkpoint that a Trainer is reading in what is raised within."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            trainer = self._trainer
            path = trainer.ckpt_path if trainer and trainer.state.status == "running" else None
            if path is None:
                raise
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(f"{path} does not fit {type(self).__name__}: {error}") from error

    def _it3_attach(self, *, lazy: bool) -> None:
        """Attach the conditioning where it is complete; ``lazy``: its layers may still come."""
        if self.it3_prior is None or self.it3_conditioning is None:
            return
        names = {name for name, _ in self.named_modules()}
        if lazy and not names.issuperset(self.it3_conditioning.layers) and self._builds_later():
            return
        self.it3_conditioning.attach(self, self.it3_prior)

    @classmethod
    def _builds_later(cls) -> bool:
        """Whether the module builds layers in a hook: ``configure_model`` or ``setup``."""
        known = ("lightning.", "pytorch_lightning.", "it3_lightning.")
        own = [c for c in cls.__mro__ if not c.__module__.startswith(known)]
        return any(name in vars(c) for c in own for name in ("configure_model", "setup"))


def replaced(host: Any, returned: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return what ``forward`` returned with its prediction changed, all else as it is.

    Args:
        host: says which tensor the prediction is, by ``it3_outputs``.
        returned: by ``forward``, in any structure.
        change: takes the prediction and returns another.

    Raises:
        MisconfigurationException: nothing tells which tensor it is.
    """
    prediction = outputs_in(host, returned)
    try:
        return with_prediction(returned, prediction, change(prediction))
    except TypeError as error:
        raise MisconfigurationException(
            f"forward of {type(host).__name__} returned a {type(returned).__name__}, in which no "
            "prediction can be put. Return tensors in tuples, lists, mappings or dataclasses."
        ) from error


def outputs_in(host: Any, returned: Any) -> Tensor:
    """Return the prediction in what ``forward`` returned, as a module says by ``it3_outputs``.

    Raises:
        MisconfigurationException: it does not say, or its ``it3_forward`` may say otherwise.
    """
    if isinstance(returned, Tensor):
        return returned
    kind = type(host._module if isinstance(host, PlainModule) else host)
    own, forward = getattr(kind, "it3_outputs", None), getattr(kind, "it3_forward", None)
    untold = own in (None, Conditioned.it3_outputs)
    if untold and forward not in (None, Conditioned.it3_forward):
        raise MisconfigurationException(_NEEDS_OUTPUTS.format(name=kind.__name__))
    outputs: Tensor = prediction_in(returned) if untold else host.it3_outputs(returned)
    return outputs


_NEEDS_OUTPUTS = """{name} takes its prediction out of what forward returns in it3_forward, where \
nobody else sees which one it is.
    wrong:  def it3_forward(self, inputs):
                return self(inputs)["scores"]
    right:  def it3_outputs(self, returned):
                return returned["scores"]"""


_NEEDS_MIXIN = """Test-time adaptation needs a module that predicts with a prior; {name} does not.
    wrong:  model = {name}(...)
    right:  class IT3Net(IT3Mixin, {name}): pass
            model = IT3Net(..., prior=ClassPrior(10), conditioning=FeatureInjection("layer"))"""


_NEEDS_FORWARD = """{name} has no forward, so nothing tells how to predict from inputs alone.
    wrong:  class IT3Net(IT3Mixin, {name}): pass
    right:  class IT3Net(IT3Mixin, {name}):
                def it3_forward(self, inputs):
                    return self.net(inputs)  # as your steps do"""


UNTRAINED = (
    "Every second prediction equals the first: the conditioning has not been trained. Fit the "
    "module first, or give it source_checkpoint=... and fit the conditioning."
)


def untrained(host: object) -> bool:
    """Whether the conditioning of a module is known to change nothing yet."""
    conditioning = getattr(host, "it3_conditioning", None)
    return isinstance(conditioning, Conditioning) and conditioning.untrained


def checked_module(module: LightningModule, *, fitted: bool = True) -> IT3Module:
    """Return the module as one that predicts with a prior.

    Args:
        module: of the Trainer.
        fitted: whether its prior must know the targets already.

    Raises:
        MisconfigurationException: it cannot, or its prior does not know the targets yet.
    """
    if not isinstance(module, IT3Module):
        raise MisconfigurationException(_NEEDS_MIXIN.format(name=type(module).__name__))
    check_parts(module)
    own = getattr(type(module), "it3_forward", None)
    if type(module).forward in NO_FORWARDS and own is Conditioned.it3_forward:
        raise MisconfigurationException(_NEEDS_FORWARD.format(name=type(module).__name__))
    if fitted and not module.it3_prior.fitted:
        raise MisconfigurationException(
            f"{type(module.it3_prior).__name__} does not know the mean and spread of the targets. "
            "Give both to its constructor, train once, or load a checkpoint of a trained model."
        )
    return module


class PlainModule:
    """Any LightningModule, as what predicts without a prior.

    Args:
        module: as it is; its ``it3_inputs``, ``it3_forward`` and ``it3_outputs`` are used where it
            has them.
        outputs: what it puts out: ``"logits"`` or ``"probabilities"`` of classes, ``(B, C, ...)``,
            or one value per sample for class 1 of two.
    """

    def __init__(self, module: LightningModule, outputs: OutputKind) -> None:
        self._module = module
        self.outputs = outputs
        self.it3_prior: Any = _Classes(outputs)

    def it3_inputs(self, batch: Any) -> Any:
        """Return the inputs of a batch."""
        own = getattr(self._module, "it3_inputs", batches.inputs_of)
        return own(batch)

    def predict_with(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Return outputs ``(B, ...)``; there is no prior to give."""
        with self.it3_given(prior):
            own = getattr(self._module, "it3_forward", None)
            if own is not None:
                outputs: Tensor = own(inputs)
                return outputs
            module = self._module
            returned = batches.called_on(module, inputs)
            return returned if isinstance(returned, Tensor) else self.it3_outputs(returned)

    def it3_outputs(self, returned: Any) -> Tensor:
        """Return the prediction among what ``forward`` returns, as the module says, if it does."""
        own = getattr(self._module, "it3_outputs", prediction_in)
        return own(returned)

    def it3_given(self, prior: Tensor | None) -> AbstractContextManager[None]:
        """Do nothing; there is no prior to give.

        Raises:
            MisconfigurationException: one is given.
        """
        if prior is not None:
            raise MisconfigurationException(_NEEDS_MIXIN.format(name=type(self._module).__name__))
        return nullcontext()


class _Classes:
    """Outputs as probabilities, of as many classes as there are outputs."""

    positions = True  # there may be

    def __init__(self, outputs: OutputKind) -> None:
        self._outputs: OutputKind = outputs

    def from_output(self, output: Tensor) -> Tensor:
        channels = output.shape[1] if output.ndim > 1 else 1
        return probabilities(output, max(2, channels), self._outputs)

    def to_output(self, prediction: Tensor, like: Tensor) -> Tensor:
        return outputs_of(prediction, self._outputs, like, single=is_single(like))


def host_of(
    module: LightningModule,
    method: TestTimeMethod,
    *,
    outputs: OutputKind = "logits",
    fitted: bool = True,
) -> IT3Module:
    """Return a module as what a method can predict with.

    Args:
        module: of the Trainer.
        method: asks for a prior, or not.
        outputs: what a module without a prior puts out.
        fitted: whether its prior must know the targets already.

    Raises:
        MisconfigurationException: the method asks for a prior and the module cannot take one, its
            prior does not know the targets yet, or nothing tells how to predict.
    """
    if method.needs_prior or isinstance(module, IT3Module):
        return checked_module(module, fitted=fitted)
    if type(module).forward in NO_FORWARDS and not hasattr(module, "it3_forward"):
        raise MisconfigurationException(
            f"{type(module).__name__} has no forward, so nothing tells how to predict from inputs "
            "alone. Give it one, or a method it3_forward(self, inputs)."
        )
    return PlainModule(module, outputs)
