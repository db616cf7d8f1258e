"""Floating-point operations of each preset: by formula, as PyTorch's profiler counts them, and the rule of thumb.

python benchmarks/flops.py [--presets 300k 1m ...] [--atoms 1024] [--out benchmarks/results/flops.json]

The formula and the profiler count the same small batch. Costs per atom and ratios are by formula for a training batch
of ``--atoms`` atoms of the same composition, so that tables of distances weigh what they weigh in training. ``κ`` is
what a training step costs in units of ``N · T``: parameters but for embeddings, times tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import ase.build
import torch
from ase import Atoms
from common import markdown_table, provenance, write_json

from escaip import EScAIPConfig
from escaip.data import AtomicData, collate
from escaip.scaling.flops import GraphShape, count_flops, parameter_count, profile_flops

HEADER = [
    "preset", "forces", "N", "on tokens", "formula, GFLOP", "profiler, GFLOP", "ratio", "MFLOP per atom",
    "× energy", "prediction × energy", "κ", "κ on tokens",
]  # fmt: skip


def structures() -> list[Atoms]:
    """A metal and a molecule, displaced at random: 4 and 9 atoms."""
    found = [ase.build.bulk("Cu", cubic=True), ase.build.molecule("CH3CH2OH")]
    for seed, atoms in enumerate(found):
        atoms.rattle(0.1, seed=seed)
    return found


def measure_preset(preset: str, forces: str, batch: Any, num_atoms: int) -> dict[str, Any]:
    """Counts of one preset; operations are those of a training step where nothing else is said."""
    config = EScAIPConfig.preset(preset, forces=forces)
    shape, parameters = GraphShape.of_batch(batch, config.graph), parameter_count(config)
    start = time.perf_counter()
    profiled = profile_flops(config, batch)
    large = shape.times(num_atoms / shape.num_atoms)
    training, energy = count_flops(config, large), count_flops(config, large, "energy")
    return {
        "preset": preset,
        "forces": forces,
        "parameters": parameters.total,
        "non_embedding": parameters.non_embedding,
        "on_tokens": parameters.token / parameters.non_embedding,
        "tokens_per_atom": shape.num_tokens / shape.num_atoms,
        "formula": count_flops(config, shape),
        "profiler": profiled,
        "per_atom": training / num_atoms,
        "times_energy": training / energy,
        "prediction_times_energy": count_flops(config, large, "forces") / energy,
        "kappa": training / (parameters.non_embedding * large.num_tokens),
        "kappa_on_tokens": training / (parameters.token * large.num_tokens),
        "profiler_seconds": round(time.perf_counter() - start, 1),
    }


def row(found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        found["preset"], found["forces"], f"{found['non_embedding'] / 1e6:.2f} M", f"{found['on_tokens']:.0%}",
        f"{found['formula'] / 1e9:.3f}", f"{found['profiler'] / 1e9:.3f}",
        f"{found['formula'] / found['profiler']:.5f}", f"{found['per_atom'] / 1e6:.1f}", f"{found['times_energy']:.2f}",
        f"{found['prediction_times_energy']:.2f}", f"{found['kappa']:.1f}", f"{found['kappa_on_tokens']:.1f}",
    ]  # fmt: skip


def main() -> None:
    """Prints the table; writes all figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(EScAIPConfig.PRESETS), choices=list(EScAIPConfig.PRESETS))
    parser.add_argument("--atoms", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    batch = collate([AtomicData.from_ase(atoms) for atoms in structures()])
    found = []
    for forces in ("conservative", "direct"):
        for preset in arguments.presets:
            found.append(measure_preset(preset, forces, batch, arguments.atoms))
            print(f"{forces}, {preset}: {found[-1]['profiler_seconds']} s", flush=True)
    print(markdown_table(HEADER, [row(one) for one in found]))
    if arguments.out is not None:
        write_json(arguments.out, {**provenance(), "atoms": arguments.atoms, "results": found})


if __name__ == "__main__":
    main()
