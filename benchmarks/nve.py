"""Energy at constant energy: how far models drift in long runs, and how the fluctuation falls with the time step.

python benchmarks/nve.py --model NAME=FILE ... --start NAME=STRUCTURE ... [--picoseconds 10] [--out FILE]

Every model runs from the structure of its name (the part before a colon names both: ``3bpa:direct`` starts where
``3bpa`` does), relaxed no further, velocities drawn once and the same for all: float32 and float64, compiled and
not, with and without a skin, and at half and twice the time step. Direct-force models run in float32 alone;
they drift, which is shown here. The slope is of a line through the logged energy; its error is that of the slopes of
five blocks, since samples are correlated. What stands in ``--out`` already is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from common import markdown_table, provenance, write_json

from escaip import EScAIPCalculator, Potential, load_potential
from escaip.errors import SimulationError
from escaip.simulate import MDSettings, read_log, read_structure, run_md

STEPS = (0.5, 2.0)  # of the study of time steps, beside the one that is given
BLOCKS = 5


@dataclass(frozen=True)
class Run:
    """One row.

    Attributes:
        model, dtype, skin, compiled: what ran; skin in Å.
        timestep: fs.
        picoseconds: simulated.
        temperature: K, mean.
        drift, error: meV per atom per ns.
        fluctuation: root mean square about the line, meV per atom.
        ns_per_day: speed.
        why: it ended early, or None.
        commit: of the code that ran.
    """

    model: str
    dtype: str
    skin: float
    compiled: bool
    timestep: float
    picoseconds: float
    temperature: float
    drift: float | None
    error: float | None
    fluctuation: float | None
    ns_per_day: float
    why: str | None = None
    commit: str = ""


def slope_of(time: np.ndarray, energy: np.ndarray) -> tuple[float, float, float]:
    """Slope, its error from blocks, and the fluctuation about the line; of fs and meV per atom, per ns."""
    line = np.polyfit(time, energy, 1)
    blocks = [np.polyfit(t, e, 1)[0] for t, e in zip(np.array_split(time, BLOCKS), np.array_split(energy, BLOCKS))]
    # The slopes of blocks scatter BLOCKS^(3/2) times as much as that of the whole.
    error = np.std(blocks, ddof=1) / BLOCKS**1.5
    rest = energy - np.polyval(line, time)
    return float(line[0] * 1e6), float(error * 1e6), float(np.sqrt((rest**2).mean()))


def run(
    name: str, model: Potential, start: Atoms, dtype: str, skin: float, compiled: bool, args: Any, step: float
) -> Run:
    """One run at constant energy."""
    atoms = start.copy()
    atoms.calc = EScAIPCalculator(model, device=args.device, dtype=dtype, skin=skin, compile=compiled)
    steps = round(args.picoseconds * 1000 / step)
    settings = MDSettings(
        "nve", steps, timestep=step, temperature=args.temperature, log_interval=max(1, round(5.0 / step)),
        trajectory_interval=steps, restart_interval=steps, seed=1,
    )  # fmt: skip
    why = None
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.extxyz"
        try:
            run_md(atoms, settings, out=out)
        except SimulationError as error:
            why = str(error).split(";")[0].replace(str(out.parent), "")
        log = read_log(out.with_suffix(".csv"))
    seconds, done = time.perf_counter() - began, float(log["time_fs"][-1]) * 1e-3
    found: tuple[float | None, ...] = (None, None, None)
    if len(log["step"]) > 10 * BLOCKS:
        found = slope_of(log["time_fs"], log["total_energy_eV"] * 1e3 / len(atoms))
    mean = float(np.nanmean(log["temperature_K"]))
    return Run(name, dtype, skin, compiled, step, done, mean, *found, done * 1e-3 / seconds * 86400, why, args.commit)


def settings_of(model: Potential, step: float) -> list[tuple[str, float, bool, float]]:
    """What to run a model with: dtype, skin, compiled, time step."""
    if not model.config.is_conservative:
        return [("float32", 0.5, True, step)]
    ways = [(skin, compiled) for compiled in (True, False) for skin in (0.0, 0.5)]
    found = [(dtype, skin, compiled, step) for skin, compiled in ways for dtype in ("float32", "float64")]
    return found + [("float64", 0.5, True, factor * step) for factor in STEPS]


def render(rows: Sequence[Run]) -> str:
    """The table."""

    def number(value: float | None, form: str) -> str:
        return "—" if value is None else format(value, form)

    header = [
        "model",
        "dtype",
        "skin",
        "compiled",
        "dt fs",
        "ps",
        "T K",
        "drift meV/atom/ns",
        "fluctuation",
        "ns/day",
        "",
    ]
    return markdown_table(
        header,
        [
            [r.model, r.dtype, f"{r.skin:g}", "yes" if r.compiled else "no", f"{r.timestep:g}", f"{r.picoseconds:.3g}",
             f"{r.temperature:.0f}", f"{number(r.drift, '+.3g')} ± {number(r.error, '.2g')}",
             number(r.fluctuation, ".3g"), f"{r.ns_per_day:.3g}", r.why or ""]
            for r in rows
        ],
    )  # fmt: skip


def named(values: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` of the command line."""
    return dict(value.split("=", 1) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--start", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--picoseconds", type=float, default=10.0)
    parser.add_argument("--timestep", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=300.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/nve.json"))
    args = parser.parse_args()
    starts = {name: read_structure(path) for name, path in named(args.start).items()}
    args.commit = provenance()["commit"]
    rows = [Run(**row) for row in json.loads(args.out.read_text("utf-8"))["runs"]] if args.out.exists() else []
    done = {(r.model, r.dtype, r.skin, r.compiled, r.timestep) for r in rows}
    for name, path in named(args.model).items():
        model = load_potential(path)
        for dtype, skin, compiled, step in settings_of(model, args.timestep):
            if (name, dtype, skin, compiled, step) in done:
                continue
            rows.append(run(name, model, starts[name.split(":")[0]], dtype, skin, compiled, args, step))
            print(render(rows[-1:]).splitlines()[-1], flush=True)
            # After each: the whole takes an hour.
            options = {name: getattr(args, name) for name in ("picoseconds", "timestep", "temperature")}
            given = " ".join(f"--{name} {value:g}" for name, value in options.items())
            content = {**provenance(), "command": f"python benchmarks/nve.py --model ... --start ... {given}"}
            write_json(args.out, {"provenance": content, "runs": [asdict(row) for row in rows]})
    print(render(rows))


if __name__ == "__main__":
    main()
