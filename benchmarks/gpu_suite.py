"""Checks and times everything on a GPU in one command.

    python benchmarks/gpu_suite.py [--minutes 8] [--out DIR]

Every attention backend against float64 in value, first and second derivative; the main cases of attention.py, with
the expanded channels of the published implementation beside; the graph; whole conservative training
steps of the presets; and the quickstart recipe, in the time that is left. Writes ``gpu_suite.json`` under ``--out``
(by default the folder named by the variable OUT, else runs/bench). ``--device cpu --small`` runs it all tiny.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attention as bench
import torch
from common import markdown_table, measure, provenance, write_json
from torch import Tensor

from escaip import EScAIPConfig, Potential
from escaip.graph import build_graph
from escaip.ops import available_backends


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """``max ‖found − expected‖ / ‖expected‖``."""
    return max(float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


def attention(device: str, small: bool) -> list[dict[str, Any]]:
    """Errors against float64 of every backend, dtype and derivative, on ragged neighborhoods."""
    shapes = [(60, 8, 64)] if small else [(500, 16, 64), (500, 33, 64), (500, 48, 32), (20, 300, 64)]
    rows = []
    for atoms, neighbors, head_size in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            case = bench.Case(atoms, neighbors, head_size, 8, dtype, device)
            inputs, exact = case.inputs(), case.exact()
            functions = bench.candidates(case, None)
            expected = {step: bench.run(functions["reference"], exact, step) for step in bench.STEPS}
            for info in available_backends():
                if info.name not in functions:
                    continue
                row: dict[str, Any] = {"atoms": atoms, "neighbors": neighbors, "d": head_size, "dtype": str(dtype)[6:]}
                row |= {"backend": info.name, **dict.fromkeys(bench.STEPS), "failed": None}
                # Expanded channels are solid harmonics: their derivative by the direction differs off the unit sphere.
                compared = 4 if info.derivatives == 1 else 5
                for step in bench.STEPS[: None if info.derivatives is None else info.derivatives + 1]:
                    try:
                        found = bench.run(functions[info.name], inputs, step)
                        error = relative_error(found[:compared], expected[step][:compared])
                        row |= {step: error} if math.isfinite(error) else {"failed": f"{step}: not finite"}
                    except Exception as error:  # a kernel that fails is a row, not the end of the suite
                        row["failed"] = f"{step}: {type(error).__name__} {str(error)[:120]!r}"
                rows.append(row)
    return rows


def attention_times(device: str, small: bool) -> list[dict[str, Any]]:
    """The cases of attention.py that matter most: a radius of 6 Å, both precisions."""
    cases = [(60, 8)] if small else [(1000, 16), (1000, 32), (1000, 48), (10000, 32)]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        peaks = bench.limits(device, dtype)
        for atoms, neighbors in cases:
            case = bench.Case(atoms, neighbors, 64, 8, dtype, device)
            rows += bench.measure_case(case, None, 3, peaks)
    return rows


def random_batch(atoms: int, device: str) -> Any:
    """Rattled copper of about so many atoms."""
    import ase.build

    from escaip.data import AtomicData, collate

    edge = max(2, round((atoms / 4) ** (1 / 3)))
    crystal = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat((edge,) * 3)
    crystal.rattle(0.1, seed=0)
    return collate([AtomicData.from_ase(crystal)]).to(device)


def training_steps(device: str, small: bool) -> list[dict[str, Any]]:
    """Graph, prediction and conservative training step of the presets."""
    rows = []
    for preset, atoms in [("1m", 100)] if small else [("1m", 1000), ("5m", 1000), ("20m", 500), ("45m", 500)]:
        torch.manual_seed(0)
        potential = Potential(EScAIPConfig.preset(preset)).to(device)
        batch = random_batch(atoms, device)

        def train(potential: Potential = potential, batch: Any = batch) -> None:
            potential.zero_grad()
            prediction = potential(batch, create_graph=True)
            (prediction.energy.mean() + prediction.forces.square().mean()).backward()

        def predict(potential: Potential = potential, batch: Any = batch) -> None:
            potential(batch, create_graph=False)

        def graph(potential: Potential = potential, batch: Any = batch) -> None:
            build_graph(batch, potential.config.graph)

        row: dict[str, Any] = {"preset": preset, "atoms": batch.positions.shape[0]}
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for name, function in (("graph", graph), ("predict", predict), ("train", train)):
            try:
                row[f"{name}_ms"] = 1e3 * measure(function, repeats=3, device=device)
            except torch.OutOfMemoryError:
                row[f"{name}_ms"] = None
        row["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
        single = potential(batch, create_graph=False)
        double = potential.double()(batch, create_graph=False)
        row["force_error"] = relative_error([single.forces], [double.forces])
        rows.append(row)
    return rows


def quickstart(seconds: float, out: Path, device: str) -> dict[str, Any]:
    """Trains the quickstart recipe for at most so long; the end of its output tells how far it came."""
    command = [sys.executable, "-m", "escaip", "fit", "--config", "quickstart", "--out", str(out / "quickstart")]
    command += ["--trainer.accelerator", "gpu" if device == "cuda" else "cpu"]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        status, output = str(done.returncode), done.stdout[-3000:] + done.stderr[-1000:]
    except subprocess.TimeoutExpired as expired:
        status, output = "stopped by its time limit", (expired.stdout or b"").decode()[-3000:]
    return {"status": status, "seconds": time.perf_counter() - start, "output": output}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; training takes what is left")
    parser.add_argument("--small", action="store_true", help="tiny sizes, no training: does the suite itself work?")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/bench")))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_suite: this machine has no usable CUDA device: run it on one, or with --device cpu --small")

    start = time.perf_counter()
    report: dict[str, Any] = {"provenance": provenance()}
    parts = {"attention": attention, "attention_times": attention_times, "training_steps": training_steps}
    for name, part in parts.items():
        report[name] = part(args.device, args.small)
        write_json(args.out / "gpu_suite.json", report)  # what is measured is kept if the next part fails
    left = 60.0 * args.minutes - (time.perf_counter() - start)
    if not args.small and left > 30.0:
        report["quickstart"] = quickstart(left, args.out, args.device)
        write_json(args.out / "gpu_suite.json", report)

    def show(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)

    for name in parts:
        rows = report[name]
        print(f"\n{name}")
        if name == "attention_times":
            print(bench.table(rows))
        else:
            print(markdown_table(list(rows[0]), [[show(v) for v in row.values()] for row in rows]))
    if "quickstart" in report:
        print(report["quickstart"]["output"])


if __name__ == "__main__":
    main()
