"""Layers of the architectures; each takes the few numbers it needs."""
