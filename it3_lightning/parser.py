"""The command line's parser, which says how to install what a configuration needs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

EXTRAS: Mapping[str, str] = MappingProxyType(
    {"segmentation_models_pytorch": "vision", "timm": "vision"}
)
"""Packages that configurations name as a ``class_path``, and the extra that brings each."""


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with a hint where an optional package is missing."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse the arguments; say how to install a missing package that they name."""
        super().error(with_hint(message), ex)


def with_hint(message: str) -> str:
    r"""Return a message with the way to install the optional package whose import it says failed.

    >>> with_hint("No module named 'timm'")
    "No module named 'timm'\nInstall it with: pip install 'it3_lightning[vision]'"
    """
    for package, extra in EXTRAS.items():
        missing = f"No module named '{package}'", f"import of {package} halted"
        if any(text in message for text in missing):
            return f"{message}\nInstall it with: pip install 'it3_lightning[{extra}]'"
    return message
