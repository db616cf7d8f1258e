"""Programs of others that take our calculator or read our files, beside our own commands doing the same.

python benchmarks/clients.py [CLIENT ...] [--environments DIR] [--torch-index URL] [--out FILE]

All clients share a throw-away environment with this package, made where there is none. Each runs in a process of its
own through its public interface, with the example potentials in float64, and is compared with what ``escaip relax``,
``eos``, ``elastic``, ``phonons`` or ASE give. A client that fails stands in the table with its error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ase.build
import ase.io
import numpy as np
from ase import Atoms, units
from common import markdown_table, provenance
from peers.environments import EnvironmentFailure, Requirement, default_folder, interpreter

from escaip import EScAIPCalculator
from escaip.cli import main as main_of_escaip
from escaip.errors import EscaipError
from escaip.files import first_line, write_file
from escaip.properties import crystal_phonons, elastic_constants, fit_equation_of_state
from escaip.simulate import relax

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {  # torch-sim 0.4 and newer need Python 3.12
    "matcalc": "0.7.0", "janus-core": "0.9.8", "geometric": "1.1.1", "torch-sim-atomistic": "0.3.0",
    "phono3py": "4.10.0", "MDAnalysis": "2.11.0", "chemiscope": "1.1.0",
}  # fmt: skip
REQUIREMENT = Requirement(("-e", str(ROOT), *(f"{name}=={version}" for name, version in VERSIONS.items())))


class Row(NamedTuple):
    """What a client did, beside what; the largest difference, or words where there is nothing to subtract."""

    did: str
    beside: str
    difference: float | str
    unit: str = ""
    allowed: float = 0.0

    def verdict(self) -> str:
        if isinstance(self.difference, str):
            return self.difference
        wrong = "" if self.difference <= self.allowed else f", **more than {self.allowed:g}**"
        return f"{self.difference:.2g} {self.unit}{wrong}"


def silicon(rattle: float = 0.0, **cell: Any) -> Atoms:
    atoms = ase.build.bulk("Si", a=5.5, **cell)
    atoms.rattle(rattle, seed=0)
    atoms.calc = EScAIPCalculator("example:silicon", "cpu", "float64")
    return atoms


def largest(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def command(*words: str) -> str:
    """Runs a program of the environment; returns what it printed, and raises with its last line where it fails."""
    program = Path(sys.executable).with_name(words[0])
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr + done.stdout).strip().splitlines() or ["nothing told"]
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {told[-1]}")
    return done.stdout


def run_matcalc() -> Iterator[Row]:
    import matcalc

    atoms = silicon(0.05)
    calculator = atoms.calc
    found = matcalc.RelaxCalc(calculator, fmax=1e-4).calc(atoms)
    ours = relax(atoms, fmax=1e-4, cell=True).atoms
    yield Row("`RelaxCalc`", "`escaip relax --cell`", largest(found["energy"], ours.get_potential_energy()), "eV", 1e-6)
    yield Row("the same, volume", "", largest(found["volume"], ours.get_volume()), "Å³", 1e-2)
    eos = matcalc.EOSCalc(calculator, max_abs_strain=0.02, fmax=1e-3, allow_shape_change=False).calc(ours)
    modulus = fit_equation_of_state(ours).bulk_modulus
    yield Row("`EOSCalc`, bulk modulus", "`escaip eos`", largest(eos["bulk_modulus_bm"], modulus), "GPa", 0.5)
    settings = {"norm_strains": (-0.005, 0.005), "shear_strains": (-0.005, 0.005), "fmax": 1e-3}
    elasticity = matcalc.ElasticityCalc(calculator, relax_deformed_structures=True, units_GPa=True, **settings)
    cubic = ours.copy()
    tensor = elasticity.calc(cubic)["elastic_tensor"].voigt
    stiffness = elastic_constants(ours, symmetrize=False).stiffness
    yield Row("`ElasticityCalc`, stiffness", "`escaip elastic`", largest(tensor, stiffness), "GPa", 2.0)


def run_janus_core() -> Iterator[Row]:
    from janus_core.calculations.geom_opt import GeomOpt
    from janus_core.calculations.single_point import SinglePoint

    atoms, ours = silicon(0.05, cubic=True), silicon(0.05, cubic=True)
    wanted = ("energy", "forces", "stress", "hessian")
    results = SinglePoint(struct=atoms, properties=wanted).run()
    hessian = np.reshape(results.pop("hessian"), (24, 24))
    same = {"energy": ours.get_potential_energy(), "forces": ours.get_forces(), "stress": ours.get_stress()}
    difference = max(largest(results[name], value) for name, value in same.items())
    yield Row("`SinglePoint`: energy, forces, stress", "ASE", difference, "eV, eV/Å, eV/Å³", 1e-12)
    yield Row("the same, Hessian", "`get_hessian`", largest(hessian, ours.calc.get_hessian(ours)), "eV/Å²", 1e-9)
    GeomOpt(struct=atoms, fmax=1e-4).run()
    ours = relax(ours, fmax=1e-4, cell=True).atoms
    energies = [one.get_potential_energy() for one in (atoms, ours)]
    yield Row("`GeomOpt` with the cell", "`escaip relax --cell`", largest(*energies), "eV", 1e-6)
    ase.io.write("start.cif", ours)
    try:
        command("janus", "singlepoint", "--arch", "escaip", "--struct", "start.cif")
    except RuntimeError:
        words = (
            "not possible: its commands know a list of architectures; from Python it takes atoms with any calculator"
        )
        yield Row("`janus singlepoint --arch escaip`", "", words)


def run_geometric() -> Iterator[Row]:
    ammonium = ase.build.molecule("CH4")
    ammonium.symbols[0] = "N"
    for name, atoms, charge in (("ethanol", ase.build.molecule("CH3CH2OH"), 0), ("ammonium", ammonium, 1)):
        atoms.rattle(0.05, seed=0)
        ase.io.write("start.xyz", atoms, format="xyz")
        given = json.dumps({"model": "example:organic", "device": "cpu", "dtype": "float64", "charge": charge})
        command(
            "geometric-optimize", "start.xyz", "--engine", "ase", "--ase-class", "escaip.EScAIPCalculator",
            "--ase-kwargs", given, "--converge", "set", "GAU_TIGHT",
        )  # fmt: skip
        last = ase.io.read("start_optim.xyz", index=-1)
        last.calc = atoms.calc = EScAIPCalculator("example:organic", "cpu", "float64", charge=charge)
        energies = [one.get_potential_energy() for one in (last, relax(atoms, fmax=1e-4).atoms)]
        told = float(Path("start_optim.xyz").read_text("utf-8").splitlines()[-len(last) - 1].split()[-1])
        yield Row(
            f"`geometric-optimize`, {name}, charge {charge}", "`escaip relax --charge`", largest(*energies), "eV", 1e-5
        )
        yield Row("the same, the energy that it wrote", "ASE", largest(told * units.Ha, energies[0]), "eV", 1e-5)


def run_torch_sim() -> Iterator[Row]:
    import torch
    from torch_sim.models.interface import validate_model_outputs

    from escaip.calculators.torchsim import EScAIPModel

    sys.path.append(str(ROOT / "tests"))
    from tiny import make_potential

    for forces in ("conservative", "direct"):
        model = EScAIPModel(make_potential(forces=forces), "cpu")
        validate_model_outputs(model, torch.device("cpu"), torch.float64)
        yield Row(f"`validate_model_outputs`, random weights, {forces} forces", "its own checks", "passed")
    try:
        validate_model_outputs(EScAIPModel("example:silicon", "cpu"), torch.device("cpu"), torch.float64)
    except EscaipError as error:
        yield Row("the same, `example:silicon`", "", f"refused, since it evaluates Si and Fe: “{first_line(error)}”")


def run_phonopy() -> Iterator[Row]:
    import phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    start = relax(silicon(), fmax=1e-5, cell=True).atoms
    cell = PhonopyAtoms(symbols=start.symbols, cell=start.cell.array, scaled_positions=start.get_scaled_positions())
    phonon = phonopy.Phonopy(cell, supercell_matrix=[2, 2, 2], primitive_matrix="P")
    phonon.generate_displacements(distance=0.01)
    phonon.forces = [forces_of(one, start.calc) for one in phonon.supercells_with_displacements]
    phonon.produce_force_constants()
    ours = crystal_phonons(start, relaxation="none", supercell=(2, 2, 2), hessian=True, mesh=10.0)
    pairs = [(phonon.get_frequencies(q), ours.frequencies(q)) for q in ([0, 0, 0], [0.5, 0, 0.5], [0.5, 0.5, 0.5])]
    difference = max(largest(*pair) for pair in pairs)
    yield Row("phonopy: displaced supercells, Γ, X, L", "`escaip phonons --hessian`", difference, "THz", 0.05)

    from phono3py import Phono3py

    third = Phono3py(cell, supercell_matrix=[2, 2, 2], primitive_matrix="P")
    third.generate_displacements(distance=0.01)  # as phonopy
    third.forces = [forces_of(one, start.calc) for one in third.supercells_with_displacements]
    third.produce_fc2()
    third.produce_fc3()
    count = len(third.forces)
    constants = phonon.force_constants[third.primitive.p2s_map]  # rows of the primitive cell, as in fc2
    yield Row(
        f"phono3py: {count} displaced supercells, fc2", "phonopy's force constants", largest(third.fc2, constants),
        "eV/Å²", 0.02 * float(np.abs(constants).max()),
    )  # fmt: skip
    worst = float(np.abs(third.fc3.sum(axis=1)).max() / np.abs(third.fc3).max())
    yield Row("the same, fc3: sum over the second atom", "0", worst, "of the largest entry", 0.02)


def forces_of(supercell: Any, calculator: EScAIPCalculator) -> np.ndarray:
    atoms = Atoms(supercell.symbols, scaled_positions=supercell.scaled_positions, cell=supercell.cell, pbc=True)
    return np.asarray(calculator.get_forces(atoms))


@cache
def written() -> dict[str, list[Atoms]]:
    """Trajectories that ``escaip md`` writes, a molecule and a crystal, as ASE reads them."""
    found = {}
    for model, structure in (("organic", "ethanol"), ("silicon", "Si")):
        for suffix in ("xyz", "traj"):
            name = f"{structure}.{suffix}"
            settings = "--steps 20 --interval 5 --timestep 1 --seed 1 --quiet --out"
            status = main_of_escaip(["md", f"example:{model}", f"example:{structure}", *settings.split(), name])
            assert status == 0, status
            found[name] = ase.io.read(name, index=":")
            Path(f"{structure}.csv").unlink()  # of this run; the other format is another run
            Path(f"{structure}.restart.npz").unlink()
    return found


def run_ase() -> Iterator[Row]:
    for name in ("ethanol", "Si"):
        pairs = list(zip(written()[f"{name}.traj"], written()[f"{name}.xyz"], strict=True))
        assert all(one.info == other.info for one, other in pairs)
        worst = 0.0
        for get in (
            Atoms.get_positions,
            Atoms.get_cell,
            Atoms.get_momenta,
            Atoms.get_forces,
            Atoms.get_potential_energy,
        ):
            worst = max(worst, *(largest(get(one), get(other)) for one, other in pairs))
        yield Row(f"`ase.io.read`, {len(pairs)} frames of {name}, extended XYZ", "traj", worst, "", 1e-7)


def run_mdanalysis() -> Iterator[Row]:
    import MDAnalysis

    ours = written()["ethanol.traj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        universe, crystal = MDAnalysis.Universe("ethanol.xyz", dt=0.005), MDAnalysis.Universe("Si.xyz")
    steps = [(step.positions.copy(), step.time) for step in universe.trajectory]
    worst = largest([step[0] for step in steps], [frame.positions for frame in ours])
    yield Row('`Universe("run.xyz", dt=0.005)`, positions', "ASE", worst, "Å", 1e-5)
    worst = largest([step[1] for step in steps], [frame.info["time_fs"] / 1000 for frame in ours])
    yield Row("the same, times", "`time_fs`", worst, "ps", 1e-9)
    same = list(universe.atoms.elements) == list(ours[0].symbols)
    yield Row("the same, elements", "ASE", "the same" if same else "**others**")
    cell = "not read: set `dimensions`" if crystal.dimensions is None else f"{crystal.dimensions}"
    yield Row("the same, cell of a crystal", "–", cell)


def run_chemiscope() -> Iterator[Row]:
    import chemiscope

    for name, frames in written().items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            properties = chemiscope.extract_properties(frames)
            chemiscope.write_input(f"{name}.json", frames, properties=properties)
        content = json.loads(Path(f"{name}.json").read_text("utf-8"))
        values = content["properties"]["energy"]["values"]
        worst = largest(values, [frame.get_potential_energy() for frame in frames])
        yield Row(f"`write_input`, {name}: energies", "ASE", worst, "eV", 1e-9)
        shown = [np.transpose([one[axis] for axis in "xyz"]) for one in content["structures"]]
        yield Row("the same, positions", "ASE", largest(shown, [frame.positions for frame in frames]), "Å", 1e-9)


CLIENTS: dict[str, dict[str, Callable[[], Iterator[Row]]]] = {
    "matcalc": {"matcalc": run_matcalc},
    "janus": {"janus-core": run_janus_core},
    "geometric": {"geometric": run_geometric},
    "torch-sim": {"torch-sim-atomistic": run_torch_sim},
    "phonopy": {"phono3py": run_phonopy},
    "files": {"ase": run_ase, "MDAnalysis": run_mdanalysis, "chemiscope": run_chemiscope},
}


def rows_of(name: str) -> list[list[str]]:
    """Runs a client in this process, in a folder of its own; returns its rows of the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for package, function in CLIENTS[name].items():
            head = f"{package} {importlib.metadata.version(package)}"
            try:
                for row in function():
                    rows.append([head, row.did, row.beside or "–", row.verdict()])
            except Exception as error:
                rows.append([head, "the next step", "–", f"**failed: {type(error).__name__}: {first_line(error)}**"])
        os.chdir("/")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", help=f"default: {' '.join(CLIENTS)}")
    parser.add_argument("--environments", type=Path, default=default_folder(), help="where the environment is made")
    parser.add_argument("--torch-index", help="a package index with builds of PyTorch for the CPU, beside pip's own")
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # in the environment: where to write the rows
    args = parser.parse_args()
    unknown = set(args.clients) - set(CLIENTS)
    if unknown:
        parser.error(f"no client {', '.join(sorted(unknown))}: choose of {' '.join(CLIENTS)}")
    if args.here:
        args.here.write_text(json.dumps(rows_of(args.clients[0])), encoding="utf-8")
        return
    try:
        python = interpreter("clients", args.environments, args.torch_index, REQUIREMENT)
    except EnvironmentFailure as error:
        raise SystemExit(str(error)) from error
    rows: list[list[str]] = []
    for name in args.clients or CLIENTS:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "rows.json"
            done = subprocess.run([python, __file__, name, "--here", answer], capture_output=True, text=True)
            if done.returncode:
                rows.append([name, "start", "–", f"**failed: {(done.stderr.splitlines() or ['nothing told'])[-1]}**"])
            else:
                rows += json.loads(answer.read_text("utf-8"))
        print(f"{name}: {len(rows)} rows so far", flush=True)
    table = markdown_table(["client", "did", "beside", "largest difference"], rows)
    if args.out:
        head = ", ".join(f"{key} {value}" for key, value in provenance().items())
        write_file(args.out, f"# Programs of others\n\n{str(__doc__).split(chr(10), 4)[4]}\n{head}\n\n{table}\n")
    if any("**" in row[-1] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
