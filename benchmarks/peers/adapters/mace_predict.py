"""Energies and forces of a trained MACE model on the frames of a file, in MACE's environment.

python benchmarks/peers/adapters/mace_predict.py MODEL FRAMES OUT
"""

from __future__ import annotations

import os
import sys

import mace.calculators  # first: it lets its own e3nn load its constants
import numpy as np
from ase.io import read


def main() -> None:
    model, frames, out = sys.argv[1:]
    calculator = mace.calculators.MACECalculator(model_paths=[model], device="cpu", default_dtype="float32")
    energies, forces = [], []
    for atoms in read(frames, index=":"):
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    parameters = sum(parameter.numel() for parameter in calculator.models[0].parameters())
    aside = f"{out}.part"
    with open(aside, "wb") as stream:
        np.savez(stream, energies=np.array(energies), forces=np.concatenate(forces), parameters=parameters)
    os.replace(aside, out)


if __name__ == "__main__":
    main()
