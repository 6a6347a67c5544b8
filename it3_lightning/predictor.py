"""A module from a checkpoint, and whether its weights are ready to predict with."""

from __future__ import annotations

import threading
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from it3_lightning.calibration import check_level, gate_of, moments_of, source_of
from it3_lightning.engine import Adaptation, Settings, batch_size
from it3_lightning.engine.trees import taken
from it3_lightning.integration.batches import normal
from it3_lightning.integration.module import UNTRAINED, host_of, untrained
from it3_lightning.integration.module_adapter import WhichPrediction as Which
from it3_lightning.integration.module_adapter import adapter_of, answer_of, in_precision
from it3_lightning.integration.policies import Policy, calibration_in, check_policy
from it3_lightning.integration.stream_gate import StreamGate, check_delta, stream_gate_of
from it3_lightning.utils.files import check_archive
from it3_lightning.utils.messages import unknown


def loaded(
    path: str | Path, module_class: type[LightningModule], kwargs: dict[str, Any]
) -> LightningModule:
    """Return the module in a checkpoint that a Trainer wrote.

    Args:
        path: of the checkpoint.
        module_class: of the module in it.
        kwargs: of ``module_class.load_from_checkpoint``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no Trainer wrote it, it is damaged, or it is of another module; or it is at an
            address, and not said to be read as weights only.
    """
    if "://" in str(path) and not kwargs.get("weights_only"):
        raise ValueError(
            f"Expected a file, got an address: {path}. What is read from there could run code of "
            "its own. Fetch the file from where you trust it, or give weights_only=True."
        )
    check_checkpoint(path)
    try:
        with torch.inference_mode(False):
            return module_class.load_from_checkpoint(path, **kwargs)
    except (MisconfigurationException, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # content of any kind
        raise ValueError(
            f"Expected a checkpoint of {module_class.__name__} that a Trainer wrote, got another: "
            f"{path} ({type(error).__name__}: {error}). Give arguments that it does not hold by "
            "keyword. Load weights alone into a module, and make the predictor of that: "
            "IT3Predictor(module)."
        ) from error


def check_checkpoint(path: str | Path) -> None:
    """Refuse a local file or folder that no Trainer wrote, or that is not what it wrote.

    Raises:
        ValueError: it is one.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"Expected a checkpoint that a Trainer wrote, got a folder: {path}.")
    if not file.is_file():
        return  # an address, or nothing
    if not zipfile.is_zipfile(file):  # which Trainers write
        raise ValueError(
            f"Expected a checkpoint that a Trainer wrote, got another or a truncated file: {path}."
        )
    check_archive(file)


def check_weights(module: LightningModule) -> None:
    """Refuse weights that cannot adapt, and those of a network that still waits for its own.

    Raises:
        MisconfigurationException: they were made in inference mode, or never loaded.
    """
    if any(parameter.is_inference() for parameter in module.parameters()):
        raise MisconfigurationException(
            f"{type(module).__name__} was made in inference mode, where no weight can adapt. Make "
            "or load it outside of torch.inference_mode()."
        )
    if getattr(module, "it3_source_due", False):
        raise MisconfigurationException(
            f"{type(module).__name__} has not loaded its source_checkpoint, nor trained its "
            "conditioning. Fit it first, or load a checkpoint written after fitting: "
            "IT3Predictor.from_checkpoint(path, ...)."
        )


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of one batch. All tensors are detached and on the input's device.

    Args:
        outputs: ``(B, ...)``, the network's outputs from the adapted weights, from the source's
            where a sample was skipped: its first prediction, or what the predictor is asked for.
        source_outputs: ``(B, ...)``, outputs of the network as it was trained, without a prior.
        distance: ``(B,)``, the objective's measure with the source weights. With
            :class:`~it3_lightning.Idempotence` it is the idempotence distance
            :math:`d(y_0, F(x, y_0))`, in units of its ``distance``, a score of how unlike the
            training data a sample is: the larger, the more (Durasov et al., ZigZag, TMLR 2024). NaN
            where it was not measured; 0 everywhere where the conditioning has not been trained.
        distance_adapted: ``(B,)``, the same with the adapted weights.
        skipped: ``(B,)`` booleans, the samples that got the source prediction.
        reason: why they were skipped.
        gated: ``(B,)`` booleans, the samples within the gate, which were not adapted to.
    """

    outputs: Tensor
    source_outputs: Tensor
    distance: Tensor
    distance_adapted: Tensor
    skipped: Tensor
    reason: str | None
    gated: Tensor

    def split(self) -> list[Prediction]:
        """Return the predictions of the single samples, each a batch of one.

        >>> y, d = torch.tensor([[1.0], [2.0]]), torch.tensor([0.1, 0.2])
        >>> no = torch.tensor([False, False])
        >>> [p.outputs.item() for p in Prediction(y, y, d, d, no, None, no).split()]
        [1.0, 2.0]
        """
        parts = []
        for index, skipped in enumerate(self.skipped.tolist()):
            rows: dict[str, Any] = {
                name: value[index : index + 1]
                for name, value in vars(self).items()
                if isinstance(value, Tensor)
            }
            parts.append(replace(self, **rows, reason=self.reason if skipped else None))
        return parts

    @classmethod
    def of(cls, adaptation: Adaptation, device: torch.device) -> Prediction:
        """Return what came of an adaptation that measured, on a device."""
        outputs, source = adaptation.outputs, adaptation.source_outputs
        assert outputs is not None
        assert source is not None
        nowhere = torch.full(adaptation.skipped.shape, float("nan"))
        gated = adaptation.gated
        before, after = adaptation.distance_source, adaptation.distance_adapted
        return cls(
            outputs=outputs.to(device),
            source_outputs=source.to(device),
            distance=(nowhere if before is None else before).to(device),
            distance_adapted=(nowhere if after is None else after).to(device),
            skipped=adaptation.skipped.to(device),
            reason=adaptation.reason,
            gated=(torch.zeros_like(adaptation.skipped) if gated is None else gated).to(device),
        )


Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class IT3Predictor:
    """Adapts a module to each batch it is called on, predicts, and puts every weight back.

    Calls may come from several threads: a lock lets one adapt after the other, and grad mode,
    inference mode and autocast of the calling thread neither matter nor change. Make one predictor
    of a module, and use the module nowhere else while it predicts; make it in the process that
    predicts, as it cannot be pickled.

    Where weights are carried along (``reset`` other than ``"batch"``), every call moves those that
    the next one starts from, whichever client it comes from; :meth:`restart` forgets them.

    Args:
        module: a LightningModule with :class:`~it3_lightning.IT3Mixin`, or any that satisfies
            :class:`~it3_lightning.integration.module.IT3Module`. Moved to the device and put in
            evaluation mode, once.
        settings: how to adapt. Default: as ``it3 calibrate`` chose for this module, where neither
            gate nor prediction is given; where nothing was chosen for these weights, nothing is
            adapted, and a warning says so. With ``scope="sample"`` a sample's prediction does not
            depend on what else is in its batch. With ``norm_stats="batch"`` the samples of one call
            share their statistics, and a call on a single one is skipped.
        device: where to predict; default: where the module is.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``, as in a Trainer; outputs come
            in the precision that the network puts out.
        gate: share of validation samples, such as 0.95, whose distance a sample must exceed to be
            adapted to, as known to the module's checkpoint from a Trainer with the callback; the
            distance itself is ``Settings.gate``. ``"bet"``: calls get the source's first
            predictions until a bet along all of them has proved a shift, see
            :class:`~it3_lightning.TestTimeCallback`; :meth:`restart` begins anew.
        delta: of ``gate="bet"``: probability of ever adapting where all samples are like the
            validation samples, in random order, at most.
        prediction: what :attr:`Prediction.outputs` are: ``"first"``: ``f(x, 0)``; ``"second"``:
            ``f(x, f(x, 0))``; ``"mean"``: the mean of both, of probabilities or of values. The
            latter two cost further forward passes.
        policy: ``"calibrated"``: as ``it3 calibrate`` chose for this module on validation data, and
            put into its checkpoint. Where none was chosen, or for other weights, the module is
            refused. No settings, gate or prediction go beside it.

    Warns of a conditioning that has not been trained: both predictions of a sample are equal then.

    Raises:
        ValueError: the precision or the prediction is unknown, the settings measure no distance,
            delta is no probability, there are two gates, or settings beside a policy.
        MisconfigurationException: the module does not predict with a prior, its prior does not know
            the targets yet, its ``source_checkpoint`` was never loaded, its weights were made in
            inference mode, the selection of parameters matches nothing, or the gate, the policy or
            what the method must know of source data is not known.

    >>> from it3_lightning import ClassPrior, FeatureInjection
    >>> from it3_lightning.tasks import IT3Classifier
    >>> module = IT3Classifier(
    ...     torch.nn.Linear(1, 2), prior=ClassPrior(2), conditioning=FeatureInjection("network")
    ... )
    >>> for parameter in module.parameters():  # f(x, 0) = [0, 0], f(x, y) = [log 3, 0]
    ...     _ = torch.nn.init.zeros_(parameter)
    >>> last = module.it3_conditioning.embedders["network"].last
    >>> last.bias.data = torch.tensor([3.0, 1.0]).log()
    >>> prediction = IT3Predictor(module, Settings(steps=1))(torch.ones(2, 1))
    >>> prediction.distance  # (1/2 - 3/4)^2 + (1/2 - 1/4)^2
    tensor([0.1250, 0.1250])
    """

    def __init__(
        self,
        module: LightningModule,
        settings: Settings | None = None,
        *,
        device: str | torch.device | None = None,
        precision: Precision = "32-true",
        gate: float | Literal["bet"] | None = None,
        delta: float = 0.01,
        prediction: Which = "first",
        policy: Literal["calibrated"] | None = None,
    ) -> None:
        if precision not in _AUTOCAST:
            raise ValueError(unknown("precision", precision, _AUTOCAST))
        if prediction not in get_args(Which):
            raise ValueError(unknown("prediction", prediction, get_args(Which)))
        beside = {"settings": settings, "gate": gate}
        names = [name for name, value in beside.items() if value is not None]
        names += ["prediction"] * (prediction != "first")
        check_policy(policy, names)
        self.policy = doubt = ""
        """Which policy of ``it3 calibrate`` is followed, by its name; empty: none."""
        if not names:
            chosen = Policy.default(module) if policy is None else Policy.of(module)
            settings, prediction = replace(chosen.settings, measure=True), chosen.prediction
            self.policy, doubt = chosen.name, chosen.doubt
        self.settings = settings or Settings()
        if not self.settings.measure:
            raise ValueError("Expected settings with measure=True, for the distances, got False.")
        self._host = host_of(module, self.settings.method)
        check_weights(module)
        check_delta(delta)
        if self.settings.method.needs_prior and untrained(module):
            rank_zero_warn(UNTRAINED)
        if doubt:
            rank_zero_warn(doubt)
        if gate is not None:
            self.settings = _gated(self.settings, gate, module)
        with torch.inference_mode(False):
            self.module = module.eval() if device is None else module.eval().to(device)
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.precision = precision
        self.prediction = prediction
        if source := source_of(module, self.settings):
            self.settings.method.load_source_dict(source)
        moments = moments_of(module) if self.settings.norm_stats == "evidence" else None
        self._adapter = adapter_of(
            module, self._host, self.settings, moments=moments, prediction=prediction
        )
        self._answer = answer_of(self._host, prediction)
        self._gate: StreamGate | None = None
        if gate == "bet":
            self._gate = stream_gate_of(module, self._host, self.settings, delta)
        self._lock = threading.Lock()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        module_class: type[LightningModule],
        *,
        settings: Settings | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "32-true",
        gate: float | Literal["bet"] | None = None,
        delta: float = 0.01,
        prediction: Which = "first",
        policy: Literal["calibrated"] | None = None,
        **kwargs: Any,
    ) -> IT3Predictor:
        """Return a predictor of the module in a checkpoint that a Trainer wrote.

        Args:
            path: of the checkpoint.
            module_class: of the module in it.
            settings: see :class:`IT3Predictor`.
            device: see :class:`IT3Predictor`.
            precision: see :class:`IT3Predictor`.
            gate: see :class:`IT3Predictor`.
            delta: see :class:`IT3Predictor`.
            prediction: see :class:`IT3Predictor`.
            policy: see :class:`IT3Predictor`; that of the file, also for a module that keeps no
                calibration.
            kwargs: of ``module_class.load_from_checkpoint``: arguments of the module that the
                checkpoint does not hold; ``weights_only=True`` for a file that may not be trusted.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no Trainer wrote it, it is damaged, of another module, or asked for a policy
                and has none.
        """
        module = loaded(path, module_class, {"map_location": device, **kwargs})
        given: dict[str, Any] = {"gate": gate, "delta": delta, "prediction": prediction}
        given["policy"] = policy
        if policy is not None and not hasattr(module, "it3_calibration"):
            module.it3_calibration = calibration_in(path)  # type: ignore[assignment]
        return cls(module, settings, device=device, precision=precision, **given)

    def __call__(self, x: Any) -> Prediction:
        """Return the prediction for a batch, from weights adapted to it.

        A batch that cannot be adapted to (a non-finite sample in it, say) gets the source
        prediction, with ``scope="sample"`` only the sample; the :class:`Prediction` says so, and
        why.

        Args:
            x: what the network takes: tensors ``(B, ...)``, possibly nested; a tuple or a list is
                spread over the arguments of its ``forward``. A batch dimension is needed for a
                single sample too: ``image[None]``.

        Raises:
            ValueError: there is no tensor with a batch dimension in ``x``, or no sample.
        """
        if batch_size(x) == 0:
            raise ValueError("Expected at least one sample in a batch, got none.")
        home = next((leaf.device for leaf in tree_leaves(x) if isinstance(leaf, Tensor)), None)
        dtype = _AUTOCAST[self.precision]
        autocast = torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
        with torch.inference_mode(False), torch.no_grad():
            inputs = normal(move_data_to_device(x, self.device))
            with self._lock, autocast:
                adaptation = self._adapted(inputs) if self._gate is None else self._behind(inputs)
            return Prediction.of(adaptation, home or self.device)

    def _adapted(self, inputs: Any) -> Adaptation:
        """Adapt, and return as outputs what is asked for."""
        with self._adapter.adapted(inputs, self._answer) as adaptation:
            if self._answer is not None:
                adaptation = replace(adaptation, outputs=adaptation.answers)
            elif adaptation.prediction is not None and adaptation.outputs is not None:
                answer = self._host.it3_prior.to_output
                outputs = answer(adaptation.prediction, adaptation.outputs)
                adaptation = replace(adaptation, outputs=outputs)
            return self._in_precision(adaptation, inputs)

    def _behind(self, inputs: Any) -> Adaptation:
        """Bet on a batch, and adapt to it once the gate is open."""
        assert self._gate is not None
        bet = self._gate.bet(inputs)
        return self._gate.settle(bet, self._adapted(inputs) if bet.opens else None)

    def _in_precision(self, adaptation: Adaptation, inputs: Any) -> Adaptation:
        def ordinary() -> list[Tensor]:
            one = taken(inputs, range(1))
            if self._answer is None:
                return 2 * [self._host.predict_with(one, None)]
            return list(self._answer(one))[::-1]

        both = [t for t in (adaptation.outputs, adaptation.source_outputs) if t is not None]
        outputs, source = in_precision(both, ordinary, self._adapter, self.module)
        return replace(adaptation, outputs=outputs, source_outputs=source)

    def restart(self) -> None:
        """Forget the weights that were carried along: the next call starts from the source."""
        with self._lock:
            self._adapter.restart()
            if self._gate is not None:
                self._gate.restart()


def _gated(settings: Settings, gate: float | Literal["bet"], module: LightningModule) -> Settings:
    """Return the settings with the distance that this share of validation samples lies within.

    A bet adapts to what it adapts to as it is.
    """
    if gate != "bet":
        check_level(gate)
    if settings.gate is not None:
        raise ValueError(
            f"Expected a gate as a share, gate={gate}, or as a distance, Settings(gate="
            f"{settings.gate}), got both."
        )
    return settings if gate == "bet" else replace(settings, gate=gate_of(module, settings, gate))
