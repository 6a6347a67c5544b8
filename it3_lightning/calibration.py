"""How large the distance usually is: its quantiles on validation data, kept with the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from it3_lightning.engine import Settings
from it3_lightning.engine.types import NormStats
from it3_lightning.methods import TestTimeMethod, TestTimeObjective

_LEVELS = 1000  # quantiles kept, besides that of level 0
_LETTERS = 128  # bytes of the name of what the distances were measured by


class Calibration(nn.Module):
    """Quantiles of a distance, and which distance it was; part of a module's checkpoint.

    They stay in single precision where the module is cast to half.

    >>> calibration = Calibration()
    >>> calibration.take(torch.arange(101.0), by="l2")
    >>> calibration.quantile(0.955, by="l2")
    95.5
    """

    quantiles: Tensor
    name: Tensor  # as bytes, so that the state holds nothing but tensors

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("quantiles", torch.zeros(_LEVELS + 1, dtype=torch.float32))
        self.register_buffer("name", torch.zeros(_LETTERS, dtype=torch.uint8))

    def take(self, distances: Tensor, *, by: str) -> None:
        """Keep the quantiles of distances ``(N,)``, linear between the samples.

        Args:
            distances: of validation samples; those that are not finite do not count, and where none
                is left, what was known before is forgotten.
            by: what they were measured by.
        """
        known = distances[distances.isfinite()].cpu().sort().values
        self.name.zero_()
        if not known.numel():
            return
        levels = torch.linspace(0, 1, _LEVELS + 1, dtype=torch.float64)
        self.quantiles.copy_(_between(known, levels))
        self.name.copy_(torch.tensor(list(_letters(by)), dtype=torch.uint8))

    def quantile(self, level: float, *, by: str) -> float:
        """Return the distance that this share of the validation samples does not exceed.

        Args:
            level: the share, in [0, 1].
            by: what the distance is to be measured by.

        Raises:
            MisconfigurationException: nothing has been measured, or by something else.
        """
        if bytes(self.name.tolist()) != _letters(by):
            has = f"were measured by {self.by}" if self.by else "have not been measured"
            raise MisconfigurationException(
                f"The gate needs distances of validation samples, measured by {by}; they {has}. "
                f"Run Trainer(callbacks=[IT3TestTimeCallback(gate={level})]).validate(model, data) "
                "once, or have that callback in trainer.fit; they are kept in the checkpoint."
            )
        return float(_between(self.quantiles.cpu(), torch.tensor([level], dtype=torch.float64)))

    @property
    def by(self) -> str:
        """What the distances were measured by; empty where none were."""
        return bytes(self.name.tolist()).rstrip(b"\0").decode(errors="ignore")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Calibration:
        before = self.quantiles
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.quantiles.dtype != before.dtype:
            self.quantiles = before.to(self.quantiles.device)
        return self


def measured_by(objective: TestTimeMethod | TestTimeObjective, norm_stats: NormStats) -> str:
    """Name what a distance is measured by.

    >>> from it3_lightning.objectives import Idempotence
    >>> measured_by(Idempotence("js"), "batch")
    "Idempotence, distance 'js', norm_stats 'batch'"
    """
    distance = getattr(objective, "distance", None)
    if distance is not None and not isinstance(distance, str):
        distance = getattr(distance, "__qualname__", type(distance).__qualname__)
    which = "" if distance is None else f", distance {distance!r}"
    return f"{type(objective).__name__}{which}, norm_stats {norm_stats!r}"


def calibration_of(module: nn.Module) -> Calibration:
    """Return the calibration of a module.

    Raises:
        MisconfigurationException: it has none.
    """
    calibration = getattr(module, "it3_calibration", None)
    if not isinstance(calibration, Calibration):
        raise MisconfigurationException(
            f"The gate keeps quantiles of distances in the module, and {type(module).__name__} has "
            "no place for them. Mix IT3Mixin into it, or set self.it3_calibration = Calibration(), "
            "from it3_lightning.calibration, in its constructor."
        )
    return calibration


def gate_of(module: nn.Module, settings: Settings, level: float) -> float:
    """Return the distance that this share of the validation samples does not exceed.

    Raises:
        MisconfigurationException: it is not known.
    """
    by = measured_by(settings.objective, settings.norm_stats)
    return calibration_of(module).quantile(level, by=by)


def check_level(gate: float | None) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: it is not.
    """
    if gate is not None and not 0 <= gate <= 1:
        raise ValueError(f"Expected gate to be a share in [0, 1] or None, got {gate}.")


def _between(ordered: Tensor, levels: Tensor) -> Tensor:
    """Return quantiles of ordered values ``(N,)``, linear between them."""
    places = levels * (len(ordered) - 1)
    low, high = ordered.double()[places.floor().long()], ordered.double()[places.ceil().long()]
    return low + (high - low) * (places - places.floor())


def _letters(name: str) -> bytes:
    return name.encode()[:_LETTERS].ljust(_LETTERS, b"\0")
