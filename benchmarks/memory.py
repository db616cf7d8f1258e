"""Resident memory of a long run: whether anything is kept from one step to the next.

python benchmarks/memory.py [--steps 100000] [--preset 300k] [--compile] [--committee 2] [--out FILE]

Ethanol in NVE from 300 K with random weights in float32 through :func:`escaip.simulate.run_md`, log, trajectory and
restarts included, on one thread. A spring holds each atom near its place, since random weights hold none. Memory is
that of step 1 000, of every tenth of the run and of its end.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from ase.build import molecule
from ase.constraints import Hookean
from common import provenance, write_json

from escaip import EScAIPCalculator, EScAIPConfig, Potential
from escaip.simulate import MDSettings, MDStatus, run_md

WARM_UP = 1000


def resident() -> float:
    """MiB that the process holds now."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


def calculator(preset: str, compile: bool, members: int) -> Any:
    potentials = []
    for seed in range(members):
        torch.manual_seed(seed)
        potentials.append(Potential(EScAIPConfig.preset(preset)).eval())
    if members == 1:
        return EScAIPCalculator(potentials[0], device="cpu", compile=compile)
    from escaip.calculators import CommitteeCalculator

    return CommitteeCalculator(potentials, device="cpu", compile=compile)


def main() -> None:
    """Prints one line per tenth of the run, and what was gained since step 1 000."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--preset", default="300k")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--committee", type=int, default=1, metavar="M", help="members")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}")
    torch.set_num_threads(1)
    atoms = molecule("CH3CH2OH")
    atoms.set_constraint([Hookean(index, place, k=20.0, rt=0.05) for index, place in enumerate(atoms.positions.copy())])
    atoms.calc = calculator(args.preset, args.compile, args.committee)
    found: dict[int, float] = {}

    def report(status: MDStatus) -> None:
        if status.step == WARM_UP or (status.step > WARM_UP and status.step % max(args.steps // 10, 100) == 0):
            found[status.step] = resident()
            print(f"step {status.step:7d}  {found[status.step]:8.1f} MiB  {status.ns_per_day:.3g} ns/day", flush=True)

    settings = MDSettings(
        steps=args.steps, timestep=0.5, temperature=300.0, log_interval=100, trajectory_interval=100,
        max_temperature=1e6,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run_md(atoms, settings, out=os.path.join(folder, "nve.extxyz"), report=report)
    first, last = found[WARM_UP], resident()
    print(f"{last - first:+.1f} MiB from step {WARM_UP} to the end")
    if args.out:
        result = {"resident_mib": {str(step): round(value, 2) for step, value in found.items()}, "end_mib": last}
        write_json(args.out, {"provenance": provenance(), "settings": {**vars(args), "out": None}, **result})


if __name__ == "__main__":
    main()
