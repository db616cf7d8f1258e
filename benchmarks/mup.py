"""Does a learning rate that was found at one width hold at another? The coordinate check, and sweeps at two widths.

python benchmarks/mup.py [--steps 150] [--seeds 2] [--check-seeds 6] [--out FILE]

The recipe ``quickstart`` with one or two layers, heads of one size that become more with the width, on the sample that
comes with the package. Coordinates: by how much node features, energies and forces of a batch have moved after some
steps at widths of 64 to 512, and the exponent in the width, with maximal-update parametrisation from a base width of
64 and without. Sweeps: short trainings at rates a factor of two apart, at width 64, and at 256 with the base width and
without; the grid grows until the rates at both ends are clearly worse than the best. Written after every run; what
stands in ``--out`` is not run again. Draws a PNG beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown_table, provenance, write_json
from coordinates import check_coordinates
from lightning.pytorch import Callback
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from escaip import EScAIPConfig, Potential
from escaip.errors import ConfigError, TrainingError
from escaip.train.cli import TrainingCLI, build

RESULT = Path(__file__).parent / "results" / "mup.json"
BASE, WIDE = 64, 256
ARCHITECTURE = {"preset": "300k", "hidden_size": BASE, "num_neighbors": 8, "cutoff": 5.0}
SAMPLE = {"path": "dataset:spice/sample.hdf5", "format": "spice"}
CHECK = {"widths": (64, 128, 256, 512), "num_layers": 2, "max_atoms": 40, "steps": 4, "learning_rate": 1e-3}
# Four molecular ions: of all the sample so few steps learn too little to tell rates apart. Warm-up is long, so that the
# rate at which a run is lost is not that of its first steps.
SWEEP = {
    "subset": "escaip GFN2-xTB sample, charged", "num_layers": 1, "max_atoms": 32, "val": 0.15, "warmup_fraction": 0.2,
}  # fmt: skip
CURVES = {"base": (BASE, BASE), "wide, transferred": (WIDE, BASE), "wide, standard": (WIDE, None)}
START = (1e-3, 2e-3, 4e-3)  # of every sweep, before it grows
FACTOR = 2.0
WORSE = 1.1  # times the lowest loss: clearly worse
MOST_RATES = 12
TAIL = 0.2  # of a training, over which its loss is averaged


def fit(folder: str, **changes: Any) -> TrainingCLI:
    """The package's own training by the recipe ``quickstart``, in which nothing is kept; options without ``__``."""
    options = {
        "ema.decay": 0.0, "evaluation.max_structures": 0, "trainer.max_epochs": -1, "trainer.logger": "false",
        "trainer.enable_checkpointing": "false", "trainer.enable_progress_bar": "false", "out": folder,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }  # fmt: skip
    return build(["fit", "--config", "quickstart", *(f"--{name}={value}" for name, value in options.items())])


# Coordinates


def in_units_of_the_model(batch: Any, potential: Potential) -> Any:
    """The batch with references taken off its energies, and everything in units of the scale, as a model learns it."""
    references = torch.zeros_like(batch.energy, dtype=torch.float64)
    references = references.index_add(0, batch.batch, potential.atomic_references(batch).double())
    batch.energy = ((batch.energy.double() - references) / potential.scale).to(batch.energy.dtype)
    batch.forces = (batch.forces.double() / potential.scale).to(batch.forces.dtype)
    return batch


def check(forces: str, base_width: int | None, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each seed: root mean square of what each coordinate moved by, at each width, and its exponent."""
    with tempfile.TemporaryDirectory() as folder:
        cli = fit(folder, data__max_atoms=CHECK["max_atoms"], data__split__val=0.05)
    cli.datamodule.setup("fit")
    cli.model.potential.set_statistics(cli.datamodule.statistics)
    batch = in_units_of_the_model(next(iter(cli.datamodule.train_dataloader())), cli.model.potential)
    config = EScAIPConfig.from_dict({**ARCHITECTURE, "num_layers": CHECK["num_layers"], "forces": forces})
    how = {name: CHECK[name] for name in ("widths", "steps", "learning_rate")}
    for seed in seeds:
        began = time.process_time()
        found = check_coordinates(config, batch, base_width=base_width, losses=cli.model.losses, seeds=(seed,), **how)
        changes = {name: [float(f"{value:.4g}") for value in values[-1]] for name, values in found.changes.items()}
        yield {
            "forces": forces, "base_width": base_width, "seed": seed, "changes": changes,
            "exponents": {name: round(value, 3) for name, value in found.slopes().items()},
            "processor_seconds": round(time.process_time() - began, 1),
        }  # fmt: skip


def exponents(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of rows that differ by their seed: mean exponent of each coordinate, its standard error, and the spread."""
    found = {}
    for name in rows[0]["exponents"]:
        values = np.array([row["exponents"][name] for row in rows])
        spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        found[name] = {"mean": float(values.mean()), "error": spread / math.sqrt(len(values)), "spread": spread}
    return found


# Sweeps


class TrainLosses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One more."""
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def train(curve: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One run: validation loss at its end and mean training loss of its last part; None where it diverged."""
    width, base_width = CURVES[curve]
    config = EScAIPConfig.from_dict({**ARCHITECTURE, "num_layers": SWEEP["num_layers"]})
    data = {**SAMPLE, "subset": SWEEP["subset"]}
    began, kept = time.process_time(), TrainLosses()
    row: dict[str, Any] = {"curve": curve, "rate": rate, "seed": seed, "val_loss": None, "train_loss": None}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cli = fit(
            folder, seed_everything=seed, trainer__max_steps=steps, data__train=json.dumps(data),
            data__max_atoms=SWEEP["max_atoms"], data__split__val=SWEEP["val"], model__learning_rate=rate,
            model__architecture=json.dumps(config.at_width(width).to_dict()), model__base_width=json.dumps(base_width),
            model__warmup_fraction=SWEEP["warmup_fraction"],
        )  # fmt: skip
        cli.trainer.callbacks.append(kept)
        with contextlib.suppress(TrainingError):
            cli.execute()
            row["val_loss"] = float(cli.model.last_errors["model"]["loss"])
            row["train_loss"] = float(np.mean(kept.values[-max(1, round(TAIL * steps)) :]))
    return {**row, "steps": len(kept.values), "processor_seconds": round(time.process_time() - began, 1)}


def losses_of(rows: Sequence[Mapping[str, Any]], curve: str, seeds: Sequence[int], key: str) -> dict[float, Any]:
    """Mean over seeds by rate, in order; None where a seed diverged, nothing where one is missing."""
    found: dict[float, Any] = {}
    for rate in sorted({row["rate"] for row in rows if row["curve"] == curve}):
        values = {row["seed"]: row[key] for row in rows if (row["curve"], row["rate"]) == (curve, rate)}
        if set(seeds) <= set(values):
            chosen = [values[seed] for seed in seeds]
            found[rate] = None if None in chosen else float(np.mean(chosen))
    return found


def next_rate(losses: Mapping[float, float | None]) -> float | None:
    """What to try next: beyond an end of the grid that is not clearly worse than the best; None when both are."""
    finite = [loss for loss in losses.values() if loss is not None]
    if not finite:
        return min(losses) / FACTOR
    for end, beyond in ((min(losses), 1 / FACTOR), (max(losses), FACTOR)):
        loss = losses[end]
        if loss is not None and loss < WORSE * min(finite):
            return end * beyond
    return None


def best_rate(losses: Mapping[float, float | None]) -> dict[str, float | None]:
    """The rate of the lowest loss on the grid, and where a parabola through it and its neighbors has its minimum.

    In logarithms of rate and loss. None for the parabola where the lowest is at an end or beside one that diverged.
    """
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda i: math.inf if losses[rates[i]] is None else losses[rates[i]])
    around = [losses[rate] for rate in rates[max(0, place - 1) : place + 2]]
    if len(around) < 3 or None in around:
        return {"grid": rates[place], "parabola": None}
    logs = np.log(rates[place - 1 : place + 2])
    a, b, _ = np.polyfit(logs - logs[1], np.log(np.array(around, float)), 2)
    return {"grid": rates[place], "parabola": float(math.exp(logs[1] - b / (2 * a))) if a > 0 else None}


def summary(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Best rates of each curve, by both losses and of single seeds, and their ratio to that of the base width."""
    found: dict[str, Any] = {}
    for curve in CURVES:
        losses = losses_of(rows, curve, seeds, "val_loss")
        if not losses or all(loss is None for loss in losses.values()):
            continue
        best = best_rate(losses)
        found[curve] = {
            **best, "lowest_loss": losses[best["grid"]],
            "by_train_loss": best_rate(losses_of(rows, curve, seeds, "train_loss")),
            "by_seed": [best_rate(losses_of(rows, curve, [seed], "val_loss"))["parabola"] for seed in seeds],
        }  # fmt: skip
    for one in found.values():
        pair = (one["parabola"], found["base"]["parabola"]) if "base" in found else (None, None)
        one["parabola_over_base"] = None if None in pair else pair[0] / pair[1]
    return found


# Tables and the figure


def coordinate_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean exponents with standard errors; what a seed differs by in brackets."""
    columns = [(forces, base) for forces in ("conservative", "direct") for base in (BASE, None)]
    found = {}
    for forces, base in columns:
        chosen = [row for row in rows if (row["forces"], row["base_width"]) == (forces, base)]
        if chosen:
            found[forces, base] = exponents(chosen)
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    header = ["change of", *(f"{f}, {'standard' if b is None else f'base width {b}'}" for f, b in found)]

    def cell(one: Mapping[str, float]) -> str:
        return f"{one['mean']:+.2f} ± {one['error']:.2f} ({one['spread']:.2f})"

    return markdown_table(header, [[name, *(cell(one[name]) for one in found.values())] for name in names])


def sweep_table(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """Mean validation losses by rate, and the best rates."""
    losses = {curve: losses_of(rows, curve, seeds, "val_loss") for curve in CURVES}

    def cell(curve: str, rate: float) -> str:
        if rate not in losses[curve]:
            return ""
        value = losses[curve][rate]
        text = "diverged" if value is None else f"{value:.2f}"
        return f"**{text}**" if best.get(curve, {}).get("grid") == rate else text

    best = summary(rows, seeds)
    names = [f"{w}, {'standard' if b is None else f'base width {b}'}" for w, b in CURVES.values()]
    lines = [
        [f"{rate:g}", *(cell(curve, rate) for curve in CURVES)]
        for rate in sorted({rate for one in losses.values() for rate in one})
    ]
    minima = [best.get(curve, {}).get("parabola") for curve in CURVES]
    lines.append(["best, by parabola", *("" if rate is None else f"{rate:.2g}" for rate in minima)])
    return markdown_table(["learning rate", *names], lines)


def draw(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], path: Path) -> None:
    """Loss against rate, seeds as dots; transferred beside standard. A rate that diverged is a triangle at the top."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    panels = ((left, "wide, transferred", "with a base width of 64"), (right, "wide, standard", "standard"))
    for axes, wide, title in panels:
        for curve, color in (("base", "#2a6f97"), (wide, "#c8553d")):
            _draw_curve(axes, losses_of(rows, curve, seeds, "val_loss"), color, f"width {CURVES[curve][0]}")
            for seed in seeds:
                one = {k: v for k, v in losses_of(rows, curve, [seed], "val_loss").items() if v is not None}
                axes.plot(list(one), list(one.values()), ".", color=color, alpha=0.5, markersize=3)
        axes.set(xscale="log", xlabel="learning rate", title=title)
        axes.legend(frameon=False)
    lowest = min((row["val_loss"] for row in rows if row["val_loss"] is not None), default=1.0)
    left.set(ylabel="validation loss", ylim=(0.95 * lowest, 1.6 * lowest))  # of lost runs one sees that they leave
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    figure.savefig(aside, format="png", dpi=100)
    os.replace(aside, path)


def _draw_curve(axes: Axes, losses: Mapping[float, float | None], color: str, label: str) -> None:
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not finite:
        return
    axes.plot(list(finite), list(finite.values()), "o-", color=color, label=label, markersize=4)
    lost = [rate for rate, loss in losses.items() if loss is None]
    axes.plot(lost, [0.97] * len(lost), "^", color=color, transform=axes.get_xaxis_transform())
    best = best_rate(losses)["parabola"]
    if best is not None:
        axes.axvline(best, color=color, linewidth=0.8, linestyle=":")


# The whole


class Results:
    """Rows so far, in a file."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.origin = {**provenance(), "command": "python benchmarks/mup.py"}
        self.rows: dict[str, list[dict[str, Any]]] = {"coordinates": [], "sweep": []}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] != json.loads(json.dumps(self.settings)):
                raise ConfigError(f"{path.name} holds runs of other settings: give another --out")
            self.rows = {part: content[part] for part in self.rows}

    def has(self, part: str, **row: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(done[key] == value for key, value in row.items()) for done in self.rows[part])

    def add(self, part: str, *new: Mapping[str, Any], **summaries: Any) -> None:
        """Adds rows and writes the file."""
        self.rows[part] += [{**row, "commit": self.origin["commit"]} for row in new]
        seconds = sum(row["processor_seconds"] for rows in self.rows.values() for row in rows)
        write_json(
            self.path,
            {"provenance": self.origin, "settings": self.settings, "processor_seconds": round(seconds), **self.rows}
            | summaries,
        )


def sweep(results: Results, curve: str, seeds: Sequence[int], steps: int) -> None:
    """Runs what is missing of a sweep, and lets its grid grow."""
    rates: list[float] = list(START)
    while rates:
        for rate in rates:
            for seed in seeds:
                if not results.has("sweep", curve=curve, rate=rate, seed=seed):
                    row = train(curve, rate, seed, steps)
                    results.add("sweep", row)
                    print(
                        f"{curve}, {rate:g}, seed {seed}: {row['val_loss']} ({row['processor_seconds']} s)", flush=True
                    )
        losses = losses_of(results.rows["sweep"], curve, seeds, "val_loss")
        following = next_rate(losses)
        if following is not None and len(losses) >= MOST_RATES:
            raise TrainingError(f"{curve}: the best of {MOST_RATES} learning rates is not enclosed by worse ones")
        rates = [] if following is None else [following]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of each training")
    parser.add_argument("--seeds", type=int, default=2, help="of each rate; of weights")
    parser.add_argument("--check-seeds", type=int, default=6, help="of the coordinate check")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    settings = {
        "architecture": ARCHITECTURE, "coordinates": CHECK, "sweep": {**SWEEP, "steps": args.steps, "curves": CURVES},
    }  # fmt: skip
    results, seeds = Results(args.out, settings), list(range(args.seeds))
    for forces in ("conservative", "direct"):
        for base in (BASE, None):
            missing = [
                seed for seed in range(args.check_seeds)
                if not results.has("coordinates", forces=forces, base_width=base, seed=seed)
            ]  # fmt: skip
            for row in check(forces, base, missing) if missing else []:
                results.add("coordinates", row)
    print(coordinate_table(results.rows["coordinates"]), flush=True)
    for curve in CURVES:
        sweep(results, curve, seeds, args.steps)
    results.add("sweep", best=summary(results.rows["sweep"], seeds))
    print(sweep_table(results.rows["sweep"], seeds))
    draw(results.rows["sweep"], seeds, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
