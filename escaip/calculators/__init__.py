"""A trained potential in the programs that people already use."""

from escaip.calculators.ase import EScAIPCalculator
from escaip.calculators.committee import CommitteeCalculator
from escaip.calculators.dispersion import with_dispersion

__all__ = ["CommitteeCalculator", "EScAIPCalculator", "with_dispersion"]
