"""Makes the OC22 sample: relaxations of small rock-salt oxide slabs, labelled by EMT, in OC22's preprocessed layout.

Slabs of metal monoxides at the lattice constant of their crystal, clean or with an adsorbate, are rattled and relaxed.
Steps of that relaxation become records, labelled once more at the positions as they are stored (float32). Labels are
those of ASE's EMT calculator, which knows no oxides and no magnetism, not DFT: see the card beside this file.

Writes ``sample/data.0000.lmdb``:

    OMP_NUM_THREADS=1 python datasets/oc22/make_sample.py
"""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, surface
from ase.constraints import FixAtoms
from torch_geometric.data import Data

sys.path.insert(0, str(Path(__file__).parent.parent))

from samples import labelled, record, relaxation, report, write_lmdb

FOLDER = Path(__file__).parent
RECORDS_PER_SYSTEM = 8
LAYERS = 3
VACUUM = 7.5
RATTLE = 0.06
MAX_FORCE = 0.03

# Lattice constants in Å at which the energy of the EMT crystal is lowest, and adsorbates; "" is a clean slab.
SYSTEMS = (
    ("Ni", 4.30, ""), ("Ni", 4.30, "O"), ("Cu", 4.45, ""), ("Cu", 4.45, "H"), ("Pd", 4.65, "O"), ("Pd", 4.65, "OH"),
    ("Ag", 4.80, ""), ("Ag", 4.80, "N"), ("Pt", 4.70, "H"), ("Au", 4.85, "C"),
)  # fmt: skip


def records(sid: int, metal: str, lattice: float, adsorbate: str) -> list[dict[str, Any]]:
    """Records of one relaxation from the first to the last, dense at first, where it moves most."""
    slab = surface(bulk(f"{metal}O", "rocksalt", a=lattice, cubic=True), (1, 0, 0), LAYERS, vacuum=VACUUM)
    slab.pbc = True
    heights = slab.positions[:, 2]
    top, bottom = heights > heights.max() - 0.1, heights < heights.min() + 0.1
    slab.set_tags(top.astype(int))
    slab.set_constraint(FixAtoms(mask=bottom))
    if adsorbate:
        site = next(atom.position for atom in slab if atom.symbol == metal and top[atom.index])
        upright = Atoms(adsorbate, [(0.0, 0.0, float(height)) for height in range(len(Atoms(adsorbate)))])
        add_adsorbate(slab, upright, 1.8, site[:2])
        slab.set_tags([*top.astype(int), *[2] * len(upright)])
    slab.rattle(RATTLE, seed=sid)
    _, steps = relaxation(slab, MAX_FORCE)
    chosen = np.unique(np.geomspace(1, len(steps), RECORDS_PER_SYSTEM).round().astype(int)) - 1
    system = {"nads": int(bool(adsorbate)), "sid": sid, "id": f"0_{sid}", "oc22": 1}
    return [record(labelled(as_stored(steps[step])), fid=int(step), **system) for step in chosen]


def as_stored(atoms: Atoms) -> Atoms:
    """The structure with coordinates that float32 has."""
    atoms.positions = atoms.positions.astype(np.float32)
    atoms.cell = atoms.cell.array.astype(np.float32)
    return atoms


def main() -> None:
    """Makes and writes the sample; prints what the manifest and the card say of it."""
    # PyTorch's warning on pickling a storage, as the layout does.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    values: list[bytes] = []
    for sid, (metal, lattice, adsorbate) in enumerate(SYSTEMS, start=1):
        held = records(sid, metal, lattice, adsorbate)
        values.extend(pickle.dumps(Data(**fields), protocol=-1) for fields in held)
        name = f"{metal}O(100)" + (f" + {adsorbate}" if adsorbate else "")
        energies = f"{held[0]['y']:.3f} to {held[-1]['y']:.3f}"
        print(f"| sid{sid} | {name} | {held[0]['natoms']} | {len(held)} | {energies} |")
    path = FOLDER / "sample" / "data.0000.lmdb"
    write_lmdb(path, values)
    print(len(values), "records;", report(path))


if __name__ == "__main__":
    main()
