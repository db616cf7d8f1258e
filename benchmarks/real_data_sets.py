"""Real sets to train on: where they come from, how they are divided, what is trivial."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import write_json

from escaip.data import AtomicData, Store, StoreWriter, fit_statistics, open_source
from escaip.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("train", "val", "test")
SPLIT = "split.json"  # written last: the parts are whole
# Validation runs several times within minutes: its part is thinned to about so many atoms.
MAX_VAL_ATOMS = 1500


@dataclass(frozen=True)
class RealSet:
    """One training run on real data.

    Attributes:
        name: of the run and of its configuration.
        source: path, or pattern, inside the data folder; or several with options of their own.
        split: ``"structure"`` divides single structures, ``"group"`` whole groups (molecules, systems) only.
        what: in words, for the table.
        options: of ``escaip.data.open_source``, for every source.
        free_atoms_only: errors over unconstrained atoms.
        val, test: fractions of structures or groups.
        shares: name under which the divided data are kept, where several runs use the same.
        recipe: name of its configuration, where it is not that of the run.
    """

    name: str
    source: str | Mapping[str, Mapping[str, Any]]
    split: str
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    free_atoms_only: bool = False
    val: float = 0.1
    test: float = 0.2
    shares: str | None = None
    recipe: str | None = None

    @property
    def folder(self) -> str:
        """Of the divided data."""
        return self.shares or self.name

    @property
    def config(self) -> Path:
        """Its configuration."""
        return ROOT / "configs" / f"{self.recipe or self.name}.yaml"

    @property
    def sources(self) -> dict[str, Mapping[str, Any]]:
        """Options by path."""
        if isinstance(self.source, str):
            return {self.source: self.options}
        return {path: {**self.options, **options} for path, options in self.source.items()}

    def read(self, data: Path) -> list[AtomicData]:
        """All structures, from a folder of raw data.

        Raises:
            DataError: they are not there, or cannot be read.
        """
        return [one for path, options in self.sources.items() for one in open_source(data / path, **options)]


_OC20 = {
    "source": "catalysts/oc20_dft_traj/*.traj",
    "split": "group",
    "options": {"group_by": "file", "max_force": 10.0},
    "free_atoms_only": True,
    "val": 0.1,
    "test": 0.15,
    "shares": "oc20",
}

SETS = {
    chosen.name: chosen
    for chosen in (
        RealSet("threebpa", "molecular/3bpa_train_300K.xyz", "structure", "3BPA at 300 K, ωB97X/6-31G(d)"),
        RealSet("inp", "materials/inp_fitsnap.extxyz.gz", "structure", "InP with stress, LDA"),
        RealSet("oc20_direct", what="OC20 relaxations, free atoms, direct forces", **_OC20),
        RealSet("oc20_conservative", what="OC20 relaxations, free atoms, conservative forces", **_OC20),
        RealSet(
            "spice_complexes",
            "molecular/spice_amino_acid_ligand_GFN2.hdf5",
            "group",
            "amino acid–ligand complexes, GFN2-xTB labels",
        ),
        # Frames at random, and those of the highest stress (above 0.5 eV/Å³, often far from any minimum): without those
        # of forces above 10 eV/Å, up to 200, which would set the force scale. Materials stay whole across the files.
        RealSet(
            "mptrj",
            {"materials/mptrj_random.extxyz": {}, "materials/mptrj_highest_stress.extxyz": {}},
            "group",
            "MPtrj with stress, PBE(+U), materials held out",
            options={"keys": {"group": "mptrj_traj_id"}, "max_force": 10.0},
            recipe="mptrj_materials",
        ),
        # Frames of clusters of one to six molecules; compositions (``EC(1):PC(2)``) stay whole across the files. The
        # first three frames of the one are single atoms, of no composition.
        RealSet(
            "solvents",
            {"molecular/solvent_xtb_train.xyz": {"index": "3:"}, "molecular/solvent_xtb_more_1-2mol.xyz": {}},
            "group",
            "clusters of carbonate solvents, GFN2-xTB labels, compositions held out",
            options={"keys": {"energy": "energy_xtb", "forces": "forces_xtb", "group": "Comp"}},
        ),
    )
}


def divided(chosen: RealSet, out: Path) -> dict[str, Path] | None:
    """The store of each part below ``out``; None where the set was not divided there."""
    folder = out / chosen.folder
    return {part: folder / part for part in PARTS} if (folder / SPLIT).is_file() else None


def prepare(
    chosen: RealSet, data: Path, out: Path, *, dtype: str = "float64", max_val_atoms: int = MAX_VAL_ATOMS
) -> dict[str, Path]:
    """Divides a set into prepared stores, once; what is there already is used again.

    Args:
        chosen: which.
        data: folder of the real data.
        out: folder for the parts.
        dtype: of forces and stress.
        max_val_atoms: what the validation part is thinned to.

    Returns:
        The store of each part.

    Raises:
        DataError: no such data, a split that leaves nothing to train on, or a set divided from other files.
    """
    stores = divided(chosen, out)
    if stores is not None:
        source = json.loads((out / chosen.folder / SPLIT).read_text("utf-8"))["source"]
        names = [[Path(one).name for one in text.split()] for text in (source, " ".join(chosen.sources))]
        if names[0] != names[1]:
            raise DataError(f"{out / chosen.folder} was divided from {source}: remove it")
    if stores is None:
        stores = {part: out / chosen.folder / part for part in PARTS}
        structures = chosen.read(data)
        assigned = thin_validation(structures, assign_parts(structures, chosen), max_val_atoms)
        for part, path in stores.items():
            shutil.rmtree(path, ignore_errors=True)
            with StoreWriter(path, source=" ".join(chosen.sources), dtype=dtype) as writer:
                for structure, where in zip(structures, assigned, strict=True):
                    if where == part:
                        writer.write(structure)
        write_json(out / chosen.folder / SPLIT, describe_split(structures, assigned, chosen))
    return stores


def assign_parts(structures: list[AtomicData], chosen: RealSet) -> list[str]:
    """Part of each structure, by a hash of names: the same on every machine.

    A unit (structure or group) is held out only while every element of it stays in the training set, because a
    potential refuses elements that it never saw.

    Raises:
        DataError: some part stays empty.
    """
    by_group = chosen.split == "group"
    names = [str(data.group if by_group else data.structure_id) for data in structures]
    elements: dict[str, set[int]] = {}
    for name, data in zip(names, structures, strict=True):
        elements.setdefault(name, set()).update(data.atomic_numbers.tolist())
    in_training = Counter(z for numbers in elements.values() for z in numbers)
    wanted = {part: round(getattr(chosen, part) * len(elements)) for part in ("test", "val")}
    part_of = dict.fromkeys(elements, "train")
    for name in sorted(elements, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        part = next((part for part, count in wanted.items() if count > 0), None)
        if part is None:
            break
        if all(in_training[z] > 1 for z in elements[name]):
            part_of[name] = part
            wanted[part] -= 1
            in_training.subtract(elements[name])
    missing = set(PARTS) - set(part_of.values())
    if missing:
        raise DataError(f"{chosen.name}: no structures for {', '.join(sorted(missing))}: lower the fractions held out")
    return [part_of[name] for name in names]


def thin_validation(structures: list[AtomicData], assigned: list[str], max_atoms: int = MAX_VAL_ATOMS) -> list[str]:
    """Takes evenly spaced validation structures only; the others are not used at all."""
    places = [index for index, part in enumerate(assigned) if part == "val"]
    atoms = sum(structures[index].num_nodes for index in places)
    stride = max(1, math.ceil(atoms / max_atoms))
    left_out = set(places) - set(places[::stride])
    return ["unused" if index in left_out else part for index, part in enumerate(assigned)]


def describe_split(structures: list[AtomicData], assigned: list[str], chosen: RealSet) -> dict[str, Any]:
    """Counts of every part and the groups held out, as plain values."""
    described: dict[str, Any] = {"source": " ".join(chosen.sources), "split": chosen.split}
    for part in PARTS:
        members = [data for data, where in zip(structures, assigned, strict=True) if where == part]
        groups = sorted({str(data.group) for data in members})
        described[part] = {"structures": len(members), "atoms": sum(data.num_nodes for data in members)}
        if chosen.split == "group":
            described[part]["groups"] = len(groups)
            if part != "train":
                described[part]["group_names"] = groups
    return described


def baselines(stores: Mapping[str, Path], free_atoms_only: bool) -> dict[str, dict[str, float]]:
    """Mean absolute errors on the test part of predictors that need no model; meV/atom, meV/Å, meV/Å³.

    ``mean``: the mean energy per atom and the mean stress of the training part, forces of zero. ``linear``: energies
    from element references, by least squares on the training part; forces of zero; stress of zero.
    ``energy_within_groups``: the error of predicting the mean energy of each test group, for energies within a system.
    """
    train, test = list(Store(stores["train"])), list(Store(stores["test"]))
    references = fit_statistics(train).element_references
    per_atom = np.array([float(data.energy) / data.num_nodes for data in test])
    mean = np.mean([float(data.energy) / data.num_nodes for data in train])
    linear = [np.mean([references[z] for z in data.atomic_numbers.tolist()]) for data in test]
    forces = np.concatenate([data.forces[~data.fixed if free_atoms_only else slice(None)].numpy() for data in test])
    codes = np.unique([str(data.group) for data in test], return_inverse=True)[1]
    group_mean = np.bincount(codes, weights=per_atom) / np.bincount(codes)
    found = {
        "mean": {"energy": 1e3 * float(np.abs(per_atom - mean).mean())},
        "linear": {"energy": 1e3 * float(np.abs(per_atom - linear).mean())},
    }
    for values in found.values():
        values["energy_within_groups"] = 1e3 * float(np.abs(per_atom - group_mean[codes]).mean())
        values["forces"] = 1e3 * float(np.abs(forces).mean())
    stress = np.array([data.stress[0].numpy() for data in test])
    if np.isfinite(stress).all():
        mean_stress = np.mean([data.stress[0].numpy() for data in train], axis=0)
        found["mean"]["stress"] = 1e3 * float(np.abs(stress - mean_stress).mean())
        found["linear"]["stress"] = 1e3 * float(np.abs(stress).mean())
    return found
