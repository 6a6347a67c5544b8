"""Whole runs that are cut short, anywhere."""
