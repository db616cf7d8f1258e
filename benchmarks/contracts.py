"""The physics contracts in numbers: every error of ``escaip.testing`` for fresh and for trained models, in float64.

python benchmarks/contracts.py [--model runs/quickstart/best.ckpt ...] [--out benchmarks/results/contracts.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import torch
from ase import Atoms
from common import markdown_table, provenance, write_json

from escaip import EScAIPConfig, Potential, load_potential
from escaip.data import AtomicData, collate
from escaip.graph import build_graph
from escaip.testing import check_potential, continuity_error, evaluator, rotation_errors


def structures(potential: Potential) -> list[Atoms]:
    """Periodic and open structures, with elements the potential knows."""
    known = set(potential.metadata.elements) or set(range(1, 119))
    if {1, 6, 8} <= known:
        carbon = ase.build.bulk("C", "diamond", a=3.57)
        hydrate = ase.build.molecule("H2O")
        hydrate.set_cell([[5.0, 0, 0], [1.5, 5.0, 0], [0.5, 0.5, 6.0]])
        hydrate.pbc = [True, True, False]
        chain = Atoms("C", cell=[[2.4, 0.2, 0.1], [0, 3.1, 0], [0.3, 0, 2.9]], pbc=True)
        return [ase.build.molecule("CH3CH2OH"), ase.build.molecule("CH3COOH"), _rattled(carbon, 0.05), hydrate, chain]
    first, last = min(known), max(known)
    crystal = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    crystal.numbers[:] = np.where(crystal.numbers == 11, first, last)
    primitive = ase.build.bulk("Cu", "fcc", a=4.0)
    primitive.numbers[:] = first
    return [_rattled(crystal, 0.1), primitive]


def _rattled(atoms: Atoms, width: float) -> Atoms:
    atoms.rattle(width, seed=1)
    return atoms


def continuity(potential: Potential, num_crossings: int = 8) -> tuple[float, float, int]:
    """Largest second difference of energy (eV) and force (eV/Å) over 1e-5 Å steps where tokens come or go.

    One atom of a rattled crystal moves; each change of its neighbor lists is found by bisection and crossed in 21
    steps. Also returns how many were crossed.
    """
    number = potential.metadata.elements[-1] if potential.metadata.elements else 29
    atoms = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 2, 2))
    atoms.numbers[:] = number
    atoms.rattle(0.15, seed=4)

    def moved(distance: float) -> Atoms:
        copy = atoms.copy()
        copy.positions[3] += distance * np.array([0.6, 0.64, 0.48])
        return copy

    def tokens(distance: float) -> set[tuple[int, ...]]:
        graph = build_graph(collate([AtomicData.from_ase(moved(distance))]), potential.config.graph)
        shift = graph.shift[: graph.num_tokens]
        rows = torch.cat([graph.token_center[:, None], graph.token_neighbor[:, None], shift], 1)
        return {tuple(row) for row in rows.tolist()}

    evaluate = evaluator(potential)
    grid = np.linspace(0.0, 0.6, 121)
    sets = [tokens(distance) for distance in grid]
    changes = [k for k in range(len(grid) - 1) if sets[k] != sets[k + 1]][:num_crossings]
    if not changes:
        raise SystemExit("contracts: no token comes or goes along the path, so continuity is not tested: move farther")
    worst = (0.0, 0.0)
    for k in changes:
        low, high = float(grid[k]), float(grid[k + 1])
        while high - low > 1e-6:
            middle = 0.5 * (low + high)
            low, high = (middle, high) if tokens(middle) == sets[k] else (low, middle)
        jumps = continuity_error(evaluate, [moved(low + 1e-5 * step) for step in range(-10, 11)])
        worst = (max(worst[0], jumps[0]), max(worst[1], jumps[1]))
    return *worst, len(changes)


def measure(name: str, potential: Potential) -> dict[str, Any]:
    """All errors of one potential."""
    potential = potential.double().eval()
    conservative = potential.config.is_conservative
    rows: dict[str, Any] = {"model": name, "parameters": sum(p.numel() for p in potential.parameters())}
    if conservative:
        tolerances = {"energy_tolerance": float("inf"), "derivative_tolerance": float("inf")}
        errors: dict[str, float] = {}
        for check in check_potential(potential, structures(potential), **tolerances):
            contract = check.name.split(": ")[-1]
            errors[contract] = max(errors.get(contract, 0.0), check.error)
        errors["energy jump (eV)"], errors["force jump (eV/Å)"], rows["crossings"] = continuity(potential)
        rows["errors"] = errors
    else:
        rng = np.random.default_rng(0)
        forces = [
            rotation_errors(evaluator(potential), atoms, rng) for atoms in structures(potential) for _ in range(5)
        ]
        rows["errors"] = {
            "energy under rotation": max(e for e, _ in forces),
            "forces under rotation": max(f for _, f in forces),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a trained model; may be repeated")
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/contracts.json"))
    args = parser.parse_args()

    torch.manual_seed(0)
    results = [
        measure(f"{args.preset}, random weights", Potential(EScAIPConfig.preset(args.preset))),
        measure(f"{args.preset}, random weights, direct", Potential(EScAIPConfig.preset(args.preset, forces="direct"))),
    ]
    results += [measure(path, load_potential(path, device="cpu")) for path in args.model]
    for result in results:
        crossed = f", {result['crossings']} crossings" if "crossings" in result else ""
        print(f"\n{result['model']}{crossed}")
        print(markdown_table(["contract", "largest error"], [[k, f"{v:.1e}"] for k, v in result["errors"].items()]))
    write_json(args.out, {"provenance": provenance(), "results": results})


if __name__ == "__main__":
    main()
