"""Makes the MACE-OFF sample: neutral molecules of our SPICE sample with GFN2-xTB labels, as extxyz in eV and Å.

Names of labels and of what else a frame says are those of the MACE-OFF files. Structures and labels are those of
``datasets/spice/sample.hdf5``; nothing is DFT: see the card beside this file.

Writes ``sample.xyz``:

    python datasets/mace_off/make_sample.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import ase.io
import h5py
from ase import Atoms

from escaip.data import open_source
from escaip.files import resolve

sys.path.insert(0, str(Path(__file__).parent.parent))

from samples import report

FOLDER = Path(__file__).parent
SOURCE = "dataset:spice/sample.hdf5"
STEP = 6


def structures() -> list[Atoms]:
    """Every sixth conformation of the neutral molecules without silicon, which MACE-OFF does not have."""
    with h5py.File(resolve(SOURCE), "r") as file:
        smiles = {name: group["smiles"][0].decode() for name, group in file.items()}
    found = []
    for index, data in enumerate(open_source(SOURCE)):
        if index % STEP or int(data.charge) != 0 or bool((data.atomic_numbers == 14).any()):
            continue
        atoms = Atoms(data.atomic_numbers.numpy(), data.positions.numpy())
        atoms.info = {
            "REF_energy": float(data.energy),
            "smiles": smiles[data.group],
            "total_charge": 0,
            "config_type": "escaip GFN2-xTB sample",
        }
        atoms.arrays["REF_forces"] = data.forces.numpy()
        found.append(atoms)
    return found


def main() -> None:
    """Makes and writes the sample; prints what the manifest and the card say of it."""
    path, found = FOLDER / "sample.xyz", structures()
    ase.io.write(path, found, format="extxyz")
    print(len(found), "frames of", len({atoms.info["smiles"] for atoms in found}), "molecules")
    print(" ".join(sorted({symbol for atoms in found for symbol in atoms.get_chemical_symbols()})))
    print(report(path))


if __name__ == "__main__":
    main()
