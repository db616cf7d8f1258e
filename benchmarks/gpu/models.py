"""Whole models: predictions and training steps by size, precision and compilation, and what compiling takes."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from common import measure
from gpu.runner import Row, Setting, reason
from gpu.structures import copper_batch, mixed_batch

from escaip import EScAIPConfig, Potential

# The published size of the runs on OC20 and SPICE: 600 Gaussians through a table, which every size may use.
PUBLISHED = {
    "hidden_size": 512, "num_layers": 10, "num_heads": 8, "angular_channels": (20, 10, 4, 10, 20),
    "distance_table": "always", "distance_knots": 2048,
}  # fmt: skip
PRECISIONS = ("highest", "tf32", "bfloat16")
NO_TIME = "no time left"


def make_potential(name: str, forces: str, device: str) -> Potential:
    torch.manual_seed(0)
    if name == "published":
        config = EScAIPConfig.from_dict({**PUBLISHED, "forces": forces})
    else:
        config = EScAIPConfig.preset(name, forces=forces)
    return Potential(config).to(device)


def timed(function: Callable[[], Any], device: str) -> Row:
    """Seconds of the first run, median milliseconds of three more and peak memory, or why there are none."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row: Row = {"first_s": None, "ms": None, "peak_MiB": None, "failed": None}
    try:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        row["first_s"] = time.perf_counter() - start
        row["ms"] = 1e3 * measure(function, repeats=3, device=device)
    except Exception as error:  # out of memory, a kernel, the compiler: a row, not the end of the suite
        row["failed"] = reason(error)
    if device == "cuda":
        row["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def compiling(setting: Setting) -> Iterator[Row]:
    """Seconds of the first evaluation of what later parts compile, side by side; the compiler's cache keeps it."""
    cases = [("5m", "predict", "highest"), ("5m", "predict", "tf32"), ("5m", "train", "highest"),
             ("5m", "predict", "bfloat16"), ("5m", "train", "bfloat16"), ("1m", "predict", "highest"),
             ("1m", "train", "highest")]  # fmt: skip
    if setting.small:
        cases = [("300k", "predict", "highest")]
    with ProcessPoolExecutor(min(4, len(cases)), multiprocessing.get_context("fork")) as pool:
        waiting = [pool.submit(first_evaluation, *case, setting.device) for case in cases]
        for done in as_completed(waiting):
            yield done.result()


def first_evaluation(name: str, what: str, precision: str, device: str) -> Row:
    row: Row = {"model": name, "what": what, "precision": precision, "seconds": None, "failed": None}
    try:
        start = time.perf_counter()
        potential = make_potential(name, "conservative", device)
        potential.compile()
        batch = mixed_batch().to(device)
        if what == "train":
            training_step(potential.train(), batch, precision, device)
        else:
            potential.eval().requires_grad_(False).precision = precision
            potential(batch, create_graph=False).forces.sum().item()
        row["seconds"] = time.perf_counter() - start
    except Exception as error:
        row["failed"] = reason(error)
    return row


@contextlib.contextmanager
def training_precision(name: str, device: str) -> Iterator[None]:
    """Float32 products as they are, through TF32, or bfloat16 by autocast, as trainings set it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def training_step(potential: Potential, batch: Any, precision: str, device: str) -> None:
    """Forward, loss on energies and forces, backward."""
    potential.zero_grad()
    with training_precision(precision, device):
        prediction = potential(batch, create_graph=True)
        loss = prediction.energy.mean() + prediction.forces.square().mean()
    loss.backward()


def training_steps(setting: Setting) -> Iterator[Row]:
    """Presets and the published size, conservative and direct, eager and compiled."""
    device = setting.device
    sizes = [("300k", 30)] if setting.small else [("5m", 1000), ("1m", 1000), ("published", 500), ("20m", 500)]
    cases = [
        (name, atoms, forces, precision, compiled)
        for compiled in ((False,) if setting.small else (False, True))
        for name, atoms in sizes
        for forces in ("conservative", "direct")
        for precision in (PRECISIONS if device == "cuda" else ("highest",))
        if not (compiled and (precision == "tf32" or (forces == "direct" and name != "5m")))
    ]
    for name, atoms, forces, precision, compiled in cases:
        row: Row = {"model": name, "forces": forces, "precision": precision, "compiled": compiled, "atoms": None}
        row |= {"atoms_per_s": None, "first_s": None, "ms": None, "peak_MiB": None, "failed": NO_TIME}
        if setting.left > 0:
            potential, batch = make_potential(name, forces, device).train(), copper_batch(atoms, device)
            if compiled:
                potential.compile()

            def step(potential: Potential = potential, batch: Any = batch, precision: str = precision) -> None:
                training_step(potential, batch, precision, device)

            row |= {"atoms": len(batch.positions), **timed(step, device)}
            if row["ms"]:
                row["atoms_per_s"] = 1e3 * row["atoms"] / row["ms"]
        yield row


def predictions(setting: Setting) -> Iterator[Row]:
    """Energy and forces from 64 to 100 000 atoms of copper, the graph made before, and the error of the forces."""
    device = setting.device
    sizes = [32] if setting.small else [1_000, 64, 10_000, 100_000]
    cases = [
        (name, precision, compiled)
        for name in (("300k",) if setting.small else ("5m", "1m", "published"))
        for compiled in ((False,) if setting.small else (False, True))
        for precision in (PRECISIONS if device == "cuda" else ("highest",))
    ]
    for name, precision, compiled in cases:
        potential = None
        for atoms in sizes:
            row: Row = {"model": name, "precision": precision, "compiled": compiled, "atoms": atoms, "first_s": None}
            row |= {"ms": None, "us_per_atom": None, "peak_MiB": None, "failed": NO_TIME, "force_error": None}
            if setting.left > 0 and not (compiled and atoms > 10_000):
                if potential is None:
                    potential = make_potential(name, "conservative", device).eval().requires_grad_(False)
                    potential.precision = precision
                    if compiled:
                        potential.compile()
                row |= predict_row(potential, atoms, device)
            yield row


def predict_row(potential: Potential, atoms: int, device: str) -> Row:
    """Of one size; the error is that against float64 on the same device, up to a thousand atoms."""
    batch = copper_batch(atoms, device)
    graph = potential.graph_of(batch)

    def predict() -> Any:
        return potential(batch, graph=graph, create_graph=False)

    row: Row = {"atoms": len(batch.positions), **timed(predict, device)}
    if row["ms"]:
        row["us_per_atom"] = 1e3 * row["ms"] / row["atoms"]
        if atoms <= 1_000:
            exact = Potential(potential.config).to(device).double().eval()
            exact.load_state_dict(potential.state_dict())
            expected = exact(batch, graph=graph, create_graph=False).forces
            row["force_error"] = float((predict().forces.double() - expected).norm() / expected.norm())
    return row
