"""Makes the OC22 sample: relaxations of small rock-salt oxide slabs, labelled by EMT, in OC22's preprocessed layout.

Slabs of metal monoxides at the lattice constant of their crystal, clean or with an adsorbate, are rattled and relaxed.
Steps of that relaxation become records, labelled once more at the positions as they are stored (float32). Labels are
those of ASE's EMT calculator, which knows no oxides and no magnetism, not DFT: see the card beside this file.

Writes ``sample/data.0000.lmdb``:

    OMP_NUM_THREADS=1 python datasets/oc22/make_sample.py
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, surface
from ase.calculators.emt import EMT, parameters
from ase.constraints import FixAtoms
from ase.optimize import BFGS
from torch_geometric.data import Data

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


@dataclass(frozen=True)
class Step:
    """One structure of a relaxation.

    Attributes:
        atoms: with tags and constraint, not labelled.
        sid: number of the system.
        fid: step of its relaxation.
        num_adsorbates: how many molecules sit on the slab.
    """

    atoms: Atoms
    sid: int
    fid: int
    num_adsorbates: int


def relaxation(sid: int, metal: str, lattice: float, adsorbate: str) -> list[Step]:
    """Steps of one relaxation from the first to the last, dense at first, where it moves most."""
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
    slab.calc = EMT()
    steps: list[Atoms] = []
    optimizer = BFGS(slab, logfile=None)
    optimizer.attach(lambda: steps.append(slab.copy()))
    if not optimizer.run(fmax=MAX_FORCE, steps=600):
        raise RuntimeError(f"{metal}O with {adsorbate or 'nothing'} did not relax")
    chosen = np.unique(np.geomspace(1, len(steps), RECORDS_PER_SYSTEM).round().astype(int)) - 1
    return [Step(steps[step], sid, int(step), int(bool(adsorbate))) for step in chosen]


def record(step: Step) -> dict[str, Any]:
    """Attributes as OC22's records have them; energies count from free atoms, as DFT's do, and are total."""
    atoms = step.atoms.copy()
    atoms.positions = atoms.positions.astype(np.float32)
    atoms.cell = atoms.cell.array.astype(np.float32)
    atoms.calc = EMT()
    energy = float(atoms.get_potential_energy()) + sum(parameters[symbol][0] for symbol in atoms.symbols)
    return {
        "y": energy,
        "pos": torch.tensor(atoms.positions, dtype=torch.float32),
        "cell": torch.tensor(atoms.cell.array, dtype=torch.float32).view(1, 3, 3),
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.float32),
        "natoms": len(atoms),
        "force": torch.tensor(atoms.get_forces(apply_constraint=False), dtype=torch.float32),
        "fixed": torch.tensor(np.isin(np.arange(len(atoms)), atoms.constraints[0].index), dtype=torch.float32),
        "tags": torch.tensor(atoms.get_tags(), dtype=torch.int64),
        "nads": step.num_adsorbates,
        "sid": step.sid,
        "fid": step.fid,
        "id": f"0_{step.sid}",
        "oc22": 1,
    }


def write_lmdb(path: Path, values: list[bytes]) -> None:
    """Keys ``0`` to ``n − 1`` and ``length``; the file is as large as what it holds."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    environment = lmdb.open(str(path), subdir=False, map_size=1 << 28, lock=False, meminit=True)
    with environment.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(str(number).encode(), value)
        transaction.put(b"length", pickle.dumps(len(values), protocol=-1))
    environment.close()


def main() -> None:
    """Makes and writes the sample; prints what the manifest and the card say of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write into")
    path = parser.parse_args().out / "sample" / "data.0000.lmdb"
    # PyTorch's warning on pickling a storage, as the layout does.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    values: list[bytes] = []
    for sid, (metal, lattice, adsorbate) in enumerate(SYSTEMS, start=1):
        records = [record(step) for step in relaxation(sid, metal, lattice, adsorbate)]
        values.extend(pickle.dumps(Data(**fields), protocol=-1) for fields in records)
        name = f"{metal}O(100)" + (f" + {adsorbate}" if adsorbate else "")
        energies = f"{records[0]['y']:.3f} to {records[-1]['y']:.3f}"
        print(f"| sid{sid} | {name} | {records[0]['natoms']} | {len(records)} | {energies} |")
    write_lmdb(path, values)
    content = path.read_bytes()
    print(len(values), "records;", len(content), hashlib.sha256(content).hexdigest())


if __name__ == "__main__":
    main()
