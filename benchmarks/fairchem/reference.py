"""What fairchem-core's EScAIP answers, written to a folder; runs inside the environment of make_reference.sh.

python benchmarks/fairchem/reference.py --out DIR [--size committed|small|realistic]

Models have random weights, none left at its initial value, rounded to float16 so that they are exact in every
precision. Every answer is given twice: as fairchem-core computes it (float32), and by the same code in float64, which
tells rounding from disagreement. Nothing of this package is imported here, and nothing of fairchem-core is copied.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import ase.build
import numpy as np
import torch
from ase import Atoms
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.base import HydraModelV2
from fairchem.core.models.escaip import EScAIP
from fairchem.core.models.escaip.utils import graph_utils

# The epsilon of its norms in float32, kept in float64.
NORM_EPS = torch.finfo(torch.float32).eps

BASE: dict[str, Any] = {
    "regress_forces": True, "direct_forces": False, "regress_stress": True, "use_compile": False,
    "use_padding": False, "use_pbc": True, "max_num_elements": 110, "max_atoms": 1000, "max_batch_size": 64,
    "max_radius": 6.0, "knn_k": 20, "knn_pad_size": 40, "knn_soft": True, "knn_sigmoid_scale": 0.2,
    "knn_lse_scale": 0.1, "knn_use_low_mem": True, "atten_name": "memory_efficient",
}  # fmt: skip
COMMITTED: dict[str, Any] = {
    **BASE, "max_num_elements": 32, "hidden_size": 16, "num_layers": 2, "atten_num_heads": 2,
    "freequency_list": [2, 2, 1, 2, 1], "atom_embedding_size": 4, "node_direction_embedding_size": 4,
    "node_direction_expansion_size": 5, "edge_distance_expansion_size": 16, "edge_distance_embedding_size": 12,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **BASE, "hidden_size": 32, "num_layers": 2, "atten_num_heads": 4, "freequency_list": [3, 2, 1, 1, 1],
    "atom_embedding_size": 16, "node_direction_embedding_size": 8, "node_direction_expansion_size": 10,
    "edge_distance_expansion_size": 64, "edge_distance_embedding_size": 24,
}  # fmt: skip
REALISTIC: dict[str, Any] = {
    **BASE, "knn_pad_size": 30, "hidden_size": 128, "num_layers": 4, "atten_num_heads": 8,
    "freequency_list": [5, 3, 2, 3, 3],
}  # fmt: skip
DIRECT = {"direct_forces": True, "regress_stress": False}
OPEN = {"use_pbc": False, "regress_stress": False}
# Ranks that hear of their truncation. Where it cuts through equal distances, as in perfect crystals, which of them are
# ranked is left to an unstable sort, and derivatives with it.
NARROW = {"knn_k": 8, "knn_sigmoid_scale": 0.9, "freequency_list": [4, 0, 4]}


@dataclass(frozen=True)
class Case:
    """One model: its name, its configuration, and the structures that it leaves out."""

    name: str
    config: dict[str, Any]
    without: tuple[str, ...] = ()

    @property
    def is_direct(self) -> bool:
        return bool(self.config["direct_forces"])


def cases(size: str) -> list[Case]:
    if size == "committed":
        return [
            Case("conservative", COMMITTED),
            Case("direct", {**COMMITTED, **DIRECT, "num_layers": 1}),
            Case(
                "truncated",
                {**COMMITTED, **NARROW, "num_layers": 1, "hidden_size": 8, "atten_num_heads": 1},
                without=("salt", "chain", "one_atom_cell", "atom", "batch"),
            ),
        ]
    if size == "realistic":
        return [Case("conservative", REALISTIC), Case("direct", {**REALISTIC, **DIRECT})]
    return [
        Case("conservative", SMALL),
        Case("direct", {**SMALL, **DIRECT}),
        Case("open", {**SMALL, **OPEN}),
        Case("gated", {**SMALL, "use_message_gate": True, "num_layers": 1}),
        Case("layernorm", {**SMALL, **DIRECT, "normalization": "layernorm", "activation": "leaky_relu"}),
        Case("plain_norms", {**SMALL, "normalization": "skip", "use_frequency_embedding": False, "num_layers": 1}),
        Case("shells", {**SMALL, "knn_k": 30, "knn_pad_size": 60, "max_num_elements": 130, "knn_sigmoid_scale": 0.3}),
        Case(
            "truncated",
            {**SMALL, **NARROW},
            without=("salt", "metal", "one_atom_cell", "perfect_silicon", "batch"),
        ),
    ]


def structures(size: str) -> dict[str, Atoms]:
    """Every kind of structure; periodic ones with room for what fairchem-core does with the flags of periodicity.

    It takes all three axes as periodic or none: a slab or a chain needs 7 Å of vacuum to mean the same.
    """
    boxed = ase.build.molecule("CH3CH2OH", vacuum=7.0)
    boxed.pbc = True
    salt = ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    slab = ase.build.fcc100("Al", (2, 2, 3), vacuum=7.0)
    slab.pbc = [True, True, False]
    chain = Atoms("SiO", [[7, 7, 0.2], [8.1, 7.4, 1.9]], cell=[14.5, 14.5, 3.4], pbc=[False, False, True])
    silicon = ase.build.bulk("Si", "diamond", a=5.43, cubic=True)
    skewed = Atoms("MgOSi", [[0.1, 0.2, 0.3], [2.1, 1.2, 0.8], [1.2, 2.9, 2.6]], pbc=True,
                   cell=[[4.1, 0.3, -0.2], [1.7, 4.4, 0.1], [-0.9, 1.1, 5.0]])  # fmt: skip
    alone = Atoms("O", cell=[16.0, 15.0, 14.0], pbc=True)
    alone.center()
    every = {
        "molecule": _rattled(boxed, 0.05),
        "metal": ase.build.bulk("Al", cubic=True),
        "salt": _rattled(salt, 0.08),
        "slab": _rattled(slab, 0.05),
        "chain": chain,
        "one_atom_cell": ase.build.bulk("Cu"),
        "triclinic": skewed,
        "atom": alone,
        "silicon": _rattled(silicon, 0.1),
        "water": _water(),
    }
    if size == "committed":
        return {name: every[name] for name in ("molecule", "salt", "chain", "one_atom_cell", "triclinic", "atom")}
    every["perfect_silicon"] = silicon.copy()
    every["large_cell"] = _rattled(ase.build.bulk("Al", cubic=True).repeat(2), 0.1)
    return every


def molecules() -> dict[str, Atoms]:
    """Open structures, for models that know no periodicity."""
    return {name: _rattled(ase.build.molecule(name), 0.05) for name in ("CH3CH2OH", "C6H6", "H2O", "NaCl", "O")}


def _rattled(atoms: Atoms, width: float) -> Atoms:
    copy = atoms.copy()
    copy.rattle(width, seed=3)
    return copy


def _water() -> Atoms:
    """Eight molecules of random orientation on a lattice of 3.1 Å."""
    rng = np.random.default_rng(5)
    box = Atoms(cell=[6.2, 6.2, 6.2], pbc=True)
    for corner in np.ndindex(2, 2, 2):
        molecule = ase.build.molecule("H2O")
        molecule.rotate(rng.uniform(0, 360), rng.normal(size=3))
        molecule.positions += 3.1 * np.array(corner) + 1.5
        box += molecule
    return box


def build(case: Case) -> HydraModelV2:
    backbone = EScAIP.EScAIPBackbone(**case.config)
    if case.is_direct:
        heads = {"energy": EScAIP.EScAIPEnergyHead(backbone), "forces": EScAIP.EScAIPDirectForceHead(backbone)}
    else:
        heads = {"efs": EScAIP.EScAIPGradientEnergyForceStressHead(backbone, wrap_property=False)}
    return HydraModelV2(backbone, heads).eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draws every weight anew, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.copy_(1.0 + 0.3 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.3 * noise)
        elif "atomic_embedding" in name:
            weight.copy_(noise)
        elif "edge_distance_embedding" in name:
            weight.copy_(smooth(noise) / (2 * math.sqrt(2 * math.pi)))
        else:
            weight.copy_(noise / math.sqrt(weight.shape[-1]))
    round_to_half(model)


def smooth(noise: torch.Tensor) -> torch.Tensor:
    """Noise of unit variance that varies over 0.3 Å along its columns, one for each Gaussian on 6 Å.

    Weights of trained models vary as slowly. Independent ones at 600 Gaussians make a function of the distance that
    float32 itself has to 2e-5 only.
    """
    place = torch.linspace(0.0, BASE["max_radius"], noise.shape[1])
    kernel = torch.exp(-0.5 * ((place[:, None] - place) / 0.3) ** 2)
    return noise @ (kernel / kernel.norm(dim=0))


@torch.no_grad()
def round_to_half(model: torch.nn.Module) -> None:
    for weight in model.parameters():
        weight.copy_(weight.half().to(weight.dtype))


def make_batch(group: list[Atoms], dtype: torch.dtype) -> Any:
    """A fresh batch: forward writes into it. Positions and cells are those of float32 in both precisions."""
    batch = atomicdata_list_to_batch([AtomicData.from_ase(atoms, task_name="omol") for atoms in group])
    batch.pos, batch.cell = batch.pos.to(dtype), batch.cell.to(dtype)
    return batch


class _DoubleTorch:
    """``torch`` with float32 meaning float64, for the modules that name float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64(model: torch.nn.Module) -> Iterator[None]:
    """Runs the code in float64: default type, weights, and the casts written into it."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)]
    casting = [module for module in model.modules() if hasattr(module, "backbone_dtype")]

    def switch(dtype: torch.dtype, eps: float | None) -> None:
        torch.set_default_dtype(dtype)
        model.to(dtype)
        for norm in norms:
            norm.eps = eps
        for module in casting:
            module.backbone_dtype = dtype

    switch(torch.float64, NORM_EPS)
    try:
        with (
            mock.patch.object(EScAIP, "torch", _DoubleTorch()),
            mock.patch.object(graph_utils, "torch", _DoubleTorch()),
        ):
            yield
    finally:
        switch(torch.float32, None)


def answer(case: Case, model: HydraModelV2, group: list[Atoms], dtype: torch.dtype) -> dict[str, np.ndarray]:
    out = model(make_batch(group, dtype))
    if case.is_direct:
        found = {"energy": out["energy"]["energy"], "forces": out["forces"]["forces"]}
    else:
        found = dict(out["efs"])
    if "stress" in found:
        found["stress"] = found["stress"].reshape(-1, 3, 3)
    for name, value in found.items():
        if value.dtype != dtype:
            raise SystemExit(f"{case.name}: {name} is {value.dtype}, expected {dtype}")
    return {name: value.detach().numpy() for name, value in found.items()}


@torch.no_grad()
def normalize(case: Case, model: HydraModelV2, atoms: Atoms) -> None:
    """Scales the last layers so that forces and energies are of order one."""
    forces = answer(case, model, [atoms], torch.float32)["forces"]
    factor = 1.0 / float(np.abs(forces).max())
    for name, weight in model.named_parameters():
        if "final_output" in name and "direction" not in name and not (case.is_direct and "energy" in name):
            weight.mul_(factor)
    round_to_half(model)


def write_case(case: Case, groups: dict[str, list[Atoms]], out: Path, seed: int) -> dict[str, list[int]]:
    """Writes weights (one flat array) and answers; returns the shapes of the weights by name."""
    model = build(case)
    randomize(model, seed)
    normalize(case, model, next(iter(groups.values()))[0])
    weights = model.state_dict()
    arrays = {"weights": torch.cat([weight.half().flatten() for weight in weights.values()]).numpy()}
    for name, group in groups.items():
        for key, value in answer(case, model, group, torch.float32).items():
            arrays[f"float32/{name}/{key}"] = value
        with in_float64(model):
            for key, value in answer(case, model, group, torch.float64).items():
                arrays[f"float64/{name}/{key}"] = value
        print(f"{case.name}: {name}", flush=True)
    write_npz(out / f"{case.name}.npz", arrays)
    return {name: list(weight.shape) for name, weight in weights.items()}


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A compressed ``.npz`` without times in it, so that the same numbers are the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = BytesIO()
            np.save(buffer, np.ascontiguousarray(array))
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), zipfile.ZIP_DEFLATED)


def describe(atoms: Atoms) -> dict[str, Any]:
    """The structure as the model saw it: wrapped, in float32."""
    seen = AtomicData.from_ase(atoms, task_name="omol")
    return {
        "numbers": atoms.numbers.tolist(),
        "positions": seen.pos.double().tolist(),
        "cell": seen.cell.double()[0].tolist() if atoms.pbc.any() else np.zeros((3, 3)).tolist(),
        "pbc": atoms.pbc.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=("committed", "small", "realistic"), default="small")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    args.out.mkdir(parents=True, exist_ok=True)

    periodic = {name: [atoms] for name, atoms in structures(args.size).items()}
    unlike = ("molecule", "salt", "chain") if args.size == "committed" else ("molecule", "salt", "chain", "water")
    periodic["batch"] = [periodic[name][0] for name in unlike]
    isolated = {name: [atoms] for name, atoms in molecules().items()}
    isolated["batch"] = [group[0] for group in isolated.values()]
    index: dict[str, Any] = {"size": args.size, "cases": {}, "groups": {}}
    index["versions"] = {"fairchem-core": version("fairchem-core"), "torch": torch.__version__}
    for seed, case in enumerate(cases(args.size)):
        groups, prefix = (periodic, "") if case.config["use_pbc"] else (isolated, "open_")
        named = {prefix + name: group for name, group in groups.items() if name not in case.without}
        shapes = write_case(case, named, args.out, seed)
        index["cases"][case.name] = {"config": case.config, "groups": list(named), "weights": shapes}
        index["groups"].update({name: [describe(atoms) for atoms in group] for name, group in named.items()})
    (args.out / "reference.json").write_text(json.dumps(index) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
