"""The former place of `it3_lightning.integration.module`, for imports of earlier versions."""

from it3_lightning.integration.module import IT3Module, check_parts

__all__ = ["IT3Module", "check_parts"]
