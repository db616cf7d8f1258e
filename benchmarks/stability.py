"""How many runs at constant temperature survive, for how long, and does a committee see a failure coming?

python benchmarks/stability.py --models NAME=FILE[,FILE...] --structure FILE --held-out FILE [--temperatures 300 1000]

Replicas of an isolated molecule run together in torch-sim with a Langevin thermostat, forces from the first model of
each name. Every few femtoseconds each is looked at. It has failed when a bond is more than 0.5 Å from its length at
the start (Fu et al., Forces are not enough, TMLR 2023, sec. 4), when atoms are closer than 0.4 of their covalent radii,
when the temperature is above three times the target, or when a number is not finite; it is then taken out. The other
models of the name evaluate the same structures and flag a run whose largest ``forces_spread`` is above ``--factor``
times the largest of all held-out frames: that number is what a user would give as ``--max-spread``. Needs torch-sim.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.data import covalent_radii
from common import markdown_table, provenance, write_json

from escaip import Potential, load_potential
from escaip.calculators.torchsim import EScAIPModel
from escaip.simulate import read_structure

BOND = 1.25  # times the sum of covalent radii: bonded at the start
STRETCH = 0.5  # Å
TOUCHING = 0.4
RUNAWAY = 3.0


@dataclass
class Fate:
    """Of one run.

    Attributes:
        failed: fs, or None of a survivor.
        why: what failed.
        flagged: fs when the committee's spread was first above the threshold, or None.
        spread: eV/Å, the largest before the failure.
    """

    failed: float | None = None
    why: str | None = None
    flagged: float | None = None
    spread: float = 0.0


class Molecule:
    """What to hold a structure against."""

    def __init__(self, atoms: Atoms) -> None:
        radii = covalent_radii[atoms.numbers]
        self.first, self.second = np.triu_indices(len(atoms), 1)
        reach = radii[self.first] + radii[self.second]
        length = np.linalg.norm(atoms.positions[self.first] - atoms.positions[self.second], axis=1)
        self.bonds = length < BOND * reach
        self.length, self.nearest = length[self.bonds], TOUCHING * reach

    def failures(self, positions: np.ndarray, temperature: np.ndarray, limit: float) -> list[str | None]:
        """Of ``positions (B, n, 3)`` Å and ``temperature (B,)`` K: what is wrong with each, or None."""
        distance = np.linalg.norm(positions[:, self.first] - positions[:, self.second], axis=2)
        stretch = np.abs(distance[:, self.bonds] - self.length).max(axis=1)
        found: list[str | None] = []
        for number in range(len(positions)):
            if not np.isfinite(positions[number]).all():
                found.append("not finite")
            elif stretch[number] > STRETCH:
                found.append("bond")
            elif (distance[number] < self.nearest).any():
                found.append("contact")
            else:
                found.append("temperature" if temperature[number] > limit else None)
        return found


def spread_of(forces: list[np.ndarray]) -> np.ndarray:
    """Largest of each structure's atoms, of members' forces ``(B, n, 3)``: as :class:`~escaip.CommitteeCalculator`."""
    values = np.stack(forces)
    return np.asarray(np.sqrt(values.var(axis=0).sum(axis=2)).max(axis=1))


def threshold_of(members: list[Potential], frames: list[Atoms], factor: float) -> float:
    """``--max-spread`` of a committee, from frames that it was not trained on."""
    forces = [[p.forces.numpy() for p in member.predict(frames)] for member in members]
    return factor * max(float(spread_of([f[i][None] for f in forces])[0]) for i in range(len(frames)))


class Langevin:
    """torch-sim's integrator, in its versions."""

    def __init__(self, model: EScAIPModel, atoms: Atoms, temperature: float, args: argparse.Namespace) -> None:
        import torch_sim

        self.model, self.new = model, hasattr(torch_sim, "nvt_langevin_init")
        state = torch_sim.io.atoms_to_state([atoms] * args.replicas, model.device, model.dtype)
        self.options = {
            "dt": torch.tensor(args.timestep * units.fs, dtype=model.dtype, device=model.device),
            "kT": torch.tensor(temperature * units.kB, dtype=model.dtype, device=model.device),
            "gamma": torch.tensor(args.friction / units.fs, dtype=model.dtype, device=model.device),
        }
        torch.manual_seed(args.seed)
        if self.new:
            state.rng = args.seed
            self.state = torch_sim.nvt_langevin_init(state, model, kT=self.options["kT"])
            self.step = torch_sim.nvt_langevin_step
        else:  # 0.3
            begin, self.step = torch_sim.integrators.nvt_langevin(model, seed=args.seed, **self.options)
            self.state = begin(state)

    def run(self, steps: int) -> None:
        """Moves all systems."""
        for _ in range(steps):
            if self.new:
                self.state = self.step(self.state, self.model, **self.options)
            else:
                self.state = self.step(self.state)


def study(members: list[EScAIPModel], atoms: Atoms, temperature: float, threshold: float, args: Any) -> list[Fate]:
    """Runs all replicas of one committee at one temperature."""
    molecule, count = Molecule(atoms), len(atoms)
    langevin = Langevin(members[0], atoms, temperature, args)
    fates = [Fate() for _ in range(args.replicas)]
    running = list(range(args.replicas))
    steps = round(args.picoseconds * 1000 / args.timestep)
    for step in range(args.watch, steps + 1, args.watch):
        langevin.run(args.watch)
        state, now = langevin.state, step * args.timestep
        kinetic = (state.momenta**2 / state.masses[:, None] / 2).sum(1).reshape(-1, count).sum(1).cpu().numpy()
        positions = state.positions.reshape(-1, count, 3).cpu().numpy()
        wrong = molecule.failures(positions, kinetic / (1.5 * count * units.kB), RUNAWAY * temperature)
        for number, why in zip(running, wrong, strict=True):
            if why is not None:
                fates[number].failed, fates[number].why = now, why
        lost = [place for place, why in enumerate(wrong) if why is not None]
        if lost:
            running = [number for place, number in enumerate(running) if place not in lost]
            if not running:
                break
            state.pop(lost)
        if len(members) > 1:
            others = [member(state)["forces"] for member in members[1:]]
            forces = [x.reshape(-1, count, 3).cpu().numpy() for x in (state.forces, *others)]
            for number, spread in zip(running, spread_of(forces), strict=True):
                fates[number].spread = max(fates[number].spread, float(spread))
                if spread > threshold and fates[number].flagged is None:
                    fates[number].flagged = now
    return fates


def summary(fates: list[Fate], committee: bool, picoseconds: float) -> dict[str, Any]:
    """Numbers of the table."""
    failed = [fate for fate in fates if fate.failed is not None]
    before = [fate for fate in failed if fate.flagged is not None]
    lead = [fate.failed - fate.flagged for fate in before if fate.failed is not None and fate.flagged is not None]
    # Of an exponential law seen for a limited time: all time that was lived, over all failures.
    lived = sum(picoseconds if fate.failed is None else fate.failed * 1e-3 for fate in fates)
    return {
        "runs": len(fates),
        "survived": len(fates) - len(failed),
        "mean_time_to_failure_ps": lived / len(failed) if failed else None,
        "lived_ps": lived,
        "why": {why: sum(fate.why == why for fate in failed) for why in sorted({str(fate.why) for fate in failed})},
        "flagged_before_failure": len(before) if committee else None,
        "median_lead_fs": float(np.median(lead)) if lead else None,
        "survivors_flagged": sum(f.failed is None and f.flagged is not None for f in fates) if committee else None,
        "largest_spread": max(fate.spread for fate in fates) if committee else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FILE[,FILE...]")
    parser.add_argument("--structure", required=True)
    parser.add_argument("--held-out", required=True, help="frames that no model was trained on")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 1000.0], metavar="K")
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--picoseconds", type=float, default=2.0)
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--friction", type=float, default=0.01, help="1/fs")
    parser.add_argument("--watch", type=int, default=10, help="steps between looks")
    parser.add_argument("--factor", type=float, default=1.5, help="of the largest spread of held-out frames")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/stability.json"))
    args = parser.parse_args()
    atoms, held_out = read_structure(args.structure), ase.io.read(args.held_out, ":")
    rows: list[dict[str, Any]] = []
    for name, files in (value.split("=", 1) for value in args.models):
        potentials = [load_potential(path) for path in files.split(",")]
        threshold = threshold_of(potentials, held_out, args.factor) if len(potentials) > 1 else np.inf
        members = [EScAIPModel(p, args.device, compute_stress=False, compile=True) for p in potentials]
        for temperature in args.temperatures:
            began = time.perf_counter()
            fates = study(members, atoms, temperature, threshold, args)
            rows.append({
                "model": name, "members": len(members), "temperature": temperature,
                "threshold": threshold if len(members) > 1 else None,
                **summary(fates, len(members) > 1, args.picoseconds), "seconds": time.perf_counter() - began,
                "fates": [asdict(fate) for fate in fates],
            })  # fmt: skip
            print({key: value for key, value in rows[-1].items() if key != "fates"}, flush=True)
            content = provenance()
            content["command"] = (
                f"python benchmarks/stability.py --models ... --temperatures {' '.join(map(str, args.temperatures))} "
                f"--replicas {args.replicas} --picoseconds {args.picoseconds} --timestep {args.timestep}"
            )
            write_json(args.out, {"provenance": content, "factor": args.factor, "rows": rows})
    print(render(rows))


def render(rows: list[dict[str, Any]]) -> str:
    """The table."""

    def text(value: float | None, form: str = "g") -> str:
        return "—" if value is None else format(value, form)

    return markdown_table(
        ["model", "T K", "survived", "MTTF ps", "why", "flagged", "lead fs", "survivors flagged", "spread / limit"],
        [
            [
                row["model"],
                f"{row['temperature']:g}",
                f"{row['survived']} of {row['runs']}",
                text(row["mean_time_to_failure_ps"], ".2g"),
                ", ".join(f"{count} {why}" for why, count in row["why"].items()),
                f"{text(row['flagged_before_failure'])} of {row['runs'] - row['survived']}",
                text(row["median_lead_fs"]),
                text(row["survivors_flagged"]),
                f"{text(row['largest_spread'], '.2g')} / {text(row['threshold'], '.2g')}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
