"""Checks and times everything on a GPU in one command.

    python benchmarks/gpu_suite.py [--minutes 8] [--out DIR]
    python benchmarks/gpu_suite.py --parts scaling --data FILE ... --minutes 25 [--out DIR]

Every attention backend against float64 in value, first and second derivative; the main cases of attention.py, with
the expanded channels of the published implementation beside; energy and forces of 64 to 100 000 atoms, and training
steps, of the presets and the published size, in float32, TF32 and bfloat16, eager and compiled; molecular dynamics,
compiled, with a kept graph and recorded in CUDA graphs; and the quickstart recipe, in the time that is left. What there
was no time for is a row that says so. Part ``scaling``, only with ``--data``, is the study configs/scaling/h200.yaml
on those files, four runs at once; stopped in time, it goes on from ``runs/gpu_suite_scaling`` by the same command.
Writes ``gpu_suite.json`` under ``--out`` (by default the folder named by the variable OUT, else runs/bench). ``--device
cpu --small`` runs it all tiny.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attention as bench
import numpy as np
import torch
from common import markdown_table, measure, provenance, write_json
from torch import Tensor

from escaip import EScAIPConfig, Potential
from escaip.graph import build_graph
from escaip.ops import available_backends

ROOT = Path(__file__).resolve().parents[1]


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


# The published size of the runs on OC20 and SPICE: 600 Gaussians through a table, which every size may use.
PUBLISHED = {
    "hidden_size": 512, "num_layers": 10, "num_heads": 8, "angular_channels": (20, 10, 4, 10, 20),
    "distance_table": "always", "distance_knots": 2048,
}  # fmt: skip
PRECISIONS = ("float32", "tf32", "bfloat16")


def make_config(name: str, forces: str) -> EScAIPConfig:
    if name == "published":
        return EScAIPConfig.from_dict({**PUBLISHED, "forces": forces})
    return EScAIPConfig.preset(name, forces=forces)


@contextlib.contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Float32 products as they are, through TF32, or bfloat16 autocast."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def timed(function: Callable[[], Any], device: str) -> dict[str, Any]:
    """Median milliseconds and peak memory, or why there are none."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"first_s": None, "ms": None, "peak_MiB": None, "failed": None}
    try:
        start = time.perf_counter()
        function()
        row["first_s"] = time.perf_counter() - start
        row["ms"] = 1e3 * measure(function, repeats=3, device=device)
    except Exception as error:  # out of memory, a kernel, the compiler: a row, not the end of the suite
        row["failed"] = f"{type(error).__name__} {str(error).splitlines()[0][:120] if str(error) else ''}"
    if device == "cuda":
        row["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def training_steps(device: str, small: bool, deadline: float) -> list[dict[str, Any]]:
    """Training steps: presets and the published size, conservative and direct, eager and compiled."""
    sizes = [("1m", 100)] if small else [("1m", 1000), ("5m", 1000), ("published", 500), ("20m", 500)]
    cases = [
        (name, atoms, forces, kind, compiled)
        for compiled in ((False,) if small else (False, True))
        for name, atoms in sizes
        for forces in ("conservative", "direct")
        for kind in PRECISIONS[:: 1 if device == "cuda" else 2]
        if not (compiled and (kind == "tf32" or (forces == "direct" and name != "published")))
    ]
    rows = []
    for name, atoms, forces, kind, compiled in cases:
        row: dict[str, Any] = {"model": name, "forces": forces, "precision": kind, "compiled": compiled, "atoms": None}
        row |= {"atoms_per_s": None, "first_s": None, "ms": None, "peak_MiB": None, "failed": "no time left"}
        rows.append(row)
        if time.perf_counter() > deadline:
            continue
        torch.manual_seed(0)
        potential, batch = Potential(make_config(name, forces)).to(device).train(), random_batch(atoms, device)
        if compiled:
            potential.compile()

        def train(potential: Potential = potential, batch: Any = batch, kind: str = kind) -> None:
            potential.zero_grad()
            with precision(kind, device):
                prediction = potential(batch, create_graph=True)
                loss = prediction.energy.mean() + prediction.forces.square().mean()
            loss.backward()

        row |= {"atoms": len(batch.positions), **timed(train, device)}
        if row["ms"]:
            row["atoms_per_s"] = 1e3 * row["atoms"] / row["ms"]
    return rows


def predictions(device: str, small: bool, deadline: float) -> list[dict[str, Any]]:
    """Energy and forces from 64 to 100 000 atoms of copper, the graph apart, and the error of float32."""
    sizes = [64] if small else [64, 1_000, 10_000, 100_000]
    cases = [
        (name, atoms, kind, compiled)
        for name in (("1m",) if small else ("5m", "1m", "published"))
        for compiled in ((False,) if small else (False, True))
        for kind in PRECISIONS[:: 1 if device == "cuda" else 2]
        for atoms in sizes
        if not (compiled and (kind == "tf32" or atoms > 10_000))
    ]
    rows, made = [], {}
    for name, atoms, kind, compiled in cases:
        row: dict[str, Any] = {"model": name, "precision": kind, "compiled": compiled, "atoms": atoms, "graph_ms": None}
        row |= {"first_s": None, "ms": None, "peak_MiB": None, "failed": "no time left", "force_error": None}
        rows.append(row)
        if time.perf_counter() > deadline:
            continue
        key = (name, kind, compiled)
        if key not in made:
            torch.manual_seed(0)
            made = {key: Potential(make_config(name, "conservative")).to(device).eval().requires_grad_(False)}
            if compiled:
                made[key].compile()
        potential, batch = made[key], random_batch(atoms, device)

        def predict(potential: Potential = potential, batch: Any = batch, kind: str = kind) -> Any:
            with precision(kind, device):
                return potential(batch, create_graph=False)

        row |= {"atoms": len(batch.positions), **timed(predict, device)}

        def graph(potential: Potential = potential, batch: Any = batch) -> Any:
            return build_graph(batch, potential.config.graph)

        row["graph_ms"] = 1e3 * measure(graph, repeats=3, device=device)
        if row["ms"] and atoms <= 1_000:
            torch.manual_seed(0)
            exact = Potential(potential.config).to(device).double().eval()
            exact.load_state_dict(potential.state_dict())
            row["force_error"] = relative_error([predict().forces], [exact(batch, create_graph=False).forces])
    return rows


# Of EScAIPCalculator; what each adds to the one before.
MD = {
    "eager": {}, "compiled": {"compile": True}, "kept graph": {"compile": True, "graph_skin": 0.3},
    "CUDA graphs": {"compile": True, "graph_skin": 0.3, "cuda_graphs": True},
}  # fmt: skip


def dynamics(device: str, small: bool, deadline: float) -> list[dict[str, Any]]:
    """Steps of 1 fs of copper at 300 K in ASE, 5m preset: speed, topologies made, and the energy beside eager's."""
    import ase.build
    from ase import units
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
    from ase.md.verlet import VelocityVerlet

    from escaip import EScAIPCalculator

    torch.manual_seed(0)
    potential = Potential(make_config("1m" if small else "5m", "conservative")).to(device).eval()
    rows, ends = [], {}
    for atoms in (32,) if small else (64, 1_000, 10_000, 100_000):
        for name, options in MD.items():
            if device == "cpu" and ("cuda_graphs" in options or (small and "compile" in options)):
                continue
            row: dict[str, Any] = {"atoms": None, "calculator": name, "ms": None, "ns_per_day": None, "first_s": None}
            row |= {"graphs": None, "steps": None, "energy_off_meV_per_atom": None, "failed": "no time left"}
            rows.append(row)
            if time.perf_counter() > deadline:
                continue
            crystal = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat(
                (max(2, round((atoms / 4) ** (1 / 3))),) * 3
            )
            MaxwellBoltzmannDistribution(crystal, temperature_K=300, rng=np.random.default_rng(0))
            try:
                calculator = EScAIPCalculator(potential, device=device, **options)
                crystal.calc = calculator
                start = time.perf_counter()
                crystal.get_forces()
                first, run = time.perf_counter() - start, VelocityVerlet(crystal, 1.0 * units.fs)
                run.run(5)
                start, steps = time.perf_counter(), 5 if small else max(5, min(200, 200_000 // len(crystal)))
                run.run(steps)
                ms = 1e3 * (time.perf_counter() - start) / steps
            except Exception as error:
                row["failed"] = f"{type(error).__name__} {str(error).splitlines()[0][:120] if str(error) else ''}"
                continue
            row |= {"atoms": len(crystal), "ms": ms, "ns_per_day": 86.4 / ms, "first_s": first, "failed": None}
            row |= {"graphs": calculator.num_graph_builds, "steps": steps}
            ends.setdefault(atoms, crystal.get_total_energy())
            row["energy_off_meV_per_atom"] = 1e3 * (crystal.get_total_energy() - ends[atoms]) / len(crystal)
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


STUDY = Path("runs/gpu_suite_scaling")  # checkpoints are large: only tables and plots go to --out
STUDY_FILES = ("study.json", "sweep.jsonl", "records.jsonl", "fit.json", "report.md", "scaling.png")


def small_study(file: Path) -> Path:
    """The study of the GPU with little of everything."""
    import yaml

    content = yaml.safe_load((ROOT / "configs" / "scaling" / "h200.yaml").read_text("utf-8"))
    content |= {"widths": [32, 64], "data_sizes": [0.05, 0.1, 0.2], "epochs": 1, "seeds": [0], "learning_rate": 1e-3}
    content["settings"]["data"]["split"]["by"] = "structure"  # so that every part has all elements
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content), "utf-8")
    return file


def scaling(device: str, small: bool, data: list[str], out: Path, deadline: float) -> list[dict[str, Any]]:
    """A scaling study in the time there is: a row for each run that ended; its tables and plots under ``out``."""
    from escaip.scaling.records import RECORDS, read_records

    study, escaip = (out / "study" if small else STUDY), [sys.executable, "-m", "escaip", "scaling"]
    name = str(small_study(out / "small.yaml")) if small else "h200"
    command = [*escaip, "run", name, "--out", str(study), "--workers", "2" if small else "4", "--set"]
    command += [f"data.train=[{', '.join(data)}]", f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}"]
    process = subprocess.Popen(command)
    try:
        status = f"status {process.wait(max(1.0, deadline - time.perf_counter()))}"
    except subprocess.TimeoutExpired:
        process.kill()  # takes its runs with it; what has a checkpoint goes on from there
        process.wait()
        status = "no time left"
    if not (study / RECORDS).is_file():
        return [{"run": None, "failed": status}]
    records = read_records(study)
    with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):  # too few runs for any law
        subprocess.run([*escaip, "plot", str(study)], check=True, timeout=60.0)
    for file in STUDY_FILES:
        if (study / file).is_file():
            (out / "scaling").mkdir(parents=True, exist_ok=True)
            shutil.copy(study / file, out / "scaling" / file)
    missing = len(json.loads((study / "study.json").read_text("utf-8"))["jobs"]) - len(records)
    rows = [
        {
            "run": one.id, "parameters": one.parameters, "structures": one.structures, "steps": one.steps,
            "flops": one.flops, "seconds": one.seconds, **one.losses, "failed": None,
        }
        for one in records
    ]  # fmt: skip
    return [*rows, {**dict.fromkeys(rows[0]), "run": f"{missing} more", "failed": status}] if missing else rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; training takes what is left")
    parser.add_argument(
        "--parts", nargs="+",
        choices=("attention", "attention_times", "predictions", "dynamics", "training_steps", "scaling"),
        help="only these; a second run for what the first had no time for",
    )  # fmt: skip
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="of the scaling study, some thousands")
    parser.add_argument("--small", action="store_true", help="tiny sizes, no training: does the suite itself work?")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/bench")))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_suite: this machine has no usable CUDA device: run it on one, or with --device cpu --small")
    if "scaling" in (args.parts or ()) and not args.data:
        sys.exit("gpu_suite: part scaling needs structures: name files with --data")

    start = time.perf_counter()
    report: dict[str, Any] = {"provenance": provenance()}
    deadline = start + 60.0 * args.minutes - (0.0 if args.small else 60.0)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "attention": lambda: attention(args.device, args.small),
        "attention_times": lambda: attention_times(args.device, args.small),
        "predictions": lambda: predictions(args.device, args.small, (2 * time.perf_counter() + deadline) / 3),
        "dynamics": lambda: dynamics(args.device, args.small, (time.perf_counter() + deadline) / 2),
        "training_steps": lambda: training_steps(args.device, args.small, deadline),
    }
    if args.data:
        parts["scaling"] = lambda: scaling(args.device, args.small, args.data, args.out, deadline)
    for name in args.parts or parts:
        report[name] = parts[name]()
        write_json(args.out / "gpu_suite.json", report)  # what is measured is kept if the next part fails
    left = 60.0 * args.minutes - (time.perf_counter() - start)
    if not args.small and not args.parts and left > 30.0:
        report["quickstart"] = quickstart(left, args.out, args.device)
        write_json(args.out / "gpu_suite.json", report)

    def show(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)

    for name in args.parts or parts:
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
