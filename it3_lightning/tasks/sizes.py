"""Refuses a network whose sizes are not those of the data, before the first batch meets it."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule


def check_sizes(module: LightningModule) -> None:
    """Compare a module's sizes with those of its Trainer's data module, where both tell them.

    ``network.in_features`` belongs to ``num_features`` of the data; ``network.out_features`` and
    ``it3_prior.channels`` belong to ``num_outputs``.

    Args:
        module: with a ``network``, attached to a Trainer.

    Raises:
        MisconfigurationException: they differ.
    """
    data = getattr(module._trainer, "datamodule", None)
    for part, size, wanted in (
        ("network", "in_features", "num_features"),
        ("network", "out_features", "num_outputs"),
        ("it3_prior", "channels", "num_outputs"),
    ):
        got = getattr(getattr(module, part, None), size, None)
        expected = getattr(data, wanted, None) if isinstance(got, int) else None
        if isinstance(expected, int) and expected != got:
            raise MisconfigurationException(
                f"Expected {part}.{size} to be {expected}, the {wanted} of {type(data).__name__}, "
                f"got {got}. Write {expected} where {part.removeprefix('it3_')} is made."
            )
