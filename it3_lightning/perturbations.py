"""The former place of `RandomNoise`, by which checkpoints of earlier versions name it."""

from it3_lightning.training import RandomNoise

__all__ = ["RandomNoise"]
