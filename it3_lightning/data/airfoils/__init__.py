"""Airfoils: values inside a range of training and outside it."""
