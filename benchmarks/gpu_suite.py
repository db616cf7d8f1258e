"""Checks and times everything on a GPU in one command.

    python benchmarks/gpu_suite.py [--minutes 8] [--out DIR]

Every attention backend against float64 in value, first and second derivative; its time and peak memory beside the
expanded-channel attention that the published implementation computes; the graph; whole conservative training
steps of the presets; and the quickstart recipe, in the time that is left. Writes ``gpu_suite.json`` under ``--out``
(by default the folder named by the variable OUT, else runs/bench). ``--device cpu --small`` runs it all tiny.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import markdown_table, measure, provenance, write_json
from torch import Tensor

from escaip import EScAIPConfig, Potential
from escaip.graph import build_graph
from escaip.graph.features import real_harmonics
from escaip.ops import available_backends, neighborhood_attention

CHANNELS = (20, 10, 4, 10, 20)


def attention_inputs(atoms: int, neighbors: int, heads: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random tokens; neighborhoods of ``neighbors`` on average, ragged by a third."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2 * neighbors // 3, 4 * neighbors // 3 + 1, (atoms,), generator=generator)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    total = int(offsets[-1])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    direction = torch.nn.functional.normalize(normal(total, 3), dim=-1)
    log_envelope = -normal(total).square()
    direction[offsets[:-1]] = 0.0
    log_envelope[offsets[:-1]] = 0.0
    width = sum(CHANNELS)
    tensors = {name: normal(total, heads, width) for name in ("q", "k", "v")}
    tensors |= {"log_envelope": log_envelope, "direction": direction}
    return {n: t.to(device, dtype) for n, t in tensors.items()} | {"offsets": offsets.to(device)}


def expanded_attention(inputs: dict[str, Tensor], scale: float) -> Tensor:
    """The published way: channels times spherical harmonics (64 become 320), padded, unfused."""
    offsets = inputs["offsets"]
    sizes = offsets.diff()
    longest, atoms = int(sizes.max()), len(sizes)
    owner = torch.repeat_interleave(torch.arange(atoms, device=offsets.device), sizes)
    slot = owner * longest + torch.arange(len(owner), device=offsets.device) - offsets[owner]
    harmonics = real_harmonics(inputs["direction"], len(CHANNELS) - 1).split(
        [2 * i + 1 for i in range(len(CHANNELS))], 1
    )
    frequency = torch.cat([h.repeat(1, count) for h, count in zip(harmonics, CHANNELS, strict=True)], 1)
    widths = torch.tensor([2 * i + 1 for i, c in enumerate(CHANNELS) for _ in range(c)], device=offsets.device)

    def pad(x: Tensor, fill: float = 0.0) -> Tensor:
        flat = x.new_full((atoms * longest, *x.shape[1:]), fill)
        return flat.index_copy(0, slot, x).unflatten(0, (atoms, longest))

    q, k = (pad(inputs[n].repeat_interleave(widths, -1) * frequency.unsqueeze(1)).transpose(1, 2) for n in "qk")
    bias = pad(inputs["log_envelope"], -torch.inf)[:, None, None, :]
    probability = torch.softmax(scale * (q @ k.transpose(-1, -2)) + bias, -1)
    out = probability @ pad(inputs["v"]).transpose(1, 2)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, slot)


def derivatives(function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], order: int) -> list[Tensor]:
    """Value, and up to second derivatives of a fixed scalar of it."""
    names = ("q", "k", "v", "log_envelope", "direction")
    leaves = {n: inputs[n].detach().requires_grad_(order > 0) for n in names}
    out = function({**inputs, **leaves})
    if order == 0:
        return [out]
    first = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=order > 1)
    if order == 1:
        return list(first)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values())))


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """``max ‖found − expected‖ / ‖expected‖``."""
    return max(float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


def attention(device: str, small: bool) -> list[dict[str, Any]]:
    """Errors against float64 and times, for each backend and for the expanded channels."""
    scale = sum(CHANNELS) ** -0.5
    shapes = [(60, 8)] if small else [(1000, 16), (1000, 32), (1000, 48), (10000, 32)]
    candidates: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {"expanded": lambda x: expanded_attention(x, scale)}
    orders = {"expanded": 2}
    for info in available_backends():
        if info.devices and device not in info.devices:
            continue
        orders[info.name] = 2 if info.derivatives is None else info.derivatives
        candidates[info.name] = lambda x, name=info.name: neighborhood_attention(
            **x, angular_channels=CHANNELS, scale=scale, backend=name
        )
    rows = []
    for atoms, neighbors in shapes:
        exact = attention_inputs(min(atoms, 500), neighbors, 8, torch.float64, device)
        single = {n: t.float() if t.is_floating_point() else t for n, t in exact.items()}
        timed = attention_inputs(atoms, neighbors, 8, torch.float32, device)
        for name, function in candidates.items():
            row: dict[str, Any] = {"atoms": atoms, "neighbors": neighbors, "backend": name}
            for order in range(3):
                row |= {f"error_{order}": None, f"ms_{order}": None, f"peak_MiB_{order}": None}
                if order > orders[name]:
                    continue
                try:
                    # Expanded channels are solid harmonics, which differ from P_l off the unit sphere.
                    if order == 0 or name not in ("expanded", "sdpa", "xformers"):
                        expected = derivatives(candidates["reference"], exact, order)
                        row[f"error_{order}"] = relative_error(derivatives(function, single, order), expected)
                    if device == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    step = functools.partial(derivatives, function, timed, order)
                    row[f"ms_{order}"] = 1e3 * measure(step, device=device)
                    if device == "cuda":
                        row[f"peak_MiB_{order}"] = torch.cuda.max_memory_allocated() / 2**20
                except Exception as error:  # one kernel that fails, or finds no memory, must not end the suite
                    row["failed"] = f"order {order}: {type(error).__name__} {str(error)[:160]!r}"
            row.setdefault("failed", None)
            rows.append(row)
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
    parts = {"attention": attention, "training_steps": training_steps}
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
        print(markdown_table(list(rows[0]), [[show(v) for v in row.values()] for row in rows]))
    if "quickstart" in report:
        print(report["quickstart"]["output"])


if __name__ == "__main__":
    main()
