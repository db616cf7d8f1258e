"""Makes the MPTrj sample: strained and rattled metals and alloys, labelled by EMT, in MPTrj's JSON layout.

Each of 24 crystals has five frames, as if on the way to its relaxed structure: strain, shear and displacements shrink
from frame to frame. Labels are those of ASE's EMT calculator at the positions as stored, not DFT: see the card beside
this file.

Writes ``sample.json``:

    OMP_NUM_THREADS=1 python datasets/mptrj/make_sample.py
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.emt import EMT
from numpy.typing import NDArray
from pymatgen.core import Lattice, Structure

sys.path.insert(0, str(Path(__file__).parent.parent))

from samples import LATTICE, crystal, report

FOLDER = Path(__file__).parent
FIRST_ID = 900000001
"""Beyond every id that the Materials Project has given."""

FRAMES = 5
STRAIN = 0.03
RATTLE = 0.10
SHRINK = 0.55
KBAR = 0.1 * units.GPa

ALLOYS = (
    "Cu3Au", "Au3Cu", "Ni3Al", "Al3Ni", "Ag3Pd", "Pd3Ag", "Pt3Cu", "Cu3Pt", "Ni3Pt", "Pd3Ni",
    "CuAu", "NiPt", "AgPd", "AlNi", "CuPd", "AgAu", "PtAl",
)  # fmt: skip


def frames(name: str) -> list[Atoms]:
    """The crystal on its way to the undisturbed structure, without labels."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    start = crystal(name)
    start.numbers = start.numbers[::-1]
    strain = rng.uniform(-STRAIN, STRAIN, size=(3, 3))
    shift = rng.normal(scale=RATTLE, size=(len(start), 3))
    found = []
    for step in range(FRAMES):
        atoms = start.copy()
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + SHRINK**step * 0.5 * (strain + strain.T)), scale_atoms=True)
        atoms.positions += SHRINK**step * shift
        found.append(atoms)
    return found


def stored(atoms: Atoms) -> tuple[dict[str, Any], Atoms]:
    """A structure as pymatgen writes it, rounded, and the atoms at the positions that it then says."""
    matrix = np.round(atoms.cell.array, 8)
    fractional = np.round(np.linalg.solve(matrix.T, atoms.positions.T).T, 8)
    structure = Structure(Lattice(matrix), atoms.get_chemical_symbols(), fractional)
    again = Atoms(atoms.numbers, fractional @ matrix, cell=matrix, pbc=True)
    content = structure.as_dict()
    for site in content["sites"]:
        site["xyz"] = np.round(site["xyz"], 8).tolist()
    return content, again


def record(atoms: Atoms, material: str) -> dict[str, Any]:
    """One frame with the keys of MPTrj. MP2020 corrects no alloy of metals, so both energies are the same."""
    structure, atoms = stored(atoms)
    atoms.calc = EMT()
    energy = float(atoms.get_potential_energy())
    stress: NDArray[np.float64] = atoms.get_stress(voigt=False)
    return {
        "structure": structure,
        "uncorrected_total_energy": energy,
        "corrected_total_energy": energy,
        "energy_per_atom": energy / len(atoms),
        "ef_per_atom": None,
        "e_per_atom_relaxed": None,
        "ef_per_atom_relaxed": None,
        "force": np.round(atoms.get_forces(), 8).tolist(),
        "stress": np.round(-stress / KBAR, 6).tolist(),
        "magmom": None,
        "bandgap": 0.0,
        "mp_id": material,
    }


def main() -> None:
    """Makes and writes the sample; prints what the manifest and the card say of it."""
    content: dict[str, dict[str, Any]] = {}
    for number, name in enumerate([*LATTICE, *ALLOYS], start=FIRST_ID):
        material = f"mp-{number}"
        held = [record(atoms, material) for atoms in frames(name)]
        content[material] = {f"{material}-0-{step}": frame for step, frame in enumerate(held)}
        ends = [f"{frame['energy_per_atom']:.3f}" for frame in (held[0], held[-1])]
        pressure = [f"{np.trace(frame['stress']) / 3:.0f}" for frame in (held[0], held[-1])]
        print(f"| {material} | {name} | {' to '.join(ends)} | {' to '.join(pressure)} |")
    path = FOLDER / "sample.json"
    path.write_text(json.dumps(content))
    print(sum(map(len, content.values())), "frames;", report(path))


if __name__ == "__main__":
    main()
