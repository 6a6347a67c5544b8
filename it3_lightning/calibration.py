"""How large the distance usually is: its quantiles on validation data, kept with the weights."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from it3_lightning.engine import Settings
from it3_lightning.engine.norm import NormStats
from it3_lightning.objectives import TestTimeObjective

_LEVELS = 1000  # quantiles kept, besides that of level 0
_LETTERS = 128  # bytes of the name of what the distances were measured by


class Calibration(nn.Module):
    """Quantiles of a distance, and which distance it was; part of a module's checkpoint.

    >>> calibration = Calibration()
    >>> calibration.take(torch.arange(101.0), by="l2")
    >>> calibration.quantile(0.95, by="l2")
    95.0
    """

    quantiles: Tensor
    name: Tensor  # as bytes, so that the state holds nothing but tensors

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("quantiles", torch.zeros(_LEVELS + 1))
        self.register_buffer("name", torch.zeros(_LETTERS, dtype=torch.uint8))

    def take(self, distances: Tensor, *, by: str) -> None:
        """Keep the quantiles of distances ``(N,)``.

        Args:
            distances: of validation samples; those that are not finite do not count.
            by: what they were measured by.
        """
        known = distances[distances.isfinite()].sort().values
        if known.numel():
            levels = torch.linspace(0, 1, _LEVELS + 1, device=known.device, dtype=torch.float64)
            self.quantiles.copy_(known[(levels * (len(known) - 1)).round().long()])
            letters = by.encode()[:_LETTERS].ljust(_LETTERS, b"\0")
            self.name.copy_(torch.tensor(list(letters), dtype=torch.uint8))

    def quantile(self, level: float, *, by: str) -> float:
        """Return the distance that this share of the validation samples does not exceed.

        Raises:
            MisconfigurationException: nothing has been measured, or by something else.
        """
        if self.by != by:
            has = f"were measured by {self.by}" if self.by else "have not been measured"
            raise MisconfigurationException(
                f"The gate needs distances of validation samples, measured by {by}; they {has}. "
                "Run trainer.validate(model, data) once with this callback, or have it among the "
                "callbacks of trainer.fit; they are kept in the checkpoint."
            )
        return float(self.quantiles[round(level * _LEVELS)])

    @property
    def by(self) -> str:
        """What the distances were measured by; empty where none were."""
        return bytes(self.name.tolist()).rstrip(b"\0").decode(errors="ignore")


def measured_by(objective: TestTimeObjective, norm_stats: NormStats) -> str:
    """Name what a distance is measured by.

    >>> from it3_lightning.objectives import Idempotence
    >>> measured_by(Idempotence("js"), "batch")
    "Idempotence, distance 'js', norm_stats 'batch'"
    """
    distance = getattr(objective, "distance", None)
    name = getattr(distance, "__qualname__", distance)
    which = "" if name is None else f", distance {name!r}"
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
            "no place for them. Mix IT3Mixin into it, or set it3_calibration = Calibration()."
        )
    return calibration


def gate_of(module: nn.Module, settings: Settings, level: float) -> float:
    """Return the distance that this share of the validation samples does not exceed."""
    by = measured_by(settings.objective, settings.norm_stats)
    return calibration_of(module).quantile(level, by=by)
