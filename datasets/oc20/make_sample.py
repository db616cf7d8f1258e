"""Makes the OC20 sample: relaxations of small slabs with adsorbates, labelled by EMT, in both layouts of OC20.

Each clean slab is relaxed; an adsorbate is put on it, free atoms are rattled, and the whole is relaxed. Steps of that
relaxation become frames, labelled once more at the positions exactly as they are written. Labels are those of ASE's EMT
calculator, not DFT: see the card beside this file.

Writes ``sample/0.extxyz.xz`` with ``sample/0.txt.xz``, ``sample_lmdb/data.0000.lmdb`` (records of PyTorch Geometric
2.x), ``sample_lmdb/data.0001.lmdb`` (records as PyTorch Geometric 1.x pickled them) and ``sample_ref.pkl``:

    OMP_NUM_THREADS=1 python datasets/oc20/make_sample.py
"""

from __future__ import annotations

import io
import lzma
import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch_geometric.data.data as pyg
from ase import Atoms
from ase.build import add_adsorbate, fcc100, fcc111, molecule
from ase.constraints import FixAtoms

sys.path.insert(0, str(Path(__file__).parent.parent))

from samples import labelled, record, relaxation, report, total_energy, write_lmdb

FOLDER = Path(__file__).parent
FRAMES_PER_SYSTEM = 20
RATTLE = 0.1
SIZE = (3, 3, 3)
VACUUM = 8.0
MAX_FORCE = 0.02

SYSTEMS = (
    ("Cu", "111", "O"), ("Cu", "100", "CO"), ("Pt", "111", "CO"), ("Pt", "100", "H"), ("Pd", "111", "OH"),
    ("Pd", "100", "N"), ("Ag", "111", "NH"), ("Au", "111", "NH3"), ("Ni", "111", "CH"), ("Al", "100", "O"),
    ("Ni", "100", "NO"), ("Au", "100", "H2O"),
)  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """One labelled structure.

    Attributes:
        atoms: with tags, constraint and labels; the energy is the total one.
        sid: number of the system.
        fid: step of its relaxation.
        reference: eV, of the clean slab and the adsorbate's atoms.
    """

    atoms: Atoms
    sid: int
    fid: int
    reference: float

    @property
    def energy(self) -> float:
        """Adsorption energy, eV."""
        return float(self.atoms.calc.results["energy"]) - self.reference


def energy_at_rest(atoms: Atoms) -> float:
    """Energy of the relaxed structure, eV."""
    return total_energy(relaxation(atoms, MAX_FORCE)[0])


def atom_references() -> dict[str, float]:
    """Energies of H, O, C and N in H2, H2O, CO and N2, as OC20 takes them, by EMT. eV."""
    hydrogen, water, monoxide, nitrogen = (energy_at_rest(molecule(name)) for name in ("H2", "H2O", "CO", "N2"))
    oxygen = water - hydrogen
    return {"H": hydrogen / 2, "O": oxygen, "C": monoxide - oxygen, "N": nitrogen / 2}


def frames_of(sid: int, metal: str, facet: str, adsorbate: str, references: dict[str, float]) -> list[Frame]:
    """Frames of one relaxation, evenly spaced, the first and the last included."""
    slab = (fcc111 if facet == "111" else fcc100)(metal, SIZE, vacuum=VACUUM)
    slab.pbc = True
    layer = slab.get_tags()
    # Layers are counted from the top; OC20 marks 0 below the surface, 1 surface, 2 adsorbate, and fixes the lowest.
    slab.set_tags((layer == 1).astype(int))
    slab.set_constraint(FixAtoms(mask=layer == SIZE[2]))
    atoms = upright(adsorbate)
    reference = energy_at_rest(slab) + sum(references[symbol] for symbol in atoms.symbols)
    add_adsorbate(slab, atoms, 1.6, "bridge" if facet == "111" else "hollow")
    slab.set_tags([*slab.get_tags()[: len(layer)], *[2] * len(atoms)])
    slab.rattle(RATTLE, seed=sid)
    _, steps = relaxation(slab, MAX_FORCE)
    chosen = np.unique(np.linspace(0, len(steps) - 1, FRAMES_PER_SYSTEM).round().astype(int))
    return [Frame(labelled(as_written(steps[step])), sid, int(step), reference) for step in chosen]


def upright(adsorbate: str) -> Atoms:
    """The adsorbate with the atom that binds first and lowest."""
    atoms = Atoms(adsorbate) if len(adsorbate) == 1 else molecule(adsorbate)
    order = sorted(range(len(atoms)), key=lambda index: "CNOH".index(atoms.symbols[index]))
    atoms = atoms[order]
    atoms.positions -= atoms.positions[0]
    if atoms.positions[:, 2].mean() < 0.0:
        atoms.positions *= (1.0, 1.0, -1.0)
    return atoms


def as_written(atoms: Atoms) -> Atoms:
    """The structure with coordinates of eight decimals."""
    atoms.info.clear()
    atoms.positions = atoms.positions.round(8)
    atoms.cell = atoms.cell.array.round(8)
    return atoms


def write_raw(folder: Path, frames: list[Frame]) -> None:
    """``0.extxyz.xz`` and ``0.txt.xz``."""
    text = io.StringIO()
    columns = ["symbols", "positions", "move_mask", "tags", "forces"]
    ase.io.write(text, [frame.atoms for frame in frames], format="extxyz", columns=columns)
    lines = [f"random{frame.sid},frame{frame.fid},{frame.reference!r}\n" for frame in frames]
    for name, content in (("0.extxyz.xz", text.getvalue()), ("0.txt.xz", "".join(lines))):
        (folder / name).write_bytes(lzma.compress(content.encode(), preset=9))


def fields(frame: Frame) -> dict[str, Any]:
    """Attributes of a preprocessed record, with the adsorption energy."""
    return {**record(frame.atoms), "y": frame.energy, "sid": frame.sid, "fid": frame.fid}


def pickled(frame: Frame) -> bytes:
    """The record as PyTorch Geometric 2.x pickles it."""
    return pickle.dumps(pyg.Data(**fields(frame)), protocol=-1)


def pickled_as_1x(frame: Frame) -> bytes:
    """The record as PyTorch Geometric 1.x pickled it: attributes in ``__dict__``, the usual ones there as None."""
    with _class_of_1x() as data_class:
        data = data_class()
        data.__dict__.update(dict.fromkeys(("x", "edge_index", "edge_attr", "y", "pos", "normal", "face")))
        data.__dict__.update(fields(frame))
        return pickle.dumps(data, protocol=4)


@contextmanager
def _class_of_1x() -> Iterator[type]:
    """A plain class that pickles under the name of the real one, which is put aside meanwhile."""
    plain = type("Data", (), {"__module__": "torch_geometric.data.data"})
    real = pyg.Data
    pyg.Data = plain
    try:
        yield plain
    finally:
        pyg.Data = real


def main() -> None:
    """Makes and writes the sample; prints what the manifest says of it."""
    # PyTorch's warning on pickling a storage, as the layout does.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    references = atom_references()
    frames: list[Frame] = []
    for sid, (metal, facet, adsorbate) in enumerate(SYSTEMS, start=1):
        made = frames_of(sid, metal, facet, adsorbate, references)
        frames.extend(made)
        energies = f"{made[0].energy:.3f} to {made[-1].energy:.3f}"
        print(f"| random{sid} | {metal}({facet}) + {adsorbate} | {len(made[0].atoms)} | {len(made)} | {energies} |")
    write_raw(FOLDER / "sample", frames)
    write_lmdb(FOLDER / "sample_lmdb" / "data.0000.lmdb", [pickled(frame) for frame in frames[0::6]])
    write_lmdb(FOLDER / "sample_lmdb" / "data.0001.lmdb", [pickled_as_1x(frame) for frame in frames[3::6]])
    by_system = {frame.sid: frame.reference for frame in frames}
    (FOLDER / "sample_ref.pkl").write_bytes(pickle.dumps(by_system, protocol=4))
    print(
        len(frames), "frames; references of atoms:", {symbol: round(value, 4) for symbol, value in references.items()}
    )
    for name in ("sample/0.extxyz.xz", "sample/0.txt.xz", "sample_lmdb/data.0000.lmdb", "sample_lmdb/data.0001.lmdb",
                 "sample_ref.pkl"):  # fmt: skip
        print(name, report(FOLDER / name))


if __name__ == "__main__":
    main()
