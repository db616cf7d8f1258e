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


def continuity(potential: Potential) -> tuple[float, float]:
    """Largest second difference of energy and force over 1e-5 Å steps where neighbor lists change."""
    number = potential.metadata.elements[-1] if potential.metadata.elements else 29
    atoms = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 2, 2))
    atoms.numbers[:] = number
    atoms.rattle(0.15, seed=4)
    evaluate = evaluator(potential)
    worst = (0.0, 0.0)
    for start in np.arange(0.0, 0.02, 0.005):
        # 250 steps of 2e-5 Å: with some sixty tokens at the edge of the list, several come or go in each piece.
        path = []
        for step in range(250):
            moved = atoms.copy()
            moved.positions[3] += (start + 2e-5 * step) * np.array([0.6, 0.64, 0.48])
            path.append(moved)
        parts = [continuity_error(evaluate, path[i : i + 27]) for i in range(0, 250, 25)]
        worst = (max(worst[0], *(p[0] for p in parts)), max(worst[1], *(p[1] for p in parts)))
    return worst


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
        errors["energy jump (eV)"], errors["force jump (eV/Å)"] = continuity(potential)
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
        print(f"\n{result['model']}")
        print(markdown_table(["contract", "largest error"], [[k, f"{v:.1e}"] for k, v in result["errors"].items()]))
    write_json(args.out, {"provenance": provenance(), "results": results})


if __name__ == "__main__":
    main()
