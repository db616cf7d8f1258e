"""Molecular dynamics in nanoseconds per day, what of a step is not the model, and where the graph is best made."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from common import measure
from gpu.models import NO_TIME, make_potential
from gpu.runner import Row, Setting, reason
from gpu.structures import copper

from escaip import EScAIPCalculator, Potential
from escaip.calculators import ase as calculators
from escaip.data import AtomicData, collate

# Of EScAIPCalculator; what each adds to the one before. "never cut" and "always cut" tell whether the size from which a
# kept graph is cut to the tokens that count is chosen well.
CALCULATORS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "kept graph": {"compile": True, "graph_skin": 0.3},
    "CUDA graphs": {"compile": True, "graph_skin": 0.3, "cuda_graphs": True},
    "CUDA graphs, never cut": {"compile": True, "graph_skin": 0.3, "cuda_graphs": True},
    "CUDA graphs, always cut": {"compile": True, "graph_skin": 0.3, "cuda_graphs": True},
}
CUT_FROM = {"CUDA graphs, never cut": sys.maxsize, "CUDA graphs, always cut": 0}
# By worth; the first is what the energies of the others are compared with.
ON_CUDA = (
    ("eager", "highest"), ("CUDA graphs", "tf32"), ("CUDA graphs", "highest"), ("kept graph", "tf32"),
    ("compiled", "tf32"), ("CUDA graphs, never cut", "tf32"), ("CUDA graphs, always cut", "tf32"),
    ("CUDA graphs", "bfloat16"), ("eager", "tf32"),
)  # fmt: skip
ON_CPU = (("eager", "highest"), ("compiled", "highest"), ("kept graph", "highest"))
WARM_UP = 5  # steps


def dynamics(setting: Setting) -> Iterator[Row]:
    """Steps of 1 fs of copper at 300 K in ASE, 5m preset, conservative; sizes by worth.

    The energy beside that of the uncompiled run after as many steps tells whether faster is still the same.
    """
    device, small = setting.device, setting.small
    cases = ON_CUDA if device == "cuda" else ON_CPU[:1] if small else ON_CPU
    made: dict[tuple[str, bool], Potential] = {}  # what is compiled once serves every size
    ends: dict[int, float] = {}
    usual = calculators._TIGHT_FROM
    for atoms in (32,) if small else (1_000, 64, 10_000, 100_000):
        for name, precision in cases:
            if name in CUT_FROM and atoms > 1_000:
                continue
            row: Row = {"atoms": atoms, "calculator": name, "precision": precision, "ns_per_day": None, "ms": None}
            row |= {"first_s": None, "graphs": None, "steps": None, "energy_off_meV_per_atom": None, "failed": NO_TIME}
            if setting.left > 0:
                calculators._TIGHT_FROM = (usual[0], CUT_FROM.get(name, usual[1]))
                try:
                    calculator = make_calculator("300k" if small else "5m", device, precision, CALCULATORS[name], made)
                    row |= run(calculator, atoms, small, ends) | {"failed": None}
                except Exception as error:
                    row["failed"] = reason(error)
            yield row


def make_calculator(
    preset: str, device: str, precision: str, options: dict[str, Any], made: dict[tuple[str, bool], Potential]
) -> EScAIPCalculator:
    """A calculator with the code that an earlier one has compiled, where there is some."""
    potential = make_potential(preset, "conservative", device).eval()
    calculator = EScAIPCalculator(potential, device=device, precision=precision, **options)
    if options.get("compile"):
        key = (precision, bool(options.get("cuda_graphs")))
        calculator.potential = made.setdefault(key, calculator.potential)
    return calculator


def run(calculator: EScAIPCalculator, atoms: int, small: bool, ends: dict[int, float]) -> Row:
    """One simulation; ``ends`` keeps the last energy of the first run of each size."""
    crystal = copper(atoms, rattle=0.0)
    MaxwellBoltzmannDistribution(crystal, temperature_K=300, rng=np.random.default_rng(0))
    crystal.calc = calculator
    start = time.perf_counter()
    crystal.get_forces()
    first, simulation = time.perf_counter() - start, VelocityVerlet(crystal, 1.0 * units.fs)
    simulation.run(WARM_UP)
    start, steps = time.perf_counter(), 5 if small else max(5, min(200, 200_000 // len(crystal)))
    simulation.run(steps)
    ms = 1e3 * (time.perf_counter() - start) / steps
    energy = crystal.get_total_energy()
    off = 1e3 * (energy - ends.setdefault(atoms, energy)) / len(crystal)
    row: Row = {"atoms": len(crystal), "ns_per_day": 86.4 / ms, "ms": ms, "first_s": first, "steps": steps}
    return row | {"graphs": calculator.num_graph_builds, "energy_off_meV_per_atom": off}


def graphs(setting: Setting) -> Iterator[Row]:
    """Milliseconds from positions on the host to a graph on the device, and of the evaluation that follows it.

    ``device``: the batch is moved and the graph made there. ``host``: it is made by C++ and moved.
    """
    device = setting.device
    potential = make_potential("300k" if setting.small else "5m", "conservative", device).eval().requires_grad_(False)
    on_host = Potential(potential.config).eval()
    for atoms in (32,) if setting.small else (64, 1_000, 10_000, 100_000):
        row: Row = {"atoms": atoms, "device_ms": None, "host_ms": None, "evaluation_ms": None, "failed": NO_TIME}
        if setting.left > 0:
            crystal = copper(atoms)
            batch = collate([AtomicData.from_ase(crystal)])
            row |= {"atoms": len(crystal), "failed": None}
            try:
                row["device_ms"] = 1e3 * measure(lambda b=batch: potential.graph_of(b.to(device)), 3, device=device)
                made = measure(lambda b=batch: (b.to(device), on_host.graph_of(b).to(device)), 3, device=device)
                row["host_ms"] = 1e3 * made
                moved = batch.to(device)
                graph = potential.graph_of(moved)

                def evaluate(moved: Any = moved, graph: Any = graph) -> Any:
                    return potential(moved, graph=graph, create_graph=False)

                row["evaluation_ms"] = 1e3 * measure(evaluate, 3, device=device)
            except Exception as error:
                row["failed"] = reason(error)
        yield row


def overhead(setting: Setting) -> Iterator[Row]:
    """What a step of a simulation spends outside of the model: ASE, a kept graph, the copies."""
    device = setting.device
    potential = make_potential("300k", "conservative", device).eval()
    for atoms in (32,) if setting.small else (64, 1_000, 10_000):
        crystal = copper(atoms, rattle=0.0)
        MaxwellBoltzmannDistribution(crystal, temperature_K=300, rng=np.random.default_rng(0))
        crystal.calc = calculator = EScAIPCalculator(potential, device=device, graph_skin=0.3)
        crystal.get_forces()
        kept = calculator.potential
        answer = kept(calculator._batch, compute_stress=True, create_graph=False)
        calculator.potential = _Answer(kept, answer)
        simulation = VelocityVerlet(crystal, 0.1 * units.fs)
        simulation.run(WARM_UP)
        steps = 5 if setting.small else 200
        start = time.perf_counter()
        simulation.run(steps)
        if device == "cuda":
            torch.cuda.synchronize()
        yield {"atoms": len(crystal), "ms": 1e3 * (time.perf_counter() - start) / steps}


class _Answer:
    """A potential that gives the same answer every time."""

    def __init__(self, potential: Potential, answer: Any) -> None:
        self._potential, self._answer = potential, answer

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._potential, name)
