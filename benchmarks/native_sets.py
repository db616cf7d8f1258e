"""Each data set from native files to errors on what was held out, by the commands that a user types.

    python benchmarks/native_sets.py [--minutes 3] [--trajectories FOLDER] [--out results.json]

The samples that come with the cards of OC20, OC22, SPICE and MPTrj are prepared, trained on with the small recipes for
some minutes, and evaluated on other structures of the same systems. With ``--trajectories`` relaxations of OC20 are
written in its raw layout first, systems held out whole, each with the energy of its last frame as reference:
adsorption-style energies. Results are written after every set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import markdown_table, provenance, write_json
from real_data_sets import SETS, assign_parts

from escaip.data import AtomicData, open_source

SAMPLES: dict[str, list[str]] = {
    "oc20": ["dataset:oc20/sample", "--set", "energy=adsorption"],
    "oc22": ["dataset:oc22/sample"],
    "spice": ["dataset:spice/sample.hdf5"],
    "mptrj": ["dataset:mptrj/sample.json", "--set", "energy=uncorrected"],
}
MAX_FORCE = 10.0


def run(arguments: list[str], folder: Path) -> str:
    """An ``escaip`` command; returns it as typed.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "escaip", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"escaip {' '.join(arguments)}\n{done.stderr.strip().splitlines()[-1]}")
    return f"escaip {' '.join(arguments)}"


def train_and_evaluate(name: str, sources: list[str], minutes: float, folder: Path) -> dict[str, Any]:
    """Prepares, fits, evaluates on the test split; free atoms only where some are fixed."""
    folder.mkdir(parents=True, exist_ok=True)
    wall = f"00:00:{int(minutes):02d}:{int(60 * minutes) % 60:02d}"
    free = ["--free-atoms"] if name.startswith("oc") else []
    store = f"stores/{name}"
    commands = [
        run(["data", "prepare", name, *sources, "--out", store], folder),
        run(["fit", "--config", f"{name}_small", "--data.train", store, "--trainer.max_time", wall,
             "--trainer.max_epochs", "1000", "--evaluation.max_structures", "0"], folder),
        run(["evaluate", f"runs/{name}_small/latest/best.ckpt", store, "--set", "split=test", "--no-plots",
             "--out", f"evaluation/{name}", *free], folder),
    ]  # fmt: skip
    report = json.loads((folder / "evaluation" / name / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads((folder / store / "manifest.json").read_text(encoding="utf-8"))
    return {"commands": commands, "splits": manifest["splits"], "read": manifest["read"], "report": report}


def write_raw(structures: list[AtomicData], last: dict[str, float], path: Path) -> None:
    """OC20's raw layout: frames, and lines of system, frame and reference energy."""
    lines, references = [], []
    for number, data in enumerate(structures):
        atoms = data.to_ase()
        cell = " ".join(f"{value:.8f}" for value in data.cell.flatten().tolist())
        lines.append(str(len(atoms)))
        lines.append(
            f'Lattice="{cell}" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3 '
            f'energy={float(data.energy):.8f} free_energy={float(data.energy):.8f} pbc="T T T"'
        )
        for symbol, place, fixed, tag, force in zip(
            atoms.symbols, data.positions.tolist(), data.fixed.tolist(), data.tags.tolist(), data.forces.tolist(),
            strict=True,
        ):  # fmt: skip
            numbers = " ".join(f"{value:.8f}" for value in place)
            pulls = " ".join(f"{value:.8f}" for value in force)
            lines.append(f"{symbol} {numbers} {'F' if fixed else 'T'} {tag} {pulls}")
        references.append(f"{data.group.removesuffix('.traj')},frame{number},{last[data.group]:.8f}")
    path.mkdir(parents=True)
    (path / "0.extxyz").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (path / "0.txt").write_text("\n".join(references) + "\n", encoding="utf-8")


def relaxations(trajectories: Path, folder: Path) -> list[str]:
    """The trajectories in OC20's raw layout, by split; returns the sources to prepare."""
    structures = list(open_source(str(trajectories / "*.traj"), group_by="file"))
    last = {data.group: float(data.energy) for data in structures}  # frames come in order
    parts = assign_parts(structures, SETS["oc20_direct"])
    sources = []
    for part in ("train", "val", "test"):
        chosen = [data for data, where in zip(structures, parts, strict=True) if where == part]
        write_raw(chosen, last, folder / "raw" / part)
        sources.append(f"{part}=raw/{part}")
    return [*sources, "--set", "energy=adsorption", "--max-force", str(MAX_FORCE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, each (default: 3)")
    parser.add_argument("--only", choices=sorted(SAMPLES), action="append", help="default: all")
    parser.add_argument("--trajectories", type=Path, help="folder of OC20 relaxations (.traj), also trained on")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    work = {name: SAMPLES[name] for name in options.only or SAMPLES}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, source in work.items():
            sources = [*source, "--val", "0.1", "--test", "0.1", "--split-by", "structure"]
            results[f"{name} sample"] = train_and_evaluate(name, sources, options.minutes, Path(place) / name)
            keep(results, options.out)
        if options.trajectories:
            folder = Path(place) / "relaxations"
            sources = relaxations(options.trajectories.resolve(), folder)
            results["oc20 relaxations"] = train_and_evaluate("oc20", sources, options.minutes, folder)
            keep(results, options.out)
    print(report_table(results))


def keep(results: dict[str, Any], out: Path | None) -> None:
    """Writes what is there so far."""
    if out is not None:
        write_json(out, {"provenance": provenance(), "results": results})


def report_table(results: dict[str, Any]) -> str:
    """One line for each set."""
    rows = []
    for name, result in results.items():
        report = result["report"]
        energy, forces = report["energy_per_atom"], report["forces"]
        row = [name, "/".join(str(count) for count in result["splits"].values())]
        for errors, baseline in ((energy, "references"), (forces, "zero")):
            row += [f"{1e3 * errors['errors']['mae']:.3g}", f"{1e3 * errors['baselines'][baseline]['mae']:.3g}"]
        threshold = report["energy_forces_within_threshold"]
        rows.append([*row, "–" if threshold is None else f"{100 * threshold:.1f}"])
    header = ["set", "train/val/test", "energy, meV/atom", "references", "forces, meV/Å", "zero", "EFwT, %"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
