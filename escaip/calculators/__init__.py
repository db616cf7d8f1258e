"""A trained potential in the programs that people already use."""

from escaip.calculators.ase import EScAIPCalculator

__all__ = ["EScAIPCalculator"]
