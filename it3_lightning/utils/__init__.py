"""Helpers of every layer: error messages, objects as plain data, batches of graphs."""
