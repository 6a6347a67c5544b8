"""The mean of the first and the second prediction, as what a module's ``forward`` returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from it3_lightning.conditioning import Conditioning
from it3_lightning.engine.randomness import undisturbed_rng
from it3_lightning.engine.samples import copied
from it3_lightning.muting import muted
from it3_lightning.priors import Prior
from it3_lightning.protocols import IT3Module
from it3_lightning.standing_in import hooked_by, stood_in

_NEVER_ASKED = """A step of {name} never called self(...), so there was nothing to average.
    wrong:  logits = self.net(x)
    right:  logits = self(x)  # with def forward(self, x): return self.net(x)
prediction='mean' averages what self(...) returns; 'first' and 'second' serve any step."""


def mean_prediction(prior: Prior, first: Any, second: Any) -> Tensor:
    """Return outputs whose label-space values are the mean of those of two outputs.

    Args:
        prior: knows what outputs mean.
        first: what ``forward`` returned with the neutral prior.
        second: what it returned with the first prediction as prior.

    Raises:
        MisconfigurationException: ``forward`` returns something else than a tensor.
    """
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        raise MisconfigurationException(
            "prediction='mean' averages outputs, and forward returned a "
            f"{type(first).__name__}. Return the outputs alone, as a tensor (B, ...), or use "
            "prediction='first' or 'second'."
        )
    return prior.mean_output(first, second)


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
        args, kwargs = asked.calls.pop()
        asked.answered = True
        if asked.priors:
            return output
        with own(prior), undisturbed_rng(), muted(module), conditioned_only(module, host):
            second = module(*args, **kwargs)
        return mean_prediction(host.it3_prior, output, second)

    with ExitStack() as stack:
        stack.callback(
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove
        )
        stack.callback(module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)
        stack.enter_context(stood_in(module, it3_given=given))
        yield
    if not asked.answered:
        raise MisconfigurationException(_NEVER_ASKED.format(name=type(module).__name__))


@contextmanager
def conditioned_only(module: LightningModule, host: IT3Module) -> Iterator[None]:
    """Let no hook on the module itself run within but the one that hands over the prior."""

    def is_conditioning(hook: Any) -> bool:
        conditioning = getattr(host, "it3_conditioning", None)
        return isinstance(conditioning, Conditioning) and conditioning.owns(hook)

    with hooked_by(module, is_conditioning):
        yield
