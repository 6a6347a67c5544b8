"""Passes that leave no trace in buffers, attributes, flags and the random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from it3_lightning.engine.randomness import undisturbed_rng
from it3_lightning.snapshot import Snapshot


@contextmanager
def untraced(snapshot: Snapshot) -> Iterator[None]:
    """Undo what passes write, outside inference mode and with gradients on."""
    with torch.inference_mode(False), torch.enable_grad(), undisturbed_rng():
        try:
            yield
        finally:
            snapshot.restore_buffers()
            snapshot.restore_attributes()
            snapshot.restore_flags()
            torch.clear_autocast_cache()
