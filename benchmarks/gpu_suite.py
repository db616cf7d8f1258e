"""Checks, times and trains everything on a GPU in one command.

    python benchmarks/gpu_suite.py [--minutes 9] [--parts NAME ...] [--out DIR]
    python benchmarks/gpu_suite.py --parts training --data .gpu_data --minutes 4
    python benchmarks/gpu_suite.py --parts scaling --data monomers.hdf5 complexes.hdf5 --minutes 9

Parts run in order of worth, each in a process of its own and for a bounded time; every row is in the file as soon as it
is made. Results go to ``gpu_suite.json`` under ``--out`` (by default the folder named by the variable OUT, else
runs/bench), together with those parts of ``--onto``, the results kept in the repository, that were not run again. What
there was no time for is a row that says so. ``--device cpu --small`` runs it all tiny.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import attention as bench
import torch
from common import markdown_table, provenance, write_json
from gpu.runner import Outcome, Part, Row, Setting, run_together

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "gpu_suite.json"

PARTS = (
    Part("kernels", "gpu.checks", "kernels", 90, "attention against float64: value and two derivatives"),
    Part("compiling", "gpu.models", "compiling", 90, "first evaluations of what is compiled; beside kernels"),
    Part("models", "gpu.checks", "models", 90, "whole models against float64 on the CPU"),
    Part("dynamics", "gpu.simulations", "dynamics", 90, "molecular dynamics of 64 to 100 000 atoms, ns/day"),
    Part("training_steps", "gpu.models", "training_steps", 60, "forward, loss on forces, backward"),
    Part("predictions", "gpu.models", "predictions", 60, "energy and forces of 64 to 100 000 atoms"),
    Part("attention_times", "gpu.attention_times", "attention_times", 40, "kernels beside other ways, and limits"),
    Part("graphs", "gpu.simulations", "graphs", 20, "the graph made on the device, and on the host"),
    Part("overhead", "gpu.simulations", "overhead", 10, "a step of dynamics without the model"),
    Part("loading", "gpu.loading", "loading", 30, "batches of a store beside the steps that take them"),
    Part("tests", "gpu.checks", "tests", 60, "tests/ops on the device"),
    Part("memory_checker", "gpu.checks", "memory_checker", 90, "compute-sanitizer: memory and races"),
    Part("quickstart", "gpu.studies", "quickstart", 120, "the recipe of the README"),
    Part("training", "gpu.training", "training", 3600, "real data sets, with --data"),
    Part("scaling", "gpu.studies", "scaling", 3600, "the study configs/scaling/h200.yaml, with --data"),
)
BESIDE = {"compiling": "kernels"}  # neither is timed against anything
WITH_DATA = ("training", "scaling")


def planned(names: list[str] | None, with_data: bool) -> list[list[Part]]:
    """Parts to run, in order; those of one list side by side."""
    chosen = [part for part in PARTS if (part.name in names if names else with_data or part.name not in WITH_DATA)]
    groups: list[list[Part]] = []
    for part in chosen:
        host = next((g for g in groups if BESIDE.get(part.name) in [p.name for p in g]), None)
        if host is None:
            groups.append([part])
        else:
            host.append(part)
    return groups


def describe(outcome: Outcome, origin: dict[str, Any]) -> dict[str, Any]:
    """A part, for the file of results."""
    rows = [{name: _finite(value) for name, value in row.items()} for row in outcome.rows]
    return {"provenance": origin, "ended": outcome.ended, "seconds": round(outcome.seconds, 1), "rows": rows}


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table(name: str, rows: list[Row]) -> str:
    """Of all columns that occur."""
    if name == "attention_times" and all("step" in row for row in rows):
        return bench.table(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        return "-" if value is None else str(value).replace("\n", " ")[-400:]

    return markdown_table(columns, [[show(row.get(column)) for column in columns] for row in rows])


def arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {part.name:16} {part.seconds:4.0f} s  {part.about}" for part in PARTS)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nParts, and their seconds at most:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], metavar="NAME", help="only these")
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH", help="of training, or of the scaling study")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does the suite itself work?")
    parser.add_argument("--onto", type=Path, default=KEPT, help="earlier results, whose other parts are kept")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/bench")))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "gpu_suite: no usable CUDA device: run it on a machine with one, or with --device cpu --small\n")
    missing = [name for name in args.parts or () if name in WITH_DATA and not args.data]
    if missing:
        parser.exit(1, f"gpu_suite: part {missing[0]} needs structures: name them with --data\n")
    return args


def main() -> None:
    args = arguments()
    deadline = time.monotonic() + 60.0 * args.minutes * (10.0 if args.small else 1.0)
    setting = Setting(args.device, args.small, args.out.resolve(), tuple(args.data))
    report: dict[str, Any] = {"parts": {}}
    if args.onto.is_file() and not args.small:
        report = json.loads(args.onto.read_text("utf-8"))
    origin, failed = provenance(), 0

    def keep(name: str, outcome: Outcome) -> None:
        report["parts"][name] = describe(outcome, origin)
        write_json(args.out / "gpu_suite.json", report)

    for group in planned(args.parts, bool(args.data)):
        names = " and ".join(part.name for part in group)
        if time.monotonic() > deadline - 5.0:
            print(f"\n{names}: no time left", flush=True)
            continue
        now, slower = time.monotonic(), 10.0 if args.small else 1.0  # tiny sizes are no measurement, and may take long
        settings = [replace(setting, deadline=min(deadline, now + slower * part.seconds)) for part in group]
        for name, outcome in run_together(group, settings, keep).items():
            print(f"\n{name}: {outcome.ended}, {outcome.seconds:.0f} s", flush=True)
            if outcome.rows:
                print(table(name, outcome.rows), flush=True)
            failed += sum(row.get("ok") is False for row in outcome.rows)
    if failed:
        sys.exit(f"\ngpu_suite: {failed} checks failed: see ok in {args.out / 'gpu_suite.json'}")


if __name__ == "__main__":
    main()
