"""Do the fits of scaling laws find exponents that are known, and their intervals hold them as often as they say?

python benchmarks/scaling_recovery.py [--repeats 200] [--bootstrap 300] [--only NAME,...] [--out FILE]

Losses are drawn from laws with known parameters times log-normal noise of seeds. Counted is in how many of the repeats
the 90 % interval holds the truth, how wide it is, and how often the test of fit raises its flag: over true laws (it
should not) and over losses that stop falling at a plateau inside the range (it should).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown_table, provenance, write_json

from escaip.scaling.laws import FitSettings, fit_law

RESULT = Path(__file__).parent / "results" / "scaling_recovery.json"
# Truth: E, N term at a million parameters, α, D term at ten thousand structures, β; losses like force errors in eV/Å.
JOINT = {
    "balanced": (0.02, 0.03, 0.30, 0.03, 0.40),
    "slow": (0.005, 0.05, 0.20, 0.02, 0.25),
    "no floor": (0.0, 0.03, 0.35, 0.05, 0.35),
    "high floor": (0.03, 0.02, 0.50, 0.02, 0.30),
}
POWER = {"steep": (0.01, 0.1, 0.40), "flat": (0.0, 0.1, 0.17)}  # E, F term at 1e15, γ
# Sizes, data sizes, seeds, noise.
DESIGNS = {"4x3x2, 3 %": (4, 3, 2, 0.03), "5x4x3, 2 %": (5, 4, 3, 0.02)}
BUDGETS = {"6x3, 3 %": (6, 3, 0.03), "8x2, 2 %": (8, 2, 0.02)}


def joint_case(
    truth: tuple[float, ...], design: tuple[int, int, int, float]
) -> tuple[list[Any], Any, dict[str, float]]:
    """Inputs, losses without noise and the true values by name."""
    floor, head, alpha, tail, beta = truth
    sizes, data = np.logspace(5, 7, design[0]), np.logspace(3, 5.2, design[1])
    n, d = (np.repeat(grid.ravel(), design[2]) for grid in np.meshgrid(sizes, data, indexing="ij"))
    losses = floor + head * (n / 1e6) ** -alpha + tail * (d / 1e4) ** -beta
    gamma = alpha * beta / (alpha + beta)
    named = {"alpha": alpha, "beta": beta, "gamma": gamma, "E": floor, "A": head * 1e6**alpha, "B": tail * 1e4**beta}
    return [n, d], losses, named


def power_case(truth: tuple[float, ...], design: tuple[int, int, float]) -> tuple[list[Any], Any, dict[str, float]]:
    """As :func:`joint_case`, over four decades of compute."""
    floor, head, gamma = truth
    c = np.repeat(np.logspace(13, 17, design[0]), design[1])
    return [c], floor + head * (c / 1e15) ** -gamma, {"gamma": gamma, "E": floor, "F": head * 1e15**gamma}


def recover(
    kind: str,
    case: tuple[list[Any], Any, dict[str, float]],
    noise: float,
    repeats: int,
    bootstrap: int,
) -> dict[str, Any]:
    """Coverage and width of every interval, and the rate of flags on losses that obey the law."""
    inputs, exact, truth = case
    hits: dict[str, list[bool]] = {name: [] for name in truth}
    widths: dict[str, list[float]] = {name: [] for name in truth}
    values: dict[str, list[float]] = {name: [] for name in truth}
    flags = []
    for repeat in range(repeats):
        rng = np.random.default_rng([repeat, 7])
        losses = exact * np.exp(noise * rng.standard_normal(len(exact)))
        found = fit_law(kind, inputs, losses, FitSettings(bootstrap=bootstrap, seed=repeat))
        for name, value in truth.items():
            one = found.estimates[name]
            hits[name].append(one.covers(value))
            widths[name].append(one.high - one.low)
            values[name].append(one.value)
        flags.append(found.lack_of_fit.flagged)
    return {
        "coverage": {name: float(np.mean(one)) for name, one in hits.items()},
        "mean_width": {name: float(np.mean(one)) for name, one in widths.items()},
        "median_width": {name: float(np.median(one)) for name, one in widths.items()},
        "median_value": {name: float(np.median(one)) for name, one in values.items()},
        "truth": truth,
        "false_flags": float(np.mean(flags)),
    }


def plateau(kind: str, case: tuple[list[Any], Any, dict[str, float]], noise: float, repeats: int) -> dict[str, Any]:
    """How often losses that stop falling at their 30 % quantile are flagged."""
    inputs, exact, _ = case
    stopped = np.maximum(exact, np.quantile(np.unique(exact), 0.3))
    flags = []
    for repeat in range(repeats):
        rng = np.random.default_rng([repeat, 8])
        losses = stopped * np.exp(noise * rng.standard_normal(len(exact)))
        flags.append(fit_law(kind, inputs, losses, FitSettings(bootstrap=50)).lack_of_fit.flagged)
    return {"flagged": float(np.mean(flags))}


def cases() -> dict[str, tuple[str, tuple[list[Any], Any, dict[str, float]], float]]:
    """Name to kind of law, truth and noise."""
    found: dict[str, tuple[str, tuple[list[Any], Any, dict[str, float]], float]] = {}
    for design, numbers in DESIGNS.items():
        for law, truth in JOINT.items():
            found[f"joint {law}, {design}"] = ("joint", joint_case(truth, numbers), numbers[-1])
    for design, numbers3 in BUDGETS.items():
        for law, truth in POWER.items():
            found[f"power {law}, {design}"] = ("power", power_case(truth, numbers3), numbers3[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--bootstrap", type=int, default=300)
    parser.add_argument("--only", default="", help="words that the names of cases must hold, one of them")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    words = [word for word in args.only.split(",") if word]
    results: dict[str, Any] = {}
    for name, (kind, case, noise) in cases().items():
        if words and not any(word in name for word in words):
            continue
        start = time.process_time()
        found = recover(kind, case, noise, args.repeats, args.bootstrap)
        found["plateau"] = plateau(kind, case, noise, args.repeats)
        found["processor_seconds"] = time.process_time() - start
        results[name] = found
        content = {"provenance": provenance(), "repeats": args.repeats, "bootstrap": args.bootstrap, "cases": results}
        write_json(args.out, content)
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Coverage of each interval and rates of flags, in per cent."""
    names = ("alpha", "beta", "gamma", "E")
    rows = []
    for name, found in results.items():
        cover = [f"{100 * found['coverage'][one]:.0f}" if one in found["coverage"] else "" for one in names]
        width = found["median_width"]["gamma"]
        rows.append([
            name, *cover, f"{width:.3f}", f"{100 * found['false_flags']:.0f}",
            f"{100 * found['plateau']['flagged']:.0f}",
        ])  # fmt: skip
    return markdown_table(["case", *names, "width of gamma", "false flags", "plateaus flagged"], rows)


if __name__ == "__main__":
    main()
