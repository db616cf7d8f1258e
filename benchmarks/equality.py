"""Imported models beside fairchem-core: relative errors of energy, forces and stress at a realistic size.

python benchmarks/equality.py --environment runs/fairchem [--out benchmarks/results/equality.json]

Makes the environment where it does not exist (benchmarks/fairchem/make_reference.sh), lets fairchem-core answer with
random weights (hidden 128, 4 layers, 8 heads, 20 neighbors, 600 Gaussians; conservative and direct), imports the same
weights and compares. Errors are the largest difference over the largest value of the structure, or over a fifth of the
largest of all structures where that is more, since symmetry takes some forces to zero.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown_table, provenance, write_json

from escaip import Potential
from escaip.interop import from_fairchem

BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS.parent / "tests" / "interop"))

from references import Reference, case_names, load  # noqa: E402

QUANTITIES = ("energy", "forces", "stress")
COMPARISONS = {
    "float32": "both in float32",
    "float64_against_float32": "ours in float64, theirs in float32",
    "float64": "both in float64",
    "published_rounding": "theirs in float32, theirs in float64",
}


def answers(potential: Potential, reference: Reference, group: str, quantities: list[str]) -> dict[str, np.ndarray]:
    prediction = potential(reference.batch(group), compute_stress="stress" in quantities)
    return {name: getattr(prediction, name).detach().numpy() for name in quantities}


def exact(reference: Reference) -> Potential:
    """In float64, nothing of it rounded to float32 on the way, the centers of the distance basis neither."""
    torch.set_default_dtype(torch.float64)
    try:
        return from_fairchem(reference.weights, reference.config).double()
    finally:
        torch.set_default_dtype(torch.float32)


def compare(reference: Reference) -> list[dict[str, Any]]:
    """One row for each structure."""
    single = from_fairchem(reference.weights, reference.config)
    double = from_fairchem(reference.weights, reference.config).double()
    pure = exact(reference)
    rows = []
    for group, structures in reference.structures.items():
        low, high = reference.expected("float32", group), reference.expected("float64", group)
        names = list(high)
        pairs = {
            "float32": (answers(single, reference, group, names), low),
            "float64_against_float32": (answers(double, reference, group, names), low),
            "float64": (answers(pure, reference, group, names), high),
            "published_rounding": (low, high),
        }
        row: dict[str, Any] = {
            "model": reference.name,
            "structure": group,
            "atoms": sum(len(item["numbers"]) for item in structures),
            "largest": {name: float(np.abs(value).max()) for name, value in high.items()},
        }
        for comparison, (ours, theirs) in pairs.items():
            row[comparison] = {
                name: float(np.abs(ours[name] - value).max())
                / max(float(np.abs(value).max()), 0.2 * reference.largest(name))
                for name, value in theirs.items()
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = ["model", "structure", "atoms", *(f"{text}: E, F, σ" for text in COMPARISONS.values())]
    lines = []
    for row in rows:
        cells = [" ".join(f"{row[name][q]:.0e}" for q in QUANTITIES if q in row[name]) for name in COMPARISONS]
        lines.append([row["model"], row["structure"], str(row["atoms"]), *cells])
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=Path("runs/fairchem"), help="made where it does not exist")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/equality.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script = ["sh", str(BENCHMARKS / "fairchem" / "make_reference.sh"), str(args.environment), folder, "realistic"]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
        path = Path(folder)
        versions = json.loads((path / "reference.json").read_text(encoding="utf-8"))["versions"]
        references = [load(path, name) for name in case_names(path)]
    rows = [row for reference in references for row in compare(reference)]
    print(table(rows))
    worst = {name: {q: max(row[name].get(q, 0.0) for row in rows) for q in QUANTITIES} for name in COMPARISONS}
    print("worst: " + "; ".join(f"{text} {max(worst[name].values()):.0e}" for name, text in COMPARISONS.items()))
    content = {
        "provenance": provenance(),
        "versions": versions,
        "models": {reference.name: reference.config for reference in references},
        "comparisons": COMPARISONS,
        "worst": worst,
        "results": rows,
    }
    write_json(args.out, content)


if __name__ == "__main__":
    main()
