"""Runs jobs with one calculator: a program of its own for any Python that has ASE.

It imports nothing of the package. The first line of standard input names the calculator, every further line is a job,
and every line of standard output answers one; all are JSON. What a calculator prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from importlib import metadata
from typing import Any

import numpy as np
from ase import Atoms, units

_SCAN = (0.9, 0.95, 1.0, 1.06, 1.13, 1.22, 1.35, 1.5)  # factors on the lengths of a crystal that is relaxed


class Unusable(Exception):
    """A frame that is no label; says why."""


def main() -> None:
    """Answers lines until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    setup = json.loads(sys.stdin.readline())
    try:
        calculator: Any = pkgutil.resolve_name(setup["calculator"])
        if isinstance(calculator, type) or not hasattr(calculator, "get_potential_energy"):
            calculator = calculator(**setup["arguments"])
    except BaseException as error:  # somebody else's module raises anything
        answer({"error": _line(error)})
        return
    answer({"version": _version(setup["calculator"])})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer({"key": job["key"], **run(job, calculator)})
        except Exception as error:
            answer({"key": job["key"], "frames": [], "error": _line(error)})


def run(job: dict[str, Any], calculator: Any) -> dict[str, Any]:
    """Runs a job; its ``kind`` is ``label``, ``relax`` or ``dynamics``."""
    atoms = Atoms(job["numbers"], job["positions"], cell=job["cell"], pbc=job["pbc"])
    atoms.info = {"charge": job["charge"], "spin": job["spin"], "spin_multiplicity": job["spin"]}
    # Calculators of ASE's own kind read them here.
    atoms.set_initial_charges([job["charge"]] + [0.0] * (len(atoms) - 1))
    atoms.set_initial_magnetic_moments([job["spin"] - 1.0] + [0.0] * (len(atoms) - 1))
    if hasattr(calculator, "reset"):
        calculator.reset()  # no start from the structure before: answers depend on the job alone
    atoms.calc = calculator
    frames = _Frames(job["max_force"], job["max_stress"])
    try:
        {"label": _label, "relax": _relax, "dynamics": _dynamics}[job["kind"]](atoms, frames, job)
    except Unusable as error:
        frames.dropped += 1
        if not frames.kept:
            return {"frames": [], "dropped": frames.dropped, "error": str(error)}
        frames.ended = str(error)
    except Exception as error:
        if not frames.kept:
            raise
        frames.ended = _line(error)  # what was labelled before is sound
    return {"frames": frames.kept, "dropped": frames.dropped, "ended": frames.ended}


class _Frames:
    def __init__(self, max_force: float, max_stress: float) -> None:
        self.max_force, self.max_stress = max_force, max_stress
        self.kept, self.dropped, self.ended = list[dict[str, Any]](), 0, ""

    def add(self, atoms: Any) -> None:
        """Keeps the labels of a frame, or raises Unusable."""
        forces = np.asarray(atoms.get_forces(), dtype=float)
        energy = float(atoms.get_potential_energy())
        results = getattr(atoms.calc, "results", {})
        energy = float(results.get("free_energy", energy))  # the one that forces are derivatives of
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise Unusable("the calculator's energy or forces are not finite")
        if getattr(atoms.calc, "converged", True) is False:
            raise Unusable("the calculator has not converged")
        if (largest := float(np.linalg.norm(forces, axis=1).max())) > self.max_force:
            raise Unusable(f"a force of {largest:.3g} eV/Å is above max_force, {self.max_force:g}")
        frame = {"positions": atoms.positions.tolist(), "energy": energy, "forces": forces.tolist()}
        if atoms.pbc.any():
            frame["cell"] = atoms.cell.array.tolist()
            if (stress := _stress(atoms)) is not None:
                if (largest := max(map(abs, stress))) > self.max_stress:
                    raise Unusable(f"a stress of {largest:.3g} eV/Å³ is above max_stress, {self.max_stress:g}")
                frame["stress"] = stress
        self.kept.append(frame)

    def try_add(self, atoms: Any) -> float:
        """Keeps a frame where it can be kept; returns its energy, or infinity."""
        try:
            self.add(atoms)
        except Exception:
            self.dropped += 1
            return float("inf")
        return float(self.kept[-1]["energy"])


def _stress(atoms: Any) -> list[float] | None:
    try:
        stress = np.asarray(atoms.get_stress(), dtype=float)
    except NotImplementedError:  # ASE's PropertyNotImplementedError is one
        return None
    if not np.isfinite(stress).all():
        raise Unusable("the calculator's stress is not finite")
    return list(map(float, stress))


def _label(atoms: Any, frames: _Frames, job: dict[str, Any]) -> None:
    frames.add(atoms)


def _relax(atoms: Any, frames: _Frames, job: dict[str, Any]) -> None:
    """Scans the size of a crystal, then relaxes positions and cell; frames on the way are kept, the last one last."""
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS

    movable, crystal = atoms, bool(atoms.pbc.all())
    if crystal:
        cell, energies = atoms.cell.array.copy(), []
        for factor in _SCAN:
            atoms.set_cell(cell * factor, scale_atoms=True)
            energies.append(frames.try_add(atoms))
        if not np.isfinite(energies).any():
            raise Unusable("no size of the crystal has a usable energy")
        best = _valley(energies)
        atoms.set_cell(cell * _SCAN[best], scale_atoms=True)
        movable = FrechetCellFilter(atoms)
        # The relaxation begins at this frame and keeps it once more.
        frames.kept.pop(int(np.isfinite(energies[:best]).sum()))
    begun = len(frames.kept)
    optimizer = BFGS(movable, logfile=None, maxstep=0.1)
    optimizer.attach(lambda: frames.add(atoms), interval=1)
    try:
        optimizer.run(fmax=job["fmax"], steps=job["steps"])
    except Unusable as error:  # it leads to where the calculator means nothing: what it began at is taken
        frames.ended, frames.dropped = str(error), frames.dropped + 1
        frames.kept[begun:] = frames.kept[begun : begun + 1]
        return
    way = frames.kept[begun:-1]
    wanted = sorted({round(index) for index in np.linspace(0, len(way) - 1, min(len(way), 6))}) if way else []
    frames.kept[begun:-1] = [way[index] for index in wanted]


def _valley(energies: list[float]) -> int:
    """Returns the deepest inner minimum of a scan, or its lowest point: some calculators fall without end."""
    inner = [k for k in range(1, len(energies) - 1) if np.inf > energies[k - 1] > energies[k] < energies[k + 1]]
    return min(inner or range(len(energies)), key=lambda k: energies[k])


def _dynamics(atoms: Any, frames: _Frames, job: dict[str, Any]) -> None:
    from ase.md.langevin import Langevin
    from ase.optimize import BFGS

    rng = np.random.default_rng(job["seed"])
    if job["relax"]:
        BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.5, steps=job["relax"])
    thermal = np.sqrt(atoms.get_masses()[:, None] * units.kB * job["temperature"])
    atoms.set_momenta(thermal * rng.normal(size=(len(atoms), 3)))
    dynamics = Langevin(
        atoms, job["timestep"] * units.fs, temperature_K=job["temperature"], friction=0.02 / units.fs, rng=rng,
        fixcm=False,
    )  # fmt: skip
    for _ in range(job["frames"]):
        dynamics.run(job["every"])
        frames.add(atoms)


def _version(calculator: str) -> str:
    """Returns name and version of the distribution that a module comes from."""
    module = calculator.partition(":")[0].partition(".")[0]
    try:
        name = metadata.packages_distributions()[module][0]
        return f"{name} {metadata.version(name)}"
    except (KeyError, metadata.PackageNotFoundError):
        return module


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


if __name__ == "__main__":
    main()
