"""Is everything right on this device? Kernels and whole models against float64, and the bits of two runs.

Kernels are compiled when first launched, a second or more for each: the cases are dealt out to as many processes as
there are cores, forked before anything has touched the device.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import attention as bench
import torch
from gpu.runner import Row, Setting, reason
from gpu.structures import mixed_batch
from torch import Tensor

from escaip import EScAIPConfig, Potential
from escaip.ops import neighborhood_attention, node_attention
from escaip.ops.harmonics import power_spectrum

ROOT = Path(__file__).resolve().parents[2]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
# Largest relative error in norm of value, first and second derivatives. float32 by three TF32 products; half types
# round every operand and every result, by 2^-9 and 2^-12, and a second derivative chains twice as many of those.
TOLERANCES = {
    "float32": (1e-5, 1e-5, 2e-5), "tf32": (2e-3, 3e-3, 6e-3), "bfloat16": (6e-3, 1e-2, 2e-2),
    "float16": (1e-3, 2e-3, 4e-3),
}  # fmt: skip
# Sizes of neighborhoods: at and beside the edges of tiles, single tokens, many, one that no tile holds.
SHAPES = {
    "edges": [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1],
    "crystal": [31] * 400,
    "ragged": [1 + (7 * i) % 48 for i in range(300)],
    "long": [300, 1, 129, 257],
}
SYSTEMS = {"molecules": [9, 21, 1, 64, 33] * 6, "crystals": [700, 1, 513]}
HEAD_SIZES = (16, 32, 64, 80, 128)


@dataclass(frozen=True)
class KernelCase:
    """One problem of attention.

    Attributes:
        use: ``tokens`` with angles, ``values`` with angular values too, ``radial`` without, ``self`` queries alone,
            ``nodes`` of a system; or ``density``, power spectra of as many channels as heads have.
        shape: of SHAPES, or of SYSTEMS for nodes.
        precision: of TOLERANCES.
    """

    use: str
    shape: str
    head_size: int
    precision: str
    heads: int = 4

    @property
    def dtype(self) -> torch.dtype:
        return {"bfloat16": BFLOAT16, "float16": FLOAT16}.get(self.precision, FLOAT32)

    def inputs(self, device: str) -> dict[str, Tensor]:
        sizes = torch.tensor((SYSTEMS if self.use == "nodes" else SHAPES)[self.shape])
        inputs = bench.tokens(sizes, self.heads, self.head_size, self.dtype, seed=self.head_size)
        if self.use == "self":
            inputs["q"] = inputs["q"][inputs["offsets"][:-1]]
        return {name: x.to(device) for name, x in inputs.items()}

    def function(self, backend: str) -> Callable[..., Tensor]:
        """Of the five leaves and ``offsets``."""
        scale = self.head_size**-0.5
        if self.use == "density":
            return partial(spectrum, channels=self.head_size, fused=backend != "reference")
        if self.use == "nodes":
            return lambda q, k, v, b, n, offsets: node_attention(q, k, v, offsets, scale, backend)
        channels = None if self.use == "radial" else bench.CHANNELS[self.head_size]
        options = {"angular_channels": channels, "scale": scale, "backend": backend}
        flags = {"self_queries_only": self.use == "self", "angular_values": self.use == "values"}
        return partial(neighborhood_attention, **options, **flags)


def spectrum(*leaves: Tensor, channels: int, fused: bool) -> Tensor:
    """Power spectra of densities weighted by some of the values and the envelope."""
    _, _, values, log_envelope, direction, offsets = leaves
    center = torch.repeat_interleave(offsets.diff())
    weight = values.flatten(1)[:, :channels] * log_envelope.exp().unsqueeze(1)
    return power_spectrum(direction, weight, center, len(offsets) - 1, 4, offsets=offsets if fused else None)


def kernel_cases(small: bool, device: str) -> list[KernelCase]:
    """What users' models launch first: float32, then half types; the usual head sizes, then the others."""
    if small:
        return [KernelCase("tokens", "edges", 16, "float32", 2), KernelCase("nodes", "molecules", 16, "float32", 2)]
    precisions = ("float32", "bfloat16", "float16", "tf32")[: 4 if device == "cuda" else 1]
    order = sorted(HEAD_SIZES, key=lambda d: d not in (32, 64))
    cases = [KernelCase(use, "ragged", d, p) for p in precisions for d in order for use in ("tokens", "self")]
    cases += [KernelCase("nodes", shape, d, p) for p in precisions for d in (32, 64) for shape in SYSTEMS]
    cases += [KernelCase("density", shape, 16, "float32") for shape in SHAPES]
    cases += [KernelCase(use, "ragged", 64, p) for p in precisions for use in ("values", "radial")]
    cases += [KernelCase("tokens", shape, d, p) for p in precisions for d in (32, 64) for shape in SHAPES]
    return list(dict.fromkeys(cases))


def derivatives(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> list[list[Tensor | None]]:
    """The value; gradients of a projection of it; gradients of a projection of those."""
    leaves = [inputs[name].detach().requires_grad_() for name in bench.LEAVES]
    out = function(*leaves, inputs["offsets"])
    first = torch.autograd.grad(bench.project(out), leaves, create_graph=True, allow_unused=True)
    total = torch.stack([bench.project(g) for g in first if g is not None]).sum()
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    return [[out.detach()], [g if g is None else g.detach() for g in first], list(second)]


def worst(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """Largest ``‖found − expected‖ / ‖expected‖``; not a number where one of them is missing or not finite."""
    errors = [0.0]
    for f, e in zip(found, expected, strict=True):
        if f is not None and e is not None:
            errors.append(float((f.double() - e).norm() / e.norm().clamp(min=1e-12)))
        elif any(x is not None and bool(x.any()) for x in (f, e)):  # a missing one counts as zero
            errors.append(math.nan)
    return max(errors, key=lambda x: math.inf if math.isnan(x) else x)


def check_kernel(case: KernelCase, backend: str, device: str) -> Row:
    """Errors of a case, and whether a second run gives the same bits."""
    row: Row = {
        "what": case.use if case.use == "density" else f"attention, {case.use}",
        "backend": backend,
        "shape": case.shape,
        "d": case.head_size,
    }
    row |= {"precision": case.precision, "value": None, "first": None, "second": None, "same_bits": None, "ok": False}
    row["failed"] = None
    try:
        torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"
        inputs = case.inputs(device)
        exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        expected = derivatives(case.function("reference"), exact)
        found, again = (derivatives(case.function(backend), inputs) for _ in range(2))
        errors = [worst(f, e) for f, e in zip(found, expected, strict=True)]
        names = ("value", "first", "second")
        row |= {name: e if math.isfinite(e) else None for name, e in zip(names, errors, strict=True)}
        pairs = [(a, b) for f, g in zip(found, again, strict=True) for a, b in zip(f, g, strict=True) if a is not None]
        row["same_bits"] = all(b is not None and torch.equal(a, b) for a, b in pairs)
        limits = TOLERANCES[case.precision]
        row["ok"] = row["same_bits"] and all(e < limit for e, limit in zip(errors, limits, strict=True))
        if not all(map(math.isfinite, errors)):
            row["failed"] = "not finite, or a gradient is missing"
    except Exception as error:  # a kernel that fails is a row, not the end of the suite
        row["failed"] = reason(error)
    return row


def backend_of(case: KernelCase, device: str) -> str:
    return "triton" if device == "cuda" else "blocked" if case.use == "nodes" else "native"


def kernels(setting: Setting) -> Iterator[Row]:
    """Every use, head size, shape and precision of the fused kernels, on a CPU of those that replace them there."""
    cases = kernel_cases(setting.small, setting.device)
    workers = 1 if setting.small else max(1, min(12, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        waiting = [pool.submit(check_kernel, case, backend_of(case, setting.device), setting.device) for case in cases]
        for done in as_completed(waiting):
            yield done.result()


MODEL_TOLERANCES = {"highest": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2, "float16": 2e-2}


def model_cases(setting: Setting) -> list[tuple[str, str, str]]:
    """Forces, way and precision; what compiles comes last, and what users run first."""
    both = ("conservative", "direct")
    if setting.device != "cuda":
        compiled = [] if setting.small else [(forces, "compiled", "highest") for forces in both]
        return [*((forces, "eager", "highest") for forces in both), *compiled]
    cases = [(forces, "eager", precision) for forces in both for precision in MODEL_TOLERANCES]
    cases += [("conservative", way, "highest") for way in ("compiled", "recorded")]
    cases += [("direct", way, "highest") for way in ("compiled", "recorded")]
    return cases + [("conservative", "compiled", precision) for precision in list(MODEL_TOLERANCES)[1:]]


def models(setting: Setting) -> Iterator[Row]:
    """Energy, forces, stress and the gradient of a loss of whole models against float64 on the CPU."""
    own: dict[str, Potential] = {}
    exact: dict[str, dict[str, Tensor]] = {}
    for forces, way, precision in model_cases(setting):
        if forces not in own:
            torch.manual_seed(0)
            config = EScAIPConfig.preset("300k" if setting.small else "1m", forces=forces)
            own[forces] = potential = Potential(config).eval()
            exact[forces] = answers(potential_like(potential, "cpu", torch.float64), "cpu")
        yield check_model(own[forces], exact[forces], setting.device, forces, way, precision)


def potential_like(potential: Potential, device: str, dtype: torch.dtype) -> Potential:
    made = Potential(potential.config).to(device=device, dtype=dtype).eval()
    made.load_state_dict(potential.state_dict())
    return made


def answers(potential: Potential, device: str) -> dict[str, Tensor]:
    """Of a batch of a molecule, a crystal and a slab; with the gradient of a loss by the weights."""
    batch = mixed_batch().to(device)
    found = {}
    prediction = potential(batch, compute_stress=potential.config.is_conservative, create_graph=False)
    for name in ("energy", "forces", "stress"):
        if getattr(prediction, name) is not None:
            found[name] = getattr(prediction, name).detach().double().cpu()
    potential.train()
    trained = potential(batch, create_graph=True)
    loss = trained.forces.double().square().mean() + trained.energy.double().square().mean()
    weights = [p for p in potential.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    kept = [g.double().cpu().flatten() for g in gradients if g is not None]
    potential.eval()
    return found | {"loss gradient": torch.cat(kept)}


def check_model(own: Potential, exact: dict[str, Tensor], device: str, forces: str, way: str, precision: str) -> Row:
    row: Row = {"what": f"model, {forces}", "way": way, "precision": precision, **dict.fromkeys(exact)}
    row |= {"same_bits": None, "ok": False, "failed": None}
    try:
        potential = potential_like(own, device, torch.float32)
        potential.precision = precision
        if way != "eager":
            potential.compile(cuda_graphs=way == "recorded")
        found, again = answers(potential, device), answers(potential, device)
        errors = {name: float((found[name] - e).norm() / e.norm()) for name, e in exact.items()}
        row |= {name: e if math.isfinite(e) else None for name, e in errors.items()}
        row["same_bits"] = all(torch.equal(found[name], again[name]) for name in exact)
        row["ok"] = all(e < MODEL_TOLERANCES[precision] for e in errors.values())
    except Exception as error:
        row["failed"] = reason(error)
    return row


DEVICE_TESTS = ("tests/ops/test_triton.py", "tests/ops/test_triton_training.py", "tests/potential/test_device.py")


def tests(setting: Setting) -> Iterator[Row]:
    """The tests that run on a GPU where there is one."""
    workers = [] if setting.small else ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))]
    chosen = DEVICE_TESTS[:1] if setting.small else DEVICE_TESTS
    yield run_command(
        "tests", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *workers], setting
    )


def memory_checker(setting: Setting) -> Iterator[Row]:
    """The kernels under NVIDIA's memory and race checkers, where they are installed."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        yield {"what": "compute-sanitizer", "ok": False, "seconds": None, "output": "not installed here"}
        return
    few = "import sys; sys.path.insert(0, 'benchmarks'); from gpu.checks import few_kernels; few_kernels()"
    for tool in ("memcheck", "racecheck"):
        command = [checker, "--tool", tool, "--error-exitcode", "99", sys.executable, "-c", few]
        yield run_command(f"compute-sanitizer {tool}", command, setting)


def few_kernels() -> None:
    """One small case of every kernel, for the checkers."""
    rows = [
        check_kernel(KernelCase(use, shape, d, precision, 2), "triton", "cuda")
        for use, shape, d, precision in (
            ("tokens", "edges", 32, "float32"), ("tokens", "edges", 64, "bfloat16"), ("self", "edges", 32, "float32"),
            ("nodes", "molecules", 32, "float32"),
        )
    ]  # fmt: skip
    failed = [row for row in rows if not row["ok"]]
    print(failed or "all ok")
    sys.exit(1 if failed else 0)


def run_command(what: str, command: list[str], setting: Setting) -> Row:
    """A command of its own: whether it succeeded, and the end of its output."""
    environment: dict[str, Any] = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "sanitizer" in what else {}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1.0, setting.left - 1.0),
            env=environment or None,
        )  # fmt: skip
        ok, output = done.returncode == 0, (done.stdout[-2000:] + done.stderr[-1000:]).strip()
    except subprocess.TimeoutExpired as expired:
        ok, output = False, f"no time left: {(expired.stdout or b'')[-1000:].decode(errors='replace')}"
    return {"what": what, "ok": ok, "seconds": time.monotonic() - start, "output": output}
