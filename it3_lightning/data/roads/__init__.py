"""Aerial images with masks of the roads: their data modules, files and drawn scenes."""
