"""Potentials as calculators of the programs that people already use."""

from escaip.calculators.ase import EScAIPCalculator
from escaip.calculators.committee import CommitteeCalculator
from escaip.calculators.dispersion import DispersionCalculator
from escaip.calculators.remote import RemoteCalculator

__all__ = ["CommitteeCalculator", "DispersionCalculator", "EScAIPCalculator", "RemoteCalculator"]
