"""Drawn aerial scenes with roads, for where there are no photographs."""

from it3_lightning.data.scenes.scene import RoadScenes

__all__ = ["RoadScenes"]
