"""Helpers of every layer: error messages, objects as plain data, batches of graphs."""

TARGET_NAMES = ("target", "targets", "label", "labels", "y", "mask", "masks", "class")
"""Under which the targets of a batch that is a mapping are found."""
