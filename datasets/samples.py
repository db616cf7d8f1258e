"""What the scripts that make samples share: crystals and relaxations with EMT, LMDB files, checksums."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT, parameters
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import BFGS

LATTICE = {"Al": 4.00, "Ni": 3.52, "Cu": 3.59, "Pd": 3.88, "Ag": 4.06, "Pt": 3.92, "Au": 4.05}
"""Å at which the energy of the EMT crystal is lowest, to 0.01 Å."""

_ORIGIN = {"ctime": 0.0, "mtime": 0.0, "user": "", "calculator": "unknown", "calculator_parameters": {}}


def report(path: Path) -> str:
    """Size and checksum of a file, for its card and manifest."""
    content = path.read_bytes()
    return f"{len(content)} bytes; SHA-256 `{hashlib.sha256(content).hexdigest()}`"


def crystal(name: str) -> Atoms:
    """A cubic face-centred cell of a metal, or of an alloy in the L1₂ (``A3B``) or L1₀ (``AB``) order."""
    symbols = Atoms(name).get_chemical_symbols()
    symbols = [symbol for symbol in symbols for _ in range(4 // len(symbols))]
    atoms = bulk(symbols[0], "fcc", a=sum(LATTICE[symbol] for symbol in symbols) / 4, cubic=True)
    atoms.symbols[:] = symbols
    return atoms


def relaxation(atoms: Atoms, max_force: float) -> tuple[Atoms, list[Atoms]]:
    """The structure at rest with EMT as its calculator, and all from the first to it without.

    Raises:
        RuntimeError: it does not converge.
    """
    atoms, steps = atoms.copy(), []
    atoms.calc = EMT()
    optimizer = BFGS(atoms, logfile=None)
    optimizer.attach(lambda: steps.append(atoms.copy()))
    if not optimizer.run(fmax=max_force, steps=600):
        raise RuntimeError(f"{atoms.symbols} did not relax")
    return atoms, steps


def total_energy(atoms: Atoms) -> float:
    """EMT counts from the elements' crystals; this counts from free atoms, as DFT does. eV."""
    return float(atoms.get_potential_energy()) + sum(parameters[symbol][0] for symbol in atoms.symbols)


def labelled(atoms: Atoms) -> Atoms:
    """A copy with EMT's labels; forces of fixed atoms are kept."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    energy, forces = total_energy(atoms), atoms.get_forces(apply_constraint=False)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, free_energy=energy, forces=forces)
    return atoms


def record(atoms: Atoms, **more: Any) -> dict[str, Any]:
    """Attributes of a labelled structure in the preprocessed records of OC20 and OC22."""
    import torch

    return {
        "y": atoms.get_potential_energy(),
        "pos": torch.tensor(atoms.positions, dtype=torch.float32),
        "cell": torch.tensor(atoms.cell.array, dtype=torch.float32).view(1, 3, 3),
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.float32),
        "natoms": len(atoms),
        "force": torch.tensor(atoms.calc.results["forces"], dtype=torch.float32),
        "fixed": torch.tensor(np.isin(np.arange(len(atoms)), atoms.constraints[0].index), dtype=torch.float32),
        "tags": torch.tensor(atoms.get_tags(), dtype=torch.int64),
        **more,
    }


def write_lmdb(path: Path, values: Sequence[bytes]) -> None:
    """Keys ``0`` to ``n − 1`` and ``length``; the file is as large as what it holds."""
    path.unlink(missing_ok=True)
    environment = lmdb.open(str(path), subdir=False, map_size=1 << 28, lock=False, meminit=True)
    with environment, environment.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(str(number).encode(), value)
        transaction.put(b"length", pickle.dumps(len(values), protocol=-1))


def write_aselmdb(path: Path, structures: Sequence[Atoms], metadata: Mapping[str, Any]) -> None:
    """Writes structures with the labels of their single-point calculators as rows 1, 2, ...; ``data`` is ``info``.

    The bytes do not depend on when, where or by whom they are written.
    """
    rows = {b"%d" % number: zlib.compress(_row(atoms)) for number, atoms in enumerate(structures, start=1)}
    own = {"nextid": len(rows) + 1, "metadata": dict(metadata)}
    reserved = {key.encode(): zlib.compress(json.dumps(value).encode()) for key, value in own.items()}
    with tempfile.TemporaryDirectory() as folder:
        growing, whole = (os.path.join(folder, name) for name in ("growing", "whole"))
        with lmdb.open(growing, subdir=False, lock=False, map_size=1 << 24) as environment:
            for entries in (rows, reserved):
                with environment.begin(write=True) as transaction:
                    for key, value in sorted(entries.items()):
                        transaction.put(key, value)
            environment.copy(whole, compact=True)
        path.write_bytes(Path(whole).read_bytes())


def _row(atoms: Atoms) -> bytes:
    """A row in JSON, with the entries that ASE expects about its origin."""
    row = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": np.asarray(atoms.cell), "pbc": atoms.pbc}
    labels = {key: atoms.calc.results[key] for key in ("energy", "forces", "stress") if key in atoms.calc.results}
    text = json.dumps({**row, "data": atoms.info, **labels}, default=_plain).encode()
    origin = {"unique_id": hashlib.blake2b(text, digest_size=16).hexdigest(), **_ORIGIN}
    return text[:-1] + b", " + json.dumps(origin).encode()[1:]


def _plain(array: np.ndarray) -> dict[str, Any]:
    """An array as ASE writes it in JSON."""
    return {"__ndarray__": [list(array.shape), str(array.dtype), array.ravel().tolist()]}
