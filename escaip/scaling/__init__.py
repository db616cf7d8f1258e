"""Scaling laws: what a model costs."""
