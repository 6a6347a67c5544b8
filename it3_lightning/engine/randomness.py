"""Random numbers drawn inside leave the global generators as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed_rng() -> Iterator[None]:
    """Put the CPU's generator and the current accelerator's back on leaving.

    >>> before = torch.get_rng_state()
    >>> with undisturbed_rng():
    ...     _ = torch.rand(3)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cpu, device = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)
