"""Packages compiled ahead of time beside compiling at the first evaluation and beside none of it (docs/howto/files.md).

    python benchmarks/export.py [--preset 1m] [--threads 1] [--repeats 15] [--out FILE]

Each way has a process of its own, which says how long its first energy and forces took from the start of loading on;
the compilers' caches are empty. Then the processes take turns with evaluations at new positions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import torch
from common import markdown_table, provenance, write_json

from escaip import EScAIPCalculator, EScAIPConfig, Potential
from escaip.potential.export import export_model
from escaip.potential.loading import read_potential

WAYS = ("eager", "compile=True", "package")


def structures() -> dict[str, ase.Atoms]:
    made = {"ethanol, 9 atoms": ase.build.molecule("CH3CH2OH"), "256 Cu": ase.build.bulk("Cu", cubic=True).repeat(4)}
    for atoms in made.values():
        atoms.rattle(0.05, seed=0)
    return made


def serve(model: str, compile: str, threads: int) -> None:
    """Answers a line with the name of a structure by the milliseconds of one evaluation."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    calculator = EScAIPCalculator(model, device="cpu", compile=compile == "true")
    made, generator = structures(), np.random.default_rng(0)
    first = made["256 Cu"].copy()
    first.calc = calculator
    first.get_forces()
    print(json.dumps(time.perf_counter() - start), flush=True)
    for line in sys.stdin:
        atoms = made[json.loads(line)]
        atoms.calc = calculator
        atoms.positions += generator.uniform(-0.01, 0.01, atoms.positions.shape)
        start = time.perf_counter()
        atoms.get_forces()
        print(json.dumps(1e3 * (time.perf_counter() - start)), flush=True)


def start(way: str, folder: Path, threads: int) -> subprocess.Popen[str]:
    model = folder / ("model.pt2" if way == "package" else "model.escaip")
    command = [sys.executable, "-W", "ignore", __file__, "--serve", str(model), str(way == "compile=True").lower()]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / way), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [*command, "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **cache},
    )


def ask(process: subprocess.Popen[str], name: str) -> float:
    assert process.stdin is not None
    process.stdin.write(json.dumps(name) + "\n")
    process.stdin.flush()
    return answer(process)


def answer(process: subprocess.Popen[str]) -> float:
    assert process.stdout is not None
    return float(json.loads(process.stdout.readline()))


def compare(preset: str, threads: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="escaip-") as name:
        folder = Path(name)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "export")
        Potential(EScAIPConfig.preset(preset)).save(folder / "model.escaip")
        began = time.perf_counter()
        export_model(read_potential(folder / "model.escaip"), folder / "model.pt2", "aoti")
        result: dict[str, Any] = {"export_seconds": time.perf_counter() - began, "rows": []}
        result["package_MiB"] = (folder / "model.pt2").stat().st_size / 2**20
        processes, first = {}, {}
        for way in WAYS:
            processes[way] = start(way, folder, threads)
            first[way] = answer(processes[way])
        milliseconds: dict[tuple[str, str], list[float]] = {}
        for structure in structures():
            for turn in range(repeats + 2):
                for way in WAYS:
                    value = ask(processes[way], structure)
                    if turn >= 2:
                        milliseconds.setdefault((way, structure), []).append(value)
        for process in processes.values():
            process.kill()
            process.wait()
    for way in WAYS:
        times = {name: statistics.median(milliseconds[way, name]) for name in structures()}
        result["rows"].append({"way": way, "first_seconds": first[way], "ms": times})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve, args.threads)
        return
    result = {"provenance": provenance(), "preset": args.preset, **compare(args.preset, args.threads, args.repeats)}
    header = ["", "until the first answer, s", *(f"{name}, ms" for name in structures())]
    rows = [[r["way"], f"{r['first_seconds']:.1f}", *(f"{x:.1f}" for x in r["ms"].values())] for r in result["rows"]]
    print(markdown_table(header, rows))
    print(f"export took {result['export_seconds']:.0f} s; {result['package_MiB']:.1f} MiB")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
