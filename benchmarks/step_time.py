"""Where the CPU seconds of a force call and of a training step go.

python benchmarks/step_time.py [--presets 300k 1m] [--structures aspirin] [--compile] [--out FILE]

Seconds are of the process, on one thread, medians without a profiler. Shares are of PyTorch's profiler: the time of
each operator less that of the operators it calls; what no operator takes is Python and the bookkeeping of automatic
differentiation. ``of the product`` is the operations that ``escaip.scaling.flops`` counts, divided by the seconds and
by what a product of 1024 × 1024 matrices reaches beside them. Compiled code has no shares by operator. The preset
``published`` is EScAIP at the size of its published configuration, without a table of distances.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from common import markdown_table, provenance, write_json
from peers.structures import inference_cases
from torch.profiler import ProfilerActivity, profile

from escaip import EScAIPConfig, Potential
from escaip.data import AtomicData, collate
from escaip.scaling.flops import GraphShape, count_flops

KINDS = {  # the first one whose word is in the name of an operator
    "attention": ("attention",),
    "densities": ("power_spectrum", "sum_outer", "apply_rows"),
    "activation, norm": ("gelu", "rms_norm", "::Gelu", "::Norm"),
    "radial functions": ("spline",),
    "graph": ("escaip::graph", "escaip::neighbor", "sort", "searchsorted", "unique", "cumsum"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "gathers": ("index", "scatter", "gather"),
    "elementwise": ("aten::",),
}
STRUCTURES = ("aspirin", "silicon", "copper", "water")
PUBLISHED = "published"
PUBLISHED_SIZE = {"num_heads": 8, "angular_channels": (5, 3, 2, 3, 3), "num_neighbors": 20}
TRAINING_ATOMS = 168  # of a batch, of copies of small structures


def seconds(function: Callable[[], Any], at_least: float = 1.0) -> float:
    """Median CPU seconds of calls that take ``at_least`` together, and of three at least."""
    function()
    found: list[float] = []
    while len(found) < 3 or sum(found) < at_least:
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return statistics.median(found)


def shares(function: Callable[[], Any], calls: int) -> dict[str, float]:
    """Share of each kind of operator in the profiled seconds."""
    function()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        total = 1e6 * (time.perf_counter() - start)
    found = Counter[str]()
    for event in profiled.key_averages():
        if "evaluate_function" in event.key:
            continue
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), None)
        if kind is not None:
            found[kind] += event.self_cpu_time_total
    return {**{kind: found[kind] / total for kind in KINDS}, "Python, bookkeeping": 1.0 - found.total() / total}


def train_step(potential: Potential, batch: Any) -> None:
    prediction = potential(batch, create_graph=True)
    potential.zero_grad()
    (prediction.forces.square().mean() + prediction.energy.square().mean()).backward()


def measure_case(preset: str, name: str, compiled: bool) -> dict[str, Any]:
    """A force call of one structure, and a step of some copies where it is small."""
    torch.manual_seed(0)
    config = EScAIPConfig(**PUBLISHED_SIZE) if preset == PUBLISHED else EScAIPConfig.preset(preset)
    plain = inference_cases()[name]
    data = AtomicData.from_ase(Atoms(**plain))
    one, many = collate([data]), collate([data] * max(1, TRAINING_ATOMS // len(plain["numbers"])))
    asked, learning = Potential(config).eval(), Potential(config).train()
    if compiled:
        asked.compile()
        learning.compile()
    calls = {
        "forces": (one, lambda: asked(one)),
        "training": (many, lambda: train_step(learning, many)),
    }
    row: dict[str, Any] = {"preset": preset, "structure": name}
    for mode, (batch, function) in calls.items():
        square = torch.randn(1024, 1024)
        product = 2 * 1024**3 / seconds(lambda x=square: x @ x)
        taken = seconds(function)
        flops = count_flops(config, GraphShape.of_batch(batch, config.graph), mode)
        row[mode] = {
            "atoms": batch.num_nodes, "ms": 1e3 * taken, "of_the_product": flops / taken / product,
            "shares": {} if compiled else shares(function, max(1, round(1.0 / taken))),
        }  # fmt: skip
    return row


def main() -> None:
    """Prints a table for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["300k", "1m"], choices=[*EScAIPConfig.PRESETS, PUBLISHED])
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=STRUCTURES)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure_case(preset, name, args.compile) for preset in args.presets for name in args.structures]
    for mode in ("forces", "training"):
        print(f"\n{mode}\n" if args.compile else f"\n{mode}, shares in %\n")
        header = ["preset", "structure", "atoms", "ms", "of the product", *rows[0][mode]["shares"]]
        table = [
            [
                row["preset"], row["structure"], f"{row[mode]['atoms']}", f"{row[mode]['ms']:.3g}",
                f"{row[mode]['of_the_product']:.2f}", *(f"{100 * x:.0f}" for x in row[mode]["shares"].values()),
            ]
            for row in rows
        ]  # fmt: skip
        print(markdown_table(header, table))
    if args.out:
        write_json(args.out, {**provenance(), "rows": rows})


if __name__ == "__main__":
    main()
