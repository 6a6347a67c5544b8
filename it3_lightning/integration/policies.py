"""Policy: how ``it3 calibrate`` chose to adapt a module; where it chose nothing, no adaptation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from it3_lightning.calibration import Calibration, fingerprint
from it3_lightning.engine import Settings
from it3_lightning.integration.checkpoints import KEPT
from it3_lightning.integration.module_adapter import WhichPrediction
from it3_lightning.methods import TestTimeMethod
from it3_lightning.utils.files import load_plain
from it3_lightning.utils.specs import built


@dataclass(frozen=True)
class Policy:
    """How to predict with a module.

    Args:
        settings: of the adaptation.
        prediction: what is predicted.
        name: by which it was chosen.
        doubt: why nothing is adapted though nobody chose that; empty where it was chosen.
    """

    settings: Settings
    prediction: WhichPrediction = "first"
    name: str = ""
    doubt: str = ""

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> Self:
        """Return the policy that plain data describe, as they stand in a calibration.

        >>> Policy.read({"name": "x", "arguments": {"steps": 0, "prediction": "second"}}).prediction
        'second'
        """
        arguments = dict(kept["arguments"])
        method = built(arguments.pop("objective", None), TestTimeMethod)  # type: ignore[type-abstract]
        prediction = arguments.pop("prediction", "first")
        given = {} if method is None else {"objective": method, **getattr(method, "defaults", {})}
        settings = Settings(**{**given, **arguments})
        check_prediction(prediction, settings)
        return cls(settings, prediction, kept["name"])

    @classmethod
    def of(cls, module: nn.Module, calibration: Calibration | None = None) -> Self:
        """Return the policy that was chosen for a module with the weights it has.

        Args:
            module: that is to predict by it.
            calibration: that holds it; default: the module's own.

        Raises:
            MisconfigurationException: none was, or for other weights.
        """
        kept = calibration or getattr(module, "it3_calibration", None)
        policy = kept.policy if isinstance(kept, Calibration) else {}
        if not policy:
            raise MisconfigurationException(f"No policy has been chosen for this module. {_CHOOSE}")
        if policy.get("weights") != fingerprint(module):
            raise MisconfigurationException(
                f"The policy {policy.get('name')!r} was chosen for other weights than these. "
                f"{_CHOOSE}"
            )
        return cls.read(policy)

    @classmethod
    def default(cls, module: nn.Module) -> Self:
        """Return what holds where nobody said how to adapt: the policy that was chosen, or none.

        Without a policy nothing is known of what adaptation does to this module, so it measures
        distances, unless they depend on the other samples, and adapts nothing.
        """
        try:
            return cls.of(module)
        except MisconfigurationException as error:
            alone = getattr(getattr(module, "it3_prior", None), "context", None) is None
            still = Settings(steps=0, measure=alone)
            return cls(still, doubt=f"Nothing was adapted. {error} {_SAY}")


_CHOOSE = (
    "Run it3 calibrate --config FILE --ckpt_path CHECKPOINT, which chooses one on validation data "
    "and puts it into the checkpoint; load that, and change no weight."
)
_SAY = (
    "Nobody has measured whether adaptation helps here or harms; to adapt all the same, say how: "
    "steps=1, prediction='second', a method."
)


def check_prediction(prediction: str, settings: Settings) -> None:
    """Refuse an unknown prediction, and one beside a method that predicts by itself.

    Raises:
        ValueError: it is one.
    """
    if prediction not in get_args(WhichPrediction):
        raise ValueError(f"Expected prediction 'first', 'second' or 'mean', got {prediction!r}.")
    if prediction != "first" and settings.predicts:
        name = type(settings.method).__name__
        raise ValueError(f"{name} predicts by itself: leave out prediction={prediction!r}.")


def check_policy(policy: str | None, told: Iterable[str]) -> None:
    """Refuse an unknown policy, and what says how to adapt beside one.

    Args:
        policy: ``"calibrated"`` or ``None``.
        told: names of the arguments that say how to adapt.

    Raises:
        ValueError: it is another, or there are some.
    """
    if policy not in ("calibrated", None):
        raise ValueError(f"Expected policy 'calibrated' or None, got {policy!r}.")
    if policy is not None and (names := ", ".join(told)):
        raise ValueError(
            f"policy='calibrated' says how to adapt, and so does {names}. Leave out one of them."
        )


def calibration_in(path: str | Path) -> Calibration:
    """Return the calibration that a checkpoint holds, with a policy; what it holds runs no code.

    Raises:
        ValueError: it is no checkpoint of a Trainer, or holds no policy.
    """
    content, calibration = load_plain(path), Calibration()
    kept = content.get(KEPT, {}) if isinstance(content, Mapping) else {}
    calibration.load_state_dict(kept.get("calibration", {}))
    if not calibration.policy:
        raise ValueError(
            f"Expected a checkpoint with a policy, got one without: {path}. Run it3 calibrate "
            f"--config FILE --ckpt_path {path}, which chooses one and puts it there."
        )
    return calibration
