"""Makes the OMat24 sample: rattled and strained metals and alloys, labelled by EMT, in an ASE database in LMDB.

Displacements are drawn as OMat24 draws them for its rattled parts, with a spread that grows with temperature; here
it is chosen and not derived. Labels are those of ASE's EMT calculator, not DFT: see the card beside this file.

Writes ``sample.aselmdb``:

    OMP_NUM_THREADS=1 python datasets/omat24/make_sample.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

sys.path.insert(0, str(Path(__file__).parent.parent))

from samples import crystal, report, write_aselmdb

FOLDER = Path(__file__).parent
SPREADS = {"rattled-300": 0.06, "rattled-500": 0.10, "rattled-1000": 0.15}
"""Å, standard deviation of the displacements of each part."""

STRAIN = 0.04
FRAMES_PER_PART = 5
PARENTS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au", "CuAu", "NiPt", "AgPd", "AlNi", "CuPd")


def children(number: int, name: str) -> list[Atoms]:
    """Labelled structures of one parent."""
    rng = np.random.default_rng(number)
    found = []
    for part, spread in SPREADS.items():
        for index in range(FRAMES_PER_PART):
            atoms = crystal(name)
            strain = rng.uniform(-STRAIN, STRAIN, size=(3, 3))
            atoms.set_cell(np.round(atoms.cell.array @ (np.eye(3) + 0.5 * (strain + strain.T)), 8), scale_atoms=True)
            atoms.positions = np.round(atoms.positions + rng.normal(scale=spread, size=(len(atoms), 3)), 8)
            atoms.calc = EMT()
            labels = {
                "energy": round(float(atoms.get_potential_energy()), 8),
                "forces": np.round(atoms.get_forces(), 8),
                "stress": np.round(atoms.get_stress(), 10),
            }
            atoms.calc = SinglePointCalculator(atoms, **labels)
            atoms.info = {
                "sid": f"sample-{number:02d}-{part}-{index}",
                "calc_id": part,
                "parent_id": f"sample-{number:02d}",
            }
            found.append(atoms)
    return found


def main() -> None:
    """Makes and writes the sample; prints what the manifest and the card say of it."""
    path, structures = FOLDER / "sample.aselmdb", []
    for number, name in enumerate(PARENTS, start=1):
        held = children(number, name)
        structures.extend(held)
        energies = [atoms.get_potential_energy() / len(atoms) for atoms in held]
        force = np.sqrt(np.mean([np.square(atoms.get_forces()).sum(axis=1).mean() for atoms in held]))
        print(
            f"| sample-{number:02d} | {name} | {len(held)} | {min(energies):.3f} to {max(energies):.3f} | {force:.2f} |"
        )
    metadata = {
        "level_of_theory": "EMT of ASE, NOT OMat24's PBE",
        "origin": "datasets/omat24/make_sample.py of escaip; no structure or label is OMat24's",
        "licence": "CC0-1.0",
    }
    write_aselmdb(path, structures, metadata)
    print(len(structures), "rows;", report(path))


if __name__ == "__main__":
    main()
