"""Error messages that say what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST = 20  # names listed at most, so that a message fits in the eye


def closest(got: str, known: Iterable[str]) -> str:
    """Return a hint that names the known names nearest to ``got``, or an empty string.

    >>> closest("layer_2", ["layer1", "layer2"])
    " Did you mean 'layer2' or 'layer1'?"
    """
    close = difflib.get_close_matches(got, list(known), n=3, cutoff=0.4)
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def unknown(kind: str, got: object, known: Iterable[str]) -> str:
    """Say that a name is unknown, which is closest, and which there are.

    >>> unknown("distance", "l3", ["l1", "l2"])
    "Unknown distance 'l3'. Did you mean 'l2' or 'l1'? Known: l1, l2."
    """
    names = [name for name in known if name]
    listed = ", ".join(names[:_MOST]) + (", ..." if len(names) > _MOST else "")
    return f"Unknown {kind} {got!r}.{closest(str(got), names)} Known: {listed}."


def not_installed(package: str, purpose: str, extra: str, error: ImportError) -> str:
    """Say which package is missing, what for, and how to install it.

    >>> not_installed("timm", "which has the network", "vision", ImportError("No module 'timm'"))
    "Expected timm, which has the network, but it cannot be imported (No module 'timm'). \
Install it with: pip install 'it3_lightning[vision]'"
    """
    return (
        f"Expected {package}, {purpose}, but it cannot be imported ({error}). "
        f"Install it with: pip install 'it3_lightning[{extra}]'"
    )


def undefined(owner: object, signature: str, returns: str) -> NotImplementedError:
    """Say which method a subclass has to define, and what it returns.

    >>> undefined("ab", "load(self) -> Table", "Return the rows.")
    NotImplementedError('Expected str to define load(self) -> Table. Return the rows.')
    """
    return NotImplementedError(f"Expected {type(owner).__name__} to define {signature}. {returns}")
