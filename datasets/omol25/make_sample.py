"""Makes the OMol25 sample: molecules and ions of our SPICE sample with GFN2-xTB labels, in an ASE database in LMDB.

Charge and spin multiplicity stand in the ``data`` of each row, as in OMol25. Structures and labels are those of
``datasets/spice/sample.hdf5``, converted to Å and eV; nothing is DFT: see the card beside this file.

Writes ``sample.aselmdb``:

    python datasets/omol25/make_sample.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from escaip.data import open_source

sys.path.insert(0, str(Path(__file__).parent.parent))

from samples import report, write_aselmdb

FOLDER = Path(__file__).parent
MOLECULES = (
    "water", "methanol", "ethanol", "acetone", "acetic acid", "ammonia", "methylamine", "formamide", "urea",
    "glycine", "benzene", "pyridine", "nitromethane", "chloromethane", "dimethyl sulfoxide", "phosphine",
    "ammonium", "methylammonium", "formate", "acetate",
)  # fmt: skip
FRAMES = 6


def structures() -> list[Atoms]:
    """Every fourth conformation of the chosen molecules."""
    kept: dict[str, list[Atoms]] = {name: [] for name in MOLECULES}
    for index, data in enumerate(open_source("dataset:spice/sample.hdf5")):
        if data.group not in kept or index % 4 or len(kept[data.group]) == FRAMES:
            continue
        labels = {"energy": float(data.energy), "forces": np.round(data.forces.numpy(), 8)}
        atoms = Atoms(data.atomic_numbers.numpy(), np.round(data.positions.numpy(), 8))
        atoms.calc = SinglePointCalculator(atoms, **labels)
        atoms.info = {
            "charge": int(data.charge),
            "spin": int(data.spin_multiplicity),
            "source": f"spice/sample.hdf5/{data.group}",
        }
        kept[data.group].append(atoms)
    return [atoms for name in MOLECULES for atoms in kept[name]]


def main() -> None:
    """Makes and writes the sample; prints what the manifest and the card say of it."""
    path, found = FOLDER / "sample.aselmdb", structures()
    metadata = {
        "level_of_theory": "GFN2-xTB (tblite), NOT OMol25's wB97M-V/def2-TZVPD",
        "origin": "datasets/omol25/make_sample.py of escaip; no structure or label is OMol25's",
        "licence": "CC0-1.0",
    }
    write_aselmdb(path, found, metadata)
    print(len(found), "rows of", len({atoms.info["source"] for atoms in found}), "molecules;", report(path))


if __name__ == "__main__":
    main()
