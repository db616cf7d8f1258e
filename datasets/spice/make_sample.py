"""Makes ``sample.hdf5``: thermally displaced small molecules with GFN2-xTB labels in SPICE's release layout.

Each molecule starts from an RDKit conformer, is relaxed with GFN2-xTB, then runs Langevin dynamics at two temperatures;
frames are kept at fixed intervals. Energies and gradients are computed once more, tightly converged, at the positions
exactly as they are stored (float32 bohr). The labels are not SPICE's: see the card beside this file.

Needs tblite, ase, numpy, h5py and, for starting structures and SMILES, rdkit:

    OMP_NUM_THREADS=1 python datasets/spice/make_sample.py
    python datasets/spice/make_sample.py --table        # the card's table, from the file that is there

Layout: https://github.com/openmm/spice-dataset. GFN2-xTB: Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652
(2019), as implemented in https://github.com/tblite/tblite.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
from ase import Atoms, units
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from numpy.typing import NDArray
from tblite.ase import TBLite
from tblite.interface import Calculator

sys.path.insert(0, str(Path(__file__).parent.parent))

from samples import report

SAMPLE = Path(__file__).with_name("sample.hdf5")
LEVEL_OF_THEORY = "GFN2-xTB"
LABEL_ACCURACY = 0.01
TEMPERATURES_K = (300.0, 600.0)
FRAMES_PER_TEMPERATURE = 12
TIMESTEP_FS = 1.0
FRICTION_PER_FS = 0.02
STEPS_BEFORE = 300
STEPS_BETWEEN = 60
MAX_ATTEMPTS = 5

# Bonded atoms stay within these multiples of the sum of their covalent radii, all others above the third.
BOND_RANGE = (0.6, 1.6)
NON_BONDED_MIN = 1.2

# Unpaired electrons of the free atoms whose energies formation_energy subtracts.
UNPAIRED = {"H": 1, "C": 2, "N": 3, "O": 2, "F": 1, "Si": 2, "P": 3, "S": 2, "Cl": 1, "Br": 1}

MOLECULES = {
    "methane": "C",
    "ethane": "CC",
    "propane": "CCC",
    "ethene": "C=C",
    "propene": "CC=C",
    "ethyne": "C#C",
    "propyne": "CC#C",
    "benzene": "c1ccccc1",
    "water": "O",
    "methanol": "CO",
    "ethanol": "CCO",
    "ethylene glycol": "OCCO",
    "dimethyl ether": "COC",
    "oxirane": "C1CO1",
    "furan": "c1ccoc1",
    "formaldehyde": "C=O",
    "acetaldehyde": "CC=O",
    "acetone": "CC(C)=O",
    "formic acid": "OC=O",
    "acetic acid": "CC(=O)O",
    "methyl formate": "COC=O",
    "ammonia": "N",
    "methylamine": "CN",
    "ethylamine": "CCN",
    "dimethylamine": "CNC",
    "methanimine": "C=N",
    "hydrogen cyanide": "C#N",
    "acetonitrile": "CC#N",
    "pyrrole": "c1cc[nH]c1",
    "pyridine": "c1ccncc1",
    "formamide": "NC=O",
    "acetamide": "CC(N)=O",
    "N-methylacetamide": "CC(=O)NC",
    "urea": "NC(N)=O",
    "glycine": "NCC(=O)O",
    "alanine": "C[C@H](N)C(=O)O",
    "nitromethane": "C[N+](=O)[O-]",
    "fluoromethane": "CF",
    "trifluoromethane": "FC(F)F",
    "fluoroethane": "CCF",
    "fluoroethene": "C=CF",
    "hydrogen sulfide": "S",
    "methanethiol": "CS",
    "ethanethiol": "CCS",
    "dimethyl sulfide": "CSC",
    "dimethyl sulfoxide": "CS(C)=O",
    "thiophene": "c1ccsc1",
    "chloromethane": "CCl",
    "dichloromethane": "ClCCl",
    "chloroethane": "CCCl",
    "chloroethene": "C=CCl",
    "bromomethane": "CBr",
    "bromoethane": "CCBr",
    "bromoethene": "C=CBr",
    "phosphine": "P",
    "methylphosphine": "CP",
    "dimethylphosphine": "CPC",
    "silane": "[SiH4]",
    "methylsilane": "C[SiH3]",
    "dimethylsilane": "C[SiH2]C",
    "ammonium": "[NH4+]",
    "methylammonium": "C[NH3+]",
    "formate": "[O-]C=O",
    "acetate": "CC(=O)[O-]",
}
Labels = dict[str, NDArray[np.floating]]
"""By name in the file, in atomic units; a force is minus the gradient."""

FLEXIBLE = ("ethylene glycol", "ethanol", "ethylamine", "ethanethiol", "glycine", "alanine", "methyl formate")


@dataclass(frozen=True)
class Molecule:
    """A molecule before any quantum chemistry.

    Attributes:
        name: of its group in the file.
        smiles: mapped, with explicit hydrogens; map number ``i`` is atom ``i − 1``.
        charge: total formal charge, e; the one given to the quantum chemistry too.
        numbers: ``(n,)`` atomic numbers.
        bonds: pairs of bonded atoms.
        starts: positions of each starting conformer, ``(n, 3)`` Å.
    """

    name: str
    smiles: str
    charge: int
    numbers: NDArray[np.int64]
    bonds: tuple[tuple[int, int], ...]
    starts: tuple[NDArray[np.float64], ...]


def describe(name: str, smiles: str) -> Molecule:
    """Atoms, bonds, charge, mapped SMILES and starting conformers of a SMILES, by RDKit.

    Raises:
        RuntimeError: RDKit cannot embed the molecule.
    """
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    count = 2 if name in FLEXIBLE else 1
    conformers = list(AllChem.EmbedMultipleConfs(mol, numConfs=count, randomSeed=_seed(name), pruneRmsThresh=0.3))
    if not conformers:
        raise RuntimeError(f"{name}: RDKit found no starting structure for {smiles}; correct the SMILES")
    starts = tuple(np.array(mol.GetConformer(c).GetPositions()) for c in conformers)
    for atom in mol.GetAtoms():
        atom.SetAtomMapNum(atom.GetIdx() + 1)
    return Molecule(
        name=name,
        smiles=Chem.MolToSmiles(mol),
        charge=Chem.GetFormalCharge(mol),
        numbers=np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()]),
        bonds=tuple((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()),
        starts=starts,
    )


def displaced(molecule: Molecule) -> NDArray[np.float32]:
    """Relaxes the starts and samples Langevin dynamics, half of the frames at each temperature.

    Returns:
        ``(M, n, 3)`` positions, bohr.

    Raises:
        RuntimeError: the molecule broke or rearranged in every attempt.
    """
    relaxed = [_relax(molecule, start) for start in molecule.starts]
    frames = []
    for index, temperature in enumerate(TEMPERATURES_K):
        share = FRAMES_PER_TEMPERATURE // len(relaxed)
        for number, start in enumerate(relaxed):
            for attempt in range(MAX_ATTEMPTS):
                rng = np.random.default_rng((_seed(molecule.name), index, number, attempt))
                sampled = _sample(start, temperature, share, rng)
                if all(intact(molecule, positions) for positions in sampled):
                    break
            else:
                raise RuntimeError(f"{molecule.name}: broke at {temperature} K {MAX_ATTEMPTS} times; sample it colder")
            frames.extend(sampled)
    return (np.array(frames) / units.Bohr).astype(np.float32)


def _relax(molecule: Molecule, start: NDArray[np.float64]) -> Atoms:
    atoms = Atoms(molecule.numbers, start)
    atoms.calc = TBLite(method=LEVEL_OF_THEORY, charge=molecule.charge, verbosity=0)
    if not BFGS(atoms, logfile=None).run(fmax=0.01, steps=500) or not intact(molecule, atoms.positions):
        raise RuntimeError(f"{molecule.name}: did not relax to its SMILES; change the starting structure")
    return atoms


def _sample(start: Atoms, temperature: float, count: int, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    atoms = start.copy()
    atoms.calc = start.calc
    spread = np.sqrt(units.kB * temperature * atoms.get_masses()[:, None])
    atoms.set_momenta(spread * rng.normal(size=(len(atoms), 3)))
    timestep, friction = TIMESTEP_FS * units.fs, FRICTION_PER_FS / units.fs
    dynamics = Langevin(atoms, timestep, temperature_K=temperature, friction=friction, rng=rng, fixcm=False)
    dynamics.run(STEPS_BEFORE)
    frames = []
    for _ in range(count):
        dynamics.run(STEPS_BETWEEN)
        frames.append(atoms.positions - atoms.get_center_of_mass())
    return frames


def intact(molecule: Molecule, positions: NDArray[np.float64]) -> bool:
    """Whether every bond of the SMILES, and no other, is there.

    Args:
        molecule: with its bonds.
        positions: ``(n, 3)`` Å.
    """
    radii = covalent_radii[molecule.numbers]
    ratio = np.linalg.norm(positions[:, None] - positions[None], axis=-1) / (radii[:, None] + radii[None])
    bonded = np.eye(len(positions), dtype=bool)
    for i, j in molecule.bonds:
        bonded[i, j] = bonded[j, i] = True
        if not BOND_RANGE[0] < ratio[i, j] < BOND_RANGE[1]:
            return False
    return bool((ratio[~bonded] > NON_BONDED_MIN).all())


def single_point(
    numbers: NDArray[np.int64], positions: NDArray[np.floating], charge: int, unpaired: int = 0
) -> tuple[float, NDArray[np.float64]]:
    """Tightly converged GFN2-xTB.

    Args:
        numbers: ``(n,)``.
        positions: ``(n, 3)`` bohr.
        charge: e.
        unpaired: number of unpaired electrons.

    Returns:
        Energy in hartree and its gradient ``(n, 3)`` in hartree/bohr.
    """
    positions = np.asarray(positions, dtype=np.float64)
    calculator = Calculator(LEVEL_OF_THEORY, numbers, positions, charge=charge, uhf=unpaired)
    calculator.set("verbosity", 0)
    calculator.set("accuracy", LABEL_ACCURACY)
    result = calculator.singlepoint()
    return float(result.get("energy")), np.array(result.get("gradient"))


def label(molecule: Molecule, conformations: NDArray[np.float32]) -> Labels:
    """Conformations with energies and gradients at the positions as stored: names and arrays of the file."""
    results = [single_point(molecule.numbers, positions, molecule.charge) for positions in conformations]
    energies, gradients = (np.array(part) for part in zip(*results, strict=True))
    gradients = gradients.astype(np.float32)
    return {"conformations": conformations, "dft_total_energy": energies, "dft_total_gradient": gradients}


def gradient_error(numbers: NDArray[np.int64], positions: NDArray[np.float32], charge: int) -> float:
    """Largest difference between the gradient and central differences of the energy, hartree/bohr."""
    step = 1e-3
    reference = positions.astype(np.float64)
    gradient = single_point(numbers, reference, charge)[1]
    numeric = np.zeros_like(gradient)
    for index in np.ndindex(*reference.shape):
        ends = []
        for sign in (1, -1):
            moved = reference.copy()
            moved[index] += sign * step
            ends.append(single_point(numbers, moved, charge)[0])
        numeric[index] = (ends[0] - ends[1]) / (2 * step)
    return float(np.abs(numeric - gradient).max())


def free_atoms() -> dict[str, float]:
    """Energies of the neutral free atoms in their ground-state multiplicity, hartree."""
    origin = np.zeros((1, 3))
    return {
        symbol: single_point(np.array([atomic_numbers[symbol]]), origin, 0, unpaired)[0]
        for symbol, unpaired in UNPAIRED.items()
    }


def write(molecules: list[Molecule], labelled: list[Labels], atoms: dict[str, float]) -> None:
    """Writes the sample."""
    with h5py.File(SAMPLE, "w") as file:
        file.attrs["level_of_theory"] = f"{LEVEL_OF_THEORY} (tblite), NOT SPICE's wB97M-D3(BJ)/def2-TZVPPD"
        file.attrs["origin"] = "datasets/spice/make_sample.py of escaip; no structure or label is SPICE's"
        file.attrs["names"] = f"dft_total_* are the names of SPICE's layout; the values are {LEVEL_OF_THEORY}"
        file.attrs["licence"] = "CC0-1.0"
        file.attrs["versions"] = json.dumps({name: version(name) for name in ("tblite", "rdkit", "ase")})
        file.attrs["accuracy"] = LABEL_ACCURACY
        file.attrs["temperatures_kelvin"] = np.array(TEMPERATURES_K)
        file.attrs["formation_energy_reference_hartree"] = json.dumps(atoms)
        for molecule, data in zip(molecules, labelled, strict=True):
            _write_group(file.create_group(molecule.name), molecule, data, atoms)


def _write_group(group: h5py.Group, molecule: Molecule, data: Labels, atoms: dict[str, float]) -> None:
    reference = sum(atoms[chemical_symbols[z]] for z in molecule.numbers)
    packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
    text = h5py.string_dtype()
    kind = "neutral" if molecule.charge == 0 else "charged"
    group.create_dataset("subset", data=[f"escaip GFN2-xTB sample, {kind}"], dtype=text)
    group.create_dataset("smiles", data=[molecule.smiles], dtype=text)
    group.create_dataset("atomic_numbers", data=molecule.numbers.astype(np.int16))
    energies = {"formation_energy": data["dft_total_energy"] - reference}
    for name, values in (data | energies).items():
        unit = "bohr" if name == "conformations" else "hartree/bohr" if name == "dft_total_gradient" else "hartree"
        group.create_dataset(name, data=values, **packed).attrs["units"] = unit


def table() -> str:
    """The card's table of molecules, in Markdown, and the file's totals."""
    unit = units.Hartree / units.Bohr
    rows = ["| molecule | SMILES | charge | atoms | conformations | force RMS, eV/Å |", "|---|---|---|---|---|---|"]
    squares, structures, atoms, elements = [], 0, 0, set()
    with h5py.File(SAMPLE, "r") as file:
        for name, smiles in MOLECULES.items():
            gradient = file[name]["dft_total_gradient"][()].astype(np.float64) * unit
            count, size, _ = gradient.shape
            charge = smiles.count("+") - smiles.count("-")
            rows.append(f"| {name} | `{smiles}` | {charge} | {size} | {count} | {np.sqrt((gradient**2).mean()):.3f} |")
            squares.append(gradient.ravel() ** 2)
            structures, atoms = structures + count, atoms + count * size
            elements |= set(file[name]["atomic_numbers"][()].tolist())
    names = " ".join(chemical_symbols[z] for z in sorted(elements))
    rms = np.sqrt(np.concatenate(squares).mean())
    rows.append(f"\n{len(MOLECULES)} molecules, {structures} conformations, {atoms} atoms in all; elements {names}.")
    rows.append(f"Force RMS {rms:.3f} eV/Å; {report(SAMPLE)}.")
    return "\n".join(rows)


def _seed(name: str) -> int:
    return zlib.crc32(name.encode()) % 2**31


def main() -> None:
    """Makes, checks and writes the sample."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the card's table of the sample and stop")
    if parser.parse_args().table:
        print(table())
        return
    began = time.perf_counter()
    molecules, labelled = [], []
    for name, smiles in MOLECULES.items():
        molecule = describe(name, smiles)
        labels = label(molecule, displaced(molecule))
        molecules.append(molecule)
        labelled.append(labels)
        seconds = time.perf_counter() - began
        print(f"{name:20s} {len(labels['conformations']):3d} conformations, {seconds:6.1f} s so far", flush=True)
    write(molecules, labelled, free_atoms())
    for name in ("water", "acetate", "dimethyl sulfoxide", "bromoethene"):
        index = list(MOLECULES).index(name)
        error = gradient_error(molecules[index].numbers, labelled[index]["conformations"][-1], molecules[index].charge)
        print(f"{name}: gradient against central differences of the energy: {error:.1e} hartree/bohr at most")
    print(table())


if __name__ == "__main__":
    main()
