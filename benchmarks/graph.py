"""Cost of the graph against system size, in C++ and in plain operations, and of the neighbor libraries installed.

    python benchmarks/graph.py [--sizes 1000 10000 100000] [--libraries] [--out results.json]

Prints medians in µs per atom and the slope of log(time) against log(atoms); 1 is linear.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase.build
import numpy as np
import torch
from ase import Atoms
from common import measure, provenance, write_json
from peers.structures import aspirin

from escaip.graph import build_graph, compute_geometry, neighbor_list, search_cutoff
from escaip.graph.knn import reference_graph
from escaip.graph.native import has_kernels
from escaip.graph.systems import Systems
from escaip.types import Graph, GraphSettings, NeighborList

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
SETTINGS = GraphSettings()


def copper(num_atoms: int) -> Atoms:
    """Rattled face-centred cubic copper, periodic, of about ``num_atoms``."""
    repeat = round((num_atoms / 4) ** (1 / 3))
    atoms = ase.build.bulk("Cu", cubic=True) * (repeat, repeat, repeat)
    atoms.rattle(0.1, seed=0)
    return atoms


def water(num_atoms: int) -> Atoms:
    """Randomly turned water molecules on a cubic grid at liquid density, periodic, of about ``num_atoms``."""
    rng = np.random.default_rng(0)
    repeat, spacing = round((num_atoms / 3) ** (1 / 3)), 3.107
    grid = np.stack(np.meshgrid(*[np.arange(repeat)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) * spacing
    grid = grid + rng.normal(scale=0.2, size=grid.shape)
    rotation = np.linalg.qr(rng.normal(size=(len(grid), 3, 3)))[0]
    positions = grid[:, None] + ase.build.molecule("H2O").positions @ rotation
    return Atoms("OHH" * len(grid), positions.reshape(-1, 3), cell=np.eye(3) * repeat * spacing, pbc=True)


def molecules(num_atoms: int) -> list[Atoms]:
    """A training batch: molecules of 9 to 15 atoms in vacuum, ``num_atoms`` in all or a few more."""
    names = ("CH3CH2OH", "C6H6", "isobutane", "C5H5N", "C2H6CHOH", "trans-butane")
    chosen: list[Atoms] = []
    while sum(map(len, chosen)) < num_atoms:
        chosen.append(ase.build.molecule(names[len(chosen) % len(names)]))
    return chosen


def to_batch(structures: list[Atoms]) -> SimpleNamespace:
    """The fields of a PyG batch that the graph reads."""
    sizes = torch.tensor([len(atoms) for atoms in structures])
    return SimpleNamespace(
        positions=torch.tensor(np.concatenate([atoms.positions for atoms in structures])),
        cell=torch.tensor(np.stack([np.array(atoms.cell) for atoms in structures])),
        pbc=torch.tensor(np.stack([atoms.pbc for atoms in structures])),
        batch=torch.repeat_interleave(torch.arange(len(structures)), sizes),
        ptr=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
    )


def measure_graph(structures: list[Atoms], repeats: int) -> dict[str, float]:
    """Seconds of each stage for one batch, and what the graph holds; small batches are repeated more often."""
    batch, cutoff = to_batch(structures), search_cutoff(SETTINGS)
    repeats = max(repeats, 20_000 // len(batch.positions))
    neighbors, graph = neighbor_list(batch, cutoff), build_graph(batch, SETTINGS)
    positions, cell = batch.positions.clone().requires_grad_(), batch.cell.clone().requires_grad_()

    def geometry() -> torch.Tensor:
        return compute_geometry(positions, cell, batch.batch, graph, SETTINGS, torch.float32).log_envelope

    def gradient() -> Any:
        return torch.autograd.grad(geometry().exp().sum(), (positions, cell))

    def plain(neighbors: NeighborList | None = None) -> Graph:
        return reference_graph(Systems.read(batch), SETTINGS, neighbors, cutoff, 0.0)

    num_atoms = len(batch.positions)
    return {
        "atoms": num_atoms,
        "systems": len(structures),
        "tokens_per_atom": graph.num_tokens / num_atoms,
        "rank_pairs_per_atom": len(graph.rank_token) / num_atoms,
        "neighbor_list": measure(lambda: neighbor_list(batch, cutoff), repeats),
        "build_graph": measure(lambda: build_graph(batch, SETTINGS), repeats),
        "reference_graph": measure(plain, repeats),
        "from_list": measure(lambda: build_graph(batch, SETTINGS, neighbors), repeats),
        "plain_from_list": measure(lambda: plain(neighbors), repeats),
        "geometry": measure(geometry, repeats),
        "geometry_and_gradient": measure(gradient, repeats),
    }


STAGES = (
    "neighbor_list", "build_graph", "reference_graph", "from_list", "plain_from_list", "geometry",
    "geometry_and_gradient",
)  # fmt: skip


def slope(rows: list[dict[str, float]], stage: str) -> float:
    """Least-squares slope of log(seconds) against log(atoms)."""
    atoms, seconds = np.log([row["atoms"] for row in rows]), np.log([row[stage] for row in rows])
    return float(np.polyfit(atoms, seconds, 1)[0])


def print_table(name: str, rows: list[dict[str, float]]) -> None:
    """Prints µs per atom."""
    print(f"\n{name}: µs per atom")
    print(f"{'atoms':>8}{'tokens':>8}{'pairs':>8}" + "".join(f"{stage:>22}" for stage in STAGES))
    for row in rows:
        cells = "".join(f"{row[stage] / row['atoms'] * 1e6:22.1f}" for stage in STAGES)
        print(f"{row['atoms']:8.0f}{row['tokens_per_atom']:8.1f}{row['rank_pairs_per_atom']:8.0f}{cells}")
    if len(rows) > 1:
        print(f"{'slope':>8}{'':16}" + "".join(f"{slope(rows, stage):22.2f}" for stage in STAGES))


def library_searches(atoms: Atoms, cutoff: float) -> dict[str, Callable[[], int]]:
    """Full directed list with image vectors, as number of edges, by each library that is installed."""
    positions, cell, pbc = atoms.positions, np.array(atoms.cell), atoms.pbc

    def vesin() -> int:
        search = importlib.import_module("vesin").NeighborList(cutoff=cutoff, full_list=True, n_threads=1)
        return len(search.compute(positions, cell, pbc, "ijS")[0])

    def matscipy() -> int:
        search = importlib.import_module("matscipy.neighbours").neighbour_list
        return len(search("ijS", positions=positions, cell=cell, pbc=pbc, cutoff=cutoff)[0])

    def pymatgen() -> int:
        search = importlib.import_module("pymatgen.optimization.neighbors").find_points_in_spheres
        found = search(positions, positions, cutoff, pbc.astype(np.int64), cell, 1e-8)
        return int((found[3] > 1e-8).sum())

    def ase_lists() -> int:
        search = importlib.import_module("ase.neighborlist").primitive_neighbor_list
        return len(search("ijS", pbc, cell, positions, cutoff)[0])

    def nvalchemiops() -> int:
        search = importlib.import_module("nvalchemiops.torch.neighbors").neighbor_list
        arguments = {"cell": torch.tensor(cell)[None], "pbc": torch.tensor(pbc)[None], "return_neighbor_list": True}
        return search(torch.tensor(positions), cutoff, **arguments)[0].shape[1]

    return {"vesin": vesin, "matscipy": matscipy, "pymatgen": pymatgen, "ase": ase_lists, "nvalchemiops": nvalchemiops}


def measure_libraries(sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each library at each size; a library that is not installed is left out."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        atoms = copper(size)
        row: dict[str, Any] = {"atoms": len(atoms)}
        for name, search in library_searches(atoms, search_cutoff(SETTINGS)).items():
            try:
                row[f"{name}_edges"] = search()
            except ImportError:
                continue
            row[name] = measure(search, repeats) * 1e3
        rows.append(row)
        shown = ", ".join(f"{k} {v:.1f} ms ({row[k + '_edges']} edges)" for k, v in row.items() if f"{k}_edges" in row)
        print(f"{row['atoms']} atoms: {shown}")
    return rows


def main() -> None:
    """Measures, prints, and writes JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="atoms of the periodic systems")
    parser.add_argument("--libraries", action="store_true", help="compare neighbor libraries too")
    parser.add_argument("--repeats", type=int, default=5, help="runs per figure, after one to warm up")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    result: dict[str, Any] = {"provenance": provenance(), "native": has_kernels(Systems.read(to_batch([aspirin()])))}
    print(
        f"{result['provenance']['threads']} threads; graphs are built in " + ("C++" if result["native"] else "PyTorch")
    )
    for name, make in (("rattled copper", copper), ("water", water)):
        result[name] = [measure_graph([make(size)], arguments.repeats) for size in arguments.sizes]
        print_table(name, result[name])
        result[f"{name} slopes"] = (
            {stage: slope(result[name], stage) for stage in STAGES} if len(result[name]) > 1 else {}
        )
    for name, structures in (("one molecule", [aspirin()]), ("batch of molecules", molecules(480))):
        result[name] = [measure_graph(structures, arguments.repeats)]
        print_table(name, result[name])
    if arguments.libraries:
        result["libraries"] = measure_libraries(arguments.sizes, arguments.repeats)
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
