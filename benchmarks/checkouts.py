"""Compares two checkouts of the package: the same answers, in the same time?

python benchmarks/checkouts.py --old DIR [--new DIR] [--repeats 5] [--compile] [--out FILE]

Each checkout runs in processes of its own, which take turns. Answers are energies, forces and stress in float64 of the
example potentials, of random conservative and direct models and of an imported one; times are medians of force calls in
float32, plain and, with ``--compile``, compiled, and of a training step of the quickstart's model. Random models have
the weights that the new checkout draws and the settings of its presets that both know; a line names the others,
which are off. Example potentials are the checkout's own, so their answers differ where they were trained anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def structures() -> dict[str, Any]:
    import ase.build
    from ase.io import read

    silicon = ase.build.bulk("Si", cubic=True).repeat((3, 3, 3))
    copper = ase.build.bulk("Cu", cubic=True).repeat((5, 5, 5))
    for atoms in (silicon, copper):
        atoms.rattle(0.05, seed=0)
    ethanol = read(ROOT / "md" / "structures" / "ethanol.xyz")
    return {"ethanol": ethanol, "Si 216": silicon, "Cu 500": copper}


IMPORTED = {"boo_weighting": "uniform", "attention_scale": "expanded", "rank_truncation": 20, "energy_norm": False}
# Settings of each random model, and the structure that it is compared on.
RANDOM: dict[str, tuple[dict[str, Any], str]] = {
    "random 1m": ({}, "Cu 500"),
    "random 1m, direct": ({"forces": "direct"}, "Cu 500"),
    "random 1m, charge and spin": ({"charge": True, "spin": True}, "ethanol"),
    "random 1m, options of imported models": ({"distance_table": "never", **IMPORTED}, "Si 216"),
}
QUICKSTART = "model of the quickstart"


def make_models(folder: Path, known: list[str]) -> list[str]:
    """Writes settings and weights of each random model; returns the settings that are off since they are not known."""
    import torch
    import yaml

    from escaip import EScAIPConfig, Potential

    recipe = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    models = {name: {"preset": "1m", **settings} for name, (settings, _) in RANDOM.items()}
    off, left_out = EScAIPConfig().to_dict(), set[str]()
    for name, given in {**models, QUICKSTART: recipe["model"]["architecture"]}.items():
        if unknown := [key for key in given if key not in ("preset", *known)]:
            sys.exit(f"{name}: the old checkout does not know {', '.join(unknown)}: leave this model out")
        settings = EScAIPConfig.from_dict(given).to_dict()
        left_out |= {key for key, value in settings.items() if key not in known and value != off[key]}
        settings = {key: value for key, value in settings.items() if key in known}
        torch.manual_seed(0)
        potential = Potential(EScAIPConfig.from_dict(settings))
        weights = {key: value.detach() + 0.02 * torch.randn_like(value) for key, value in potential.named_parameters()}
        torch.save({"settings": settings, "weights": weights}, folder / f"{name}.pt")
    return sorted(left_out)


def random_potential(path: Path) -> Any:
    """A random model, none of whose weights has its initial value."""
    import torch

    from escaip import EScAIPConfig, Potential

    stored = torch.load(path, weights_only=True)
    potential = Potential(EScAIPConfig.from_dict(stored["settings"])).eval()
    own, given = dict(potential.named_parameters()), stored["weights"]
    shapes = [{(key, weight.shape) for key, weight in weights.items()} for weights in (own, given)]
    if other := sorted(key for key, _ in shapes[0] ^ shapes[1]):
        sys.exit(f"{path.stem}: the checkouts have other weights ({', '.join(other[:3])}): leave this model out")
    with torch.no_grad():
        for key, weight in own.items():
            weight.copy_(given[key])
    return potential


def imported_potential() -> Any:
    """The conservative model of the tests of imports."""
    import torch

    from escaip.interop import read_fairchem

    path = ROOT / "tests" / "interop" / "data" / "checkpoint_conservative.pt"
    return read_fairchem(path).to(torch.float64)


def answers(models: Path, path: Path) -> None:
    from escaip import EScAIPCalculator

    kept = structures()
    cases: dict[str, tuple[Any, str]] = {
        "organic": ("example:organic", "ethanol"), "silicon": ("example:silicon", "Si 216"),
        **{name: (random_potential(models / f"{name}.pt"), structure) for name, (_, structure) in RANDOM.items()},
        "imported": (imported_potential(), "ethanol"),
    }  # fmt: skip
    found: dict[str, np.ndarray] = {}
    for name, (model, structure) in cases.items():
        atoms = kept[structure].copy()
        atoms.calc = EScAIPCalculator(model, dtype="float64")
        found[f"{name}: energy"] = np.array(atoms.get_potential_energy())
        found[f"{name}: forces"] = atoms.get_forces()
        if atoms.pbc.all() and "direct" not in name:
            found[f"{name}: stress"] = atoms.get_stress()
    np.savez(path, **found)


def times(folder: Path, compiled: bool) -> dict[str, float]:
    """Milliseconds of each call, the median of some."""
    from escaip import EScAIPCalculator

    kept, found = structures(), {}
    cu_500 = random_potential(folder / "random 1m.pt")
    models = {"ethanol": "example:organic", "Si 216": "example:silicon", "Cu 500": cu_500}
    for name, model in models.items():
        for compile in (False, True) if compiled else (False,):
            atoms = kept[name].copy()
            atoms.calc = EScAIPCalculator(model, compile=compile)
            number = {"ethanol": 60, "Si 216": 10, "Cu 500": 8}[name]
            found[f"{name}{', compiled' if compile else ''}"] = median_ms(lambda atoms=atoms: call(atoms), number)
    found["training step"] = training_step(random_potential(folder / f"{QUICKSTART}.pt").train())
    return found


def call(atoms: Any) -> None:
    atoms.rattle(0.001, seed=int(1e6 * abs(atoms.positions[0, 0])) % 1000)
    atoms.get_forces()


def median_ms(function: Any, number: int) -> float:
    function()
    taken = []
    for _ in range(number):
        start = time.perf_counter()
        function()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def training_step(potential: Any) -> float:
    """Forces and the derivative of a loss on them, of eight molecules."""
    import itertools

    from escaip.data import collate, open_source

    batch = collate(list(itertools.islice(open_source(ROOT / "datasets" / "spice" / "sample.hdf5"), 8)))

    def step() -> None:
        potential.zero_grad()
        prediction = potential(batch, compute_forces=True, create_graph=True)
        ((prediction.forces - batch.forces).norm(dim=1).mean() + prediction.energy.mean()).backward()

    return median_ms(step, 20)


def run(root: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path)
    parser.add_argument("--new", type=Path, default=ROOT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--known", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        from escaip import EScAIPConfig

        tasks: dict[str, Any] = {
            "known": lambda: list(EScAIPConfig().to_dict()),
            "models": lambda: make_models(args.models, json.loads(args.known)),
            "answers": lambda: answers(args.models, args.out),
            "times": lambda: times(args.models, args.compile),
        }
        return print(json.dumps(tasks[args.task]()))
    roots = {"old": args.old.resolve(), "new": args.new.resolve()}
    report: dict[str, Any] = {"largest difference over largest value": {}, "ms": {}}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    with tempfile.TemporaryDirectory() as folder:
        known = run(roots["old"], "--task", "known")
        left_out = json.loads(run(roots["new"], "--task", "models", "--models", folder, "--known", known))
        report["off"] = left_out
        if left_out:
            print(f"off in random models, since the old checkout does not know them: {', '.join(left_out)}")
        for name, root in roots.items():
            run(root, "--task", "answers", "--models", folder, "--out", f"{folder}/{name}.npz")
        old, new = (np.load(f"{folder}/{name}.npz") for name in roots)
        for key in old.files:
            difference = np.abs(old[key] - new[key]).max() / np.abs(old[key]).max()
            report["largest difference over largest value"][key] = float(difference)
            print(f"{key:<50}{difference:.1e}")
        timing = ["--task", "times", "--models", folder, *(["--compile"] if args.compile else [])]
        for _ in range(args.repeats):
            for name, root in roots.items():
                taken[name].append(json.loads(run(root, *timing)))
    for key in taken["old"][0]:
        medians = {name: statistics.median(turn[key] for turn in turns) for name, turns in taken.items()}
        ratio = statistics.median(b[key] / a[key] for a, b in zip(taken["old"], taken["new"], strict=True))
        report["ms"][key] = {**medians, "ratio": ratio}
        print(f"{key:<30}old {medians['old']:8.2f}  new {medians['new']:8.2f} ms  ratio {ratio:.3f}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
