"""Architectures: from atoms and tokens to per-atom energies."""
