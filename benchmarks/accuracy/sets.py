"""Sets of the accuracy bench: where each comes from, how long it is trained on, what its errors are split by."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ase.io
import numpy as np
from accuracy import xtb
from accuracy.taught import TAUGHT
from property_teachers import make_frames
from real_data_sets import SETS as REAL
from real_data_sets import RealSet, prepare

from escaip.data import AtomicData, Store, StoreWriter, open_source
from escaip.errors import DataError
from escaip.files import write_aside

Kind = Callable[[AtomicData], str]


def charge(data: AtomicData) -> str:
    value = int(data.charge)
    return "neutral" if value == 0 else "ions"


def group(data: AtomicData) -> str:
    return str(data.group)


@dataclass(frozen=True)
class BenchSet:
    """One set.

    Attributes:
        real: where it comes from and how it is divided.
        steps: of the optimizer.
        kind: splits the errors on the test part; None for thirds by the largest force of a structure.
        also: tests beyond the test part, by name: files below the folder of the set.
        changes: of the recipe, by option.
        measures: further ones, by the name of a function of ``measures``.
        before: options whose value an arm gives as ``before``: what the recipe had before the bench.
    """

    real: RealSet
    steps: int
    kind: Kind | None = None
    also: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    measures: tuple[str, ...] = ()
    before: Mapping[str, Any] = field(default_factory=dict)

    def options(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The changes of the set and those of an arm."""
        found = {**self.changes, **changes}
        found = {name: self.before.get(name) if value == "before" else value for name, value in found.items()}
        return {name: value for name, value in found.items() if value is not None}

    def stores(self, data: Path, out: Path) -> dict[str, Path]:
        """Returns the store of each part and of each further test, made where needed.

        Args:
            data: folder of the real data.
            out: folder for what is made of them.
        """
        real, files = self.real, {}
        if self.real.name in TAUGHT:
            path = out / real.name / "frames.extxyz"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with write_aside(path) as aside:
                    ase.io.write(aside, make_frames(TAUGHT[real.name], 300, 0), format="extxyz")
            real = dataclasses.replace(real, source=str(path.resolve()))
        if self.also:
            files = xtb.make(data / "molecular/3bpa_train_300K.xyz", out / real.name)
            real = dataclasses.replace(real, source=str(files["train"].resolve()))
        stores = prepare(real, data, out)
        for name in self.also:
            stores[name] = out / real.folder / f"test_{name}"
            if not stores[name].exists():
                with StoreWriter(stores[name], source=name) as writer:
                    for structure in open_source(files[name]):
                        writer.write(structure)
        return stores


def thinned(store: Path, count: int) -> Path:
    """Returns a store of ``count`` structures of another, beside it, made where needed.

    The first structure of each element, because a potential refuses elements that it never saw, and others evenly
    spread over the rest.

    Raises:
        DataError: there are fewer structures, or more are needed to show every element.
    """
    path = store.with_name(f"{store.name}_{count}")
    if path.exists():
        return path
    structures = list(Store(store))
    first: dict[int, int] = {}
    for index, data in enumerate(structures):
        for element in data.atomic_numbers.tolist():
            first.setdefault(element, index)
    shown = sorted(set(first.values()))
    if not len(shown) <= count <= len(structures):
        raise DataError(f"{store}: {count} frames asked for: give {len(shown)} to {len(structures)}")
    rest, more = sorted(set(range(len(structures))) - set(shown)), count - len(shown)
    with StoreWriter(path, source=str(store)) as writer:
        for index in sorted([*shown, *(rest[k * len(rest) // more] for k in range(more))]):
            writer.write(structures[index])
    return path


def kinds_of(chosen: BenchSet, store: Path) -> list[str]:
    """The kind of each structure of a test part."""
    structures = list(Store(store))
    if chosen.kind is not None:
        return [chosen.kind(data) for data in structures]
    largest = np.array([float(data.forces.norm(dim=1).max()) for data in structures])
    limits = np.quantile(largest, [1 / 3, 2 / 3])
    return [f"third {1 + int(np.searchsorted(limits, value))} by force" for value in largest]


def size(data: AtomicData) -> str:
    return "up to 20 atoms" if data.num_nodes <= 20 else "up to 40 atoms" if data.num_nodes <= 40 else "larger"


_MOLECULES = {
    "model.losses.energy": "{weight: 1.0, kind: mae, final_weight: null}",
    "model.learning_rate": 2.0e-3,
    "ema.decay": 0.995,
}
_CRYSTALS = {
    "model.losses.energy": "{weight: 10.0, kind: huber, delta: 0.1, final_weight: 50.0}",
    "model.learning_rate": 2.0e-3,
    "ema.decay": 0.995,
}


def _taught(name: str) -> BenchSet:
    """Frames of a crystal with vacancies, labelled by another potential."""
    architecture = {"cutoff": TAUGHT[name].cutoff, "num_neighbors": "null"}
    changes = {f"model.architecture.{key}": value for key, value in architecture.items()}
    real = RealSet(name, "", "structure", f"taught {name}", recipe="inp")
    return BenchSet(real, 1500, changes=changes, measures=("crystal",), before=_CRYSTALS)


_INP = dataclasses.replace(REAL["inp"], options={"keys": {"group": "group"}})
_OC20 = REAL["oc20_conservative"]
_OC20_FRAMES = dataclasses.replace(
    _OC20, name="oc20_frames", split="structure", shares=None, recipe="oc20_conservative"
)

SETS = {
    one.real.name: one
    for one in (
        BenchSet(
            REAL["threebpa"], 2000, measures=("survival", "dimers", "drift"), before=_MOLECULES
        ),
        BenchSet(
            RealSet("threebpa_xtb", "train.extxyz", "structure", "3BPA, GFN2-xTB labels", recipe="threebpa"),
            2000, also=("hot", "stretched"), measures=("dimers", "worst_frames"), before=_MOLECULES,
        ),
        BenchSet(
            RealSet("acac", "molecular/acac_train_300K.xyz", "structure", "acetylacetone at 300 K", recipe="threebpa"),
            1500, measures=("dimers",), before=_MOLECULES,
        ),
        BenchSet(
            RealSet(
                "ethanol", "molecular/ethanol_methanol_train.xyz", "structure", "ethanol and methanol",
                options={"keys": {"group": "config_type"}}, recipe="threebpa",
            ),
            1500, kind=group, before=_MOLECULES,
        ),
        BenchSet(
            RealSet(
                "organic",
                {"molecular/spice_des_monomers_GFN2.hdf5": {}, "molecular/spice_amino_acid_ligand_GFN2.hdf5": {}},
                "group", "molecules and complexes of amino acids, GFN2-xTB labels, molecules held out",
                options={"format": "spice"}, recipe="spice_small",
            ),
            2000, kind=charge, measures=("dimers",), before={**_MOLECULES, "ema.decay": None},
        ),
        BenchSet(REAL["solvents"], 1000, kind=size, before=_MOLECULES),
        BenchSet(_INP, 1000, kind=group, measures=("defects",), before=_CRYSTALS),
        BenchSet(
            RealSet(
                "silicon", "materials/mvl_Si_train.extxyz.gz", "structure", "silicon with vacancies and surfaces",
                options={"keys": {"group": "group"}}, recipe="inp",
            ),
            600, kind=group, before=_CRYSTALS,
        ),
        BenchSet(
            RealSet(
                "monbtaw", "materials/mvl_MoNbTaW_train.extxyz.gz", "structure", "alloys of Mo, Nb, Ta and W",
                options={"keys": {"group": "tag"}}, recipe="inp",
            ),
            1500, kind=group, changes={"model.architecture.density_channels": 4}, before=_CRYSTALS,
        ),
        BenchSet(REAL["mptrj"], 1000),
        BenchSet(_OC20, 600),
        BenchSet(_OC20_FRAMES, 600),
        *(_taught(name) for name in TAUGHT),
    )
}  # fmt: skip
