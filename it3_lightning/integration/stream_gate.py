"""Gate for streams: a module stays the source until a bet along the stream has proved a shift.

What is bet on is a distance of each sample by itself, by the weights and the statistics of the
source: so a stream of samples in random order is one of exchangeable distances, however it comes in
batches and whatever adapts afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from it3_lightning.calibration import calibration_of, fingerprint, measured_by
from it3_lightning.engine import Adaptation, Settings
from it3_lightning.engine.betting import ConformalMartingale
from it3_lightning.engine.restore import Undo
from it3_lightning.integration.batches import normal
from it3_lightning.integration.module import IT3Module
from it3_lightning.integration.module_adapter import Adapter, BatchStep, adapter_of
from it3_lightning.integration.per_sample_step import PerSampleStep
from it3_lightning.methods import Entropy, Idempotence, TestTimeMethod
from it3_lightning.priors.prior import Carried


def check_delta(delta: float) -> None:
    """Refuse what is no probability of a false alarm.

    Raises:
        ValueError: it is not.
    """
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta to be a probability in (0, 1), got {delta}.")


def score_of(method: TestTimeMethod) -> TestTimeMethod:
    """Return the method whose measure is bet on: that of each sample by itself, without a state.

    It is the method's own where it needs nothing but two predictions of a sample, else the
    idempotence distance, or, without a prior, the entropy.

    >>> from it3_lightning.methods import EATA
    >>> score_of(Idempotence("js", balance=1.0)).distance, score_of(EATA())
    ('js', Entropy(reliability=None, balance=0.0))
    """
    if isinstance(method, Idempotence):
        return replace(method, balance=0.0)
    if method.vmappable and not method.needs_batch:
        return method
    return Idempotence() if method.needs_prior else Entropy()


class Scores:
    """Measures what is bet on.

    Args:
        module: that predicts; nothing of it changes.
        host: the same, as what predicts with a prior.
        settings: of the adaptation that the gate is for.

    Attributes:
        by: what is measured, by name.
        undo: puts back what an interruption has left.

    Raises:
        MisconfigurationException: the selection of parameters matches nothing.
    """

    def __init__(self, module: LightningModule, host: IT3Module, settings: Settings) -> None:
        still = still_settings(settings)
        self.by = measured_by(still.objective, still.norm_stats)
        self._prior = host.it3_prior
        self._alone = getattr(self._prior, "context", None) is not None
        self._adapter = adapter_of(
            module, host, replace(still, scope="sample"), silent=True, alone=True
        )
        self.undo = Undo()

    def measure(self, inputs: Any) -> Adaptation:
        """Return what a batch gives without a step: distances, and the source's predictions.

        A sample that cannot be measured is skipped by itself.
        """
        with self.undo as undo:
            undo.add(self._put_back)
            undo.add(self._adapter.undo.run)
            if self._alone:  # the context of each sample is its own first prediction
                self._prior.carried = Carried(alone=True)
            try:
                with self._adapter.adapted(inputs) as measured:
                    return measured
            finally:
                self._put_back()

    def _put_back(self) -> None:
        if self._alone:
            vars(self._prior).pop("carried", None)


def still_settings(settings: Settings) -> Settings:
    """Return settings that measure what is bet on, and adapt nothing."""
    score, parameters = score_of(settings.method), settings.parameters
    return Settings(objective=score, parameters=parameters, steps=0, backend="loop")


@dataclass(frozen=True)
class Bet:
    """What a batch has come to, before it is known whether it counts.

    Args:
        after: the wealth with this batch; as it was, where nothing is bet on any more.
        opens: whether this batch is adapted to.
        measured: what was measured of it; ``None`` where nothing had to be.
    """

    after: ConformalMartingale
    opens: bool
    measured: Adaptation | None = None


class StreamGate:
    r"""Says of each batch of a stream whether it is adapted to.

    It is shut until the wealth of a :class:`~it3_lightning.engine.betting.ConformalMartingale`
    first reaches :math:`1 / \delta`, and then open until :meth:`restart`. The batch that opens it
    is adapted to.

    Args:
        scores: measure what is bet on.
        begin: the bet against validation samples, at its beginning.
        delta: probability of ever opening on samples that are exchangeable with these, at most.
    """

    def __init__(self, scores: Scores, begin: ConformalMartingale, delta: float) -> None:
        check_delta(delta)
        self.undo = scores.undo
        self._scores, self._enough = scores, 1 / delta
        self._begin = self.martingale = begin

    def restart(self) -> None:
        """Begin a stream."""
        self.martingale = self._begin

    @property
    def open(self) -> bool:
        """Whether the stream is adapted to."""
        return self.martingale.highest >= self._enough

    def bet(self, inputs: Any) -> Bet:
        """Bet on a batch; :meth:`settle` makes it count."""
        if self.open:
            return Bet(self.martingale, True)
        measured = self._scores.measure(inputs)
        distances = measured.distance_source
        after = self.martingale.after([] if distances is None else distances.float().tolist())
        return Bet(after, after.highest >= self._enough, measured)

    def settle(self, bet: Bet, adaptation: Adaptation | None = None) -> Adaptation:
        """Let a bet count, unless its batch was skipped; return what its batch has come to.

        Args:
            bet: on the batch.
            adaptation: to the batch, where the bet opens.
        """
        measured = bet.measured
        if adaptation is None:
            assert measured is not None
            self.martingale = bet.after
            return replace(measured, gated=~measured.skipped)
        skipped = adaptation.skipped
        if not self.open and not bool(skipped.all()):
            self.martingale = bet.after
            rank_zero_info(
                f"IT3 adapts from now on: after {bet.after.count} samples the wealth reached "
                f"{bet.after.highest:.4g}, and {self._enough:.4g} proves a shift."
            )
        forwards = adaptation.forwards + (0 if measured is None else measured.forwards)
        return replace(adaptation, forwards=forwards, gated=torch.zeros_like(skipped))


def stream_gate_of(
    module: LightningModule, host: IT3Module, settings: Settings, delta: float
) -> StreamGate:
    """Return a gate against the distances that a module's calibration knows.

    Raises:
        ValueError: delta is no probability.
        MisconfigurationException: it knows none, or others.
    """
    check_delta(delta)
    scores, weights = Scores(module, host, settings), fingerprint(module)
    return StreamGate(scores, calibration_of(module).bet(by=scores.by, weights=weights), delta)


class GatedStep:
    """Runs a step as it is while a gate is shut, and with adapted weights once it is open.

    Args:
        gate: of the stream.
        shut: runs the step as it is.
        adapting: runs it with adapted weights.
    """

    def __init__(self, gate: StreamGate, shut: BatchStep, adapting: Runner) -> None:
        self.undo = Undo()
        self._gate, self._shut, self._adapting = gate, shut, adapting

    @classmethod
    def of(
        cls,
        module: LightningModule,
        host: IT3Module,
        settings: Settings,
        gate: StreamGate,
        adapting: Runner,
    ) -> Self:
        """Return the step of a module behind a gate, given what runs it with adapted weights."""
        still = replace(still_settings(settings), measure=False)
        as_it_is = adapter_of(module, host, still, silent=True)
        return cls(gate, BatchStep(module, host, as_it_is, "first"), adapting)

    @property
    def adapter(self) -> Adapter:
        """What adapts once the gate is open."""
        return self._adapting.adapter

    def restart(self) -> None:
        """Begin a stream: from the source, with the gate shut."""
        self._gate.restart()
        self._shut.restart()
        self._adapting.restart()

    def run(self, inputs: Any, step: Callable[[], Any]) -> tuple[Any, Adaptation]:
        """Bet on the inputs, and run the step."""
        with self.undo as undo:
            for part in (self._gate, self._shut, self._adapting):
                undo.add(part.undo.run)
            bet = self._gate.bet(normal(inputs))
            if bet.opens:
                output, adaptation = self._adapting.run(inputs, step)
                return output, self._gate.settle(bet, adaptation)
            output, _ = self._shut.run(inputs, step)
            return output, self._gate.settle(bet)


Runner = BatchStep | PerSampleStep | GatedStep
"""Runs the step of a module on each batch, with weights adapted to it or not."""
