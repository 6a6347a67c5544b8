"""Tests that need the fast paths, where these are turned off."""

import pytest

from it3_lightning.engine import fast

needs_fast_paths = pytest.mark.skipif(not fast.enabled(), reason="fast paths are turned off")


def taken(backend: str) -> str:
    """Name the backend that serves where this one is asked for: without fast paths, the loop."""
    return backend if fast.enabled() else "loop"
