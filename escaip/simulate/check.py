"""Checks that a potential is one: derivatives, symmetries, continuity, conservation of energy, pairs of atoms."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ase.build
import ase.data
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.data import atomic_numbers, covalent_radii
from ase.md.verlet import VelocityVerlet

from escaip.calculators import CommitteeCalculator, EScAIPCalculator
from escaip.data import AtomicData, collate
from escaip.errors import SimulationError, UsageError
from escaip.files import aligned, first_line
from escaip.potential import Potential
from escaip.simulate.ensembles import MDSettings, prepare_velocities
from escaip.testing import (
    Evaluate,
    Evaluation,
    direction_error_by_difference,
    evaluator,
    force_error_by_difference,
    permutation_error,
    rotation_errors,
    stress_error_by_difference,
    translation_error,
    wrapping_error,
)

_DISPLACEMENT = 0.03  # Å
_STEPS = 32  # of the short run
_CROSSINGS = 6  # changes of the graph looked at
_DIRECTIONS = 6  # of the Jacobian
_VACUUM = 30.0  # Å between images that a local potential does not notice
_THREADS, _EACH = 4, 3  # threads, and structures of each
_AGAIN = 20  # evaluations whose memory is compared
_MAX_ELEMENTS = 12  # whose pairs are scanned unless elements are named
_HOLE, _STEP = 0.5, 0.02  # eV and Å, of a scan of two atoms


class Tolerances(NamedTuple):
    """Errors that rounding explains."""

    energy: float  # eV per atom, between equivalent structures
    derivative: float  # relative to the largest force, at least 1 eV/Å; for stress in eV per atom
    steps: tuple[float, ...]  # Å of finite differences; the best of them counts
    jump: float  # eV, for energies; for forces 100 times as much in eV/Å
    leak: float  # meV per atom; smaller energy errors of a short run need not fall with the timestep


TOLERANCES = {
    "float64": Tolerances(energy=1e-9, derivative=1e-5, steps=(1e-4,), jump=1e-8, leak=1e-8),
    "float32": Tolerances(energy=1e-5, derivative=2e-3, steps=(1e-2, 3e-3), jump=1e-5, leak=1e-3),
    "rounded": Tolerances(energy=1e-3, derivative=0.1, steps=(5e-2,), jump=1e-3, leak=1.0),
}
"""Tolerances by the dtype of the model; "rounded" for products in TF32, float16 or bfloat16."""


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        name: quantity compared.
        value: error found; NaN fails.
        unit: empty for a number.
        limit: largest error allowed; None for information.
    """

    name: str
    value: float
    unit: str
    limit: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """``pass``, ``FAIL`` or ``info``."""
        if self.limit is None:
            return "info"
        return "pass" if self.value <= self.limit else "FAIL"


@dataclass(frozen=True)
class CheckReport:
    """Comparisons around one structure.

    Attributes:
        subject: structure and kind of model in words.
    """

    subject: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings outside of their limit."""
        return tuple(finding for finding in self.findings if finding.verdict == "FAIL")

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        findings = [{**asdict(finding), "verdict": finding.verdict} for finding in self.findings]
        return {"subject": self.subject, "findings": findings}

    def table(self) -> str:
        """Returns a table for a terminal."""
        rows = [("", "comparison", "found", "allowed", "", "")]
        for f in self.findings:
            limit = "" if f.limit is None else f"{f.limit:.0e}"
            rows.append((f.verdict, f.name, f"{f.value:.2e}", limit, f.unit, f.note))
        return "\n".join([self.subject, *aligned(rows)])

    def raise_failed(self) -> None:
        """Raises SimulationError when a comparison failed."""
        if self.failed:
            names = "; ".join(finding.name for finding in self.failed)
            raise SimulationError(
                f"{self.subject}: {len(self.failed)} of {len(self.findings)} comparisons failed: {names}: see the "
                "table; --dtype float64 takes rounding away"
            )


def default_structures(calculator: BaseCalculator) -> list[Atoms]:
    """Returns a molecule and a crystal that the calculator can evaluate, or one; raises UsageError without any."""
    molecules = [ase.build.molecule(name) for name in ("CH3CH2OH", "H2O", "N2", "O2")]
    crystals = [ase.build.bulk(name, cubic=True) for name in ("Si", "Cu", "Al", "Fe", "Li")]
    crystals += [ase.build.bulk("NaCl", "rocksalt", a=5.64), ase.build.bulk("Ar", "fcc", a=5.3, cubic=True)]
    found = []
    for candidates in (molecules, crystals):
        for atoms in candidates:
            atoms.set_initial_magnetic_moments(None)
            try:
                calculator.get_property("forces", atoms)
            except Exception:  # calculators refuse elements with any exception
                continue
            found.append(atoms)
            break
    if not found:
        raise UsageError("the calculator evaluates none of the built-in structures: give --structure FILE")
    return found


def check_calculator(
    calculator: BaseCalculator, atoms: Atoms, *, seed: int = 0, temperature: float = 300.0
) -> CheckReport:
    """Compares a calculator's answers around a structure with the demands of physics.

    The structure is displaced a little, since much vanishes in a perfect crystal. The comparisons are those of
    docs/howto/evaluate.md. Direct-force models get information instead where they promise nothing: how far forces are
    from derivatives, and the antisymmetric share of their Jacobian.

    Args:
        calculator: an ``EScAIPCalculator``, a committee, either with dispersion, or any other of ASE's.
        atoms: the structure; constraints are ignored, neither it nor its calculator is changed.
        seed: of directions, rotations and velocities.
        temperature: K, of the velocities.
    """
    check = _Check(calculator, atoms, seed)
    check.derivatives()
    check.symmetries()
    check.extensivity()
    check.threads()
    check.memory()
    if check.members:
        check.skin()
        check.crossings()
    check.conservation(seed, temperature)
    kind = f"{'conservative' if check.conservative else 'direct'} forces, {check.kind}"
    subject = f"{check.atoms.get_chemical_formula()}, {len(check.atoms)} atoms, {kind}"
    return CheckReport(subject, tuple(check.findings))


class _Check:
    """Comparisons around one structure, each of which adds its findings."""

    def __init__(self, calculator: BaseCalculator, atoms: Atoms, seed: int) -> None:
        self.findings: list[Finding] = []
        self.calculator, self.rng = calculator, np.random.default_rng(seed)
        self.atoms = atoms.copy()
        self.atoms.calc = None
        self.atoms.set_constraint()
        self.atoms.positions += self.rng.normal(scale=_DISPLACEMENT, size=atoms.positions.shape)
        self.base: Any = getattr(calculator, "calculator", calculator)  # below dispersion
        self.members: list[Potential] = list(getattr(self.base, "potentials", ()))  # none of another program's
        self.conservative = all(potential.config.is_conservative for potential in self.members)
        self.kind = "float32" if any(potential.dtype == torch.float32 for potential in self.members) else "float64"
        if any(potential.precision != "highest" for potential in self.members):
            self.kind = "rounded"
        self.limits = TOLERANCES[self.kind]
        self.evaluate = evaluator(calculator)
        self.answer = self.evaluate([self.atoms])[0]

    @functools.cached_property
    def without_skin(self) -> Evaluate:
        """The same potentials, which search for neighbors every time."""
        if isinstance(self.base, CommitteeCalculator):
            return evaluator(CommitteeCalculator(self.members, skin=0.0))
        return evaluator(EScAIPCalculator(self.members[0], skin=0.0))

    def add(self, name: str, value: float, unit: str, limit: float | None, note: str = "") -> None:
        self.findings.append(Finding(name, value, unit, limit, note))

    def derivatives(self) -> None:
        atoms, answer, steps = self.atoms, self.answer, self.limits.steps
        largest = float(np.sqrt((answer.forces**2).sum(axis=1).max()))
        limit = self.limits.derivative * max(largest, 1.0) if self.conservative else None
        seed = int(self.rng.integers(2**31))

        def smallest(error: Callable[..., float]) -> float:
            return min(error(self.evaluate, atoms, np.random.default_rng(seed), step=step) for step in steps)

        note = f"largest force {largest:.3g} eV/Å, step {' or '.join(f'{step:g}' for step in steps)} Å"
        self.add("forces: F = -dE/dr, some atoms", smallest(force_error_by_difference), "eV/Å", limit, note)
        self.add("forces: F = -dE/dr, random directions", smallest(direction_error_by_difference), "eV/Å", limit)
        if answer.stress is not None:
            error = min(stress_error_by_difference(self.evaluate, atoms, step=step) for step in steps)
            density = len(atoms) / atoms.get_volume()
            self.add("stress: finite strain", error, "eV/Å³", None if limit is None else limit * density)
        if not self.conservative:
            net = float(np.linalg.norm(answer.forces.sum(axis=0)))
            note = "0 for derivatives of an energy"
            self.add("forces: antisymmetric share of dF/dr", self.curl(steps[0]), "", None, note)
            self.add("forces: their sum", net, "eV/Å", None, "0 where momentum is conserved")

    def curl(self, step: float) -> float:
        """``‖J − Jᵀ‖ / ‖J + Jᵀ‖`` of the force Jacobian in random directions: 0 for a gradient, 1 for a pure curl."""
        size = 3 * len(self.atoms)
        directions = np.linalg.qr(self.rng.normal(size=(size, min(_DIRECTIONS, size))))[0].T

        def forces(shift: np.ndarray) -> np.ndarray:
            moved = self.atoms.copy()
            moved.positions += shift.reshape(-1, 3)
            return self.evaluate([moved])[0].forces.ravel()

        jacobian = np.array([directions @ (forces(step * d) - forces(-step * d)) / (2.0 * step) for d in directions])
        return float(np.linalg.norm(jacobian - jacobian.T) / max(np.linalg.norm(jacobian + jacobian.T), 1e-300))

    def symmetries(self) -> None:
        atoms, answer, rng = self.atoms, self.answer, self.rng

        def differences(structures: Sequence[Atoms]) -> list[Evaluation]:
            """Errors relative to the total energy would be hidden by the energies of the atoms."""
            return [replace(found, energy=found.energy - answer.energy) for found in self.evaluate(structures)]

        limit = self.limits.energy * len(atoms)
        turned = self.limits.derivative * max(float(np.abs(answer.forces).max()), 1.0) if self.conservative else None
        energy, forces = rotation_errors(differences, atoms, rng)
        self.add("energy under translation", translation_error(differences, atoms, rng), "eV", limit)
        self.add("energy under rotation", energy, "eV", limit)
        self.add("forces under rotation", forces, "eV/Å", turned)
        self.add("energy and forces under permutation", permutation_error(differences, atoms, rng), "eV, eV/Å", limit)
        if atoms.pbc.any():
            self.add("energy under re-wrapping", wrapping_error(differences, atoms, rng), "eV", limit)

    def extensivity(self) -> None:
        """Compares cells with doubled ones, and an open axis with vacuum on a periodic one."""
        atoms, energy, limit = self.atoms, self.answer.energy, self.limits.energy * len(self.atoms)
        if atoms.pbc.any():
            repeats = [tuple(np.where(np.arange(3) == axis, 2, 1)) for axis in np.flatnonzero(atoms.pbc)]
            doubled = self.evaluate([atoms.repeat(repeat) for repeat in repeats])
            worst = max(abs(found.energy - 2 * energy) for found in doubled)
            self.add("energy of a doubled cell", worst, "eV", 2 * limit)
        axes = [axis for axis in range(3) if not atoms.pbc[axis]] or [2]
        apart = atoms.copy()
        apart.center(vacuum=_VACUUM / 2, axis=axes)
        closed = apart.copy()
        apart.pbc, closed.pbc = [axis not in axes for axis in range(3)], True
        try:
            one, other = self.evaluate([apart])[0], self.evaluate([closed])[0]
        except Exception as error:  # calculators refuse what they cannot with any exception
            self.add("energy and forces: open axis, vacuum", 0.0, "", None, f"not possible: {first_line(error)}")
            return
        worst = max(abs(one.energy - other.energy), float(np.abs(one.forces - other.forces).max()))
        note = f"{_VACUUM:g} Å; long-range forces show here"
        self.add("energy and forces: open axis, vacuum", worst, "eV, eV/Å", limit, note)

    def threads(self) -> None:
        """Compares answers that several threads get of one calculator at the same time with those of one thread."""
        moved = [self.atoms.copy() for _ in range(_THREADS * _EACH)]
        for one in moved:
            one.positions += self.rng.normal(scale=_DISPLACEMENT, size=one.positions.shape)
        alone = [found.energy for found in self.evaluate(moved)]
        found: dict[int, float] = {}
        refused: list[str] = []

        def work(first: int) -> None:
            try:
                for index in range(first, len(moved), _THREADS):
                    found[index] = self.evaluate([moved[index]])[0].energy
            except Exception as error:  # whatever a calculator raises: a refusal is a sound answer
                refused.append(first_line(error))

        workers = [threading.Thread(target=work, args=(first,)) for first in range(_THREADS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        worst = max((abs(energy - alone[index]) for index, energy in found.items()), default=0.0)
        note = f"refused: {refused[0]}" if refused else "one calculator"
        limit = self.limits.energy * len(self.atoms) if self.members else None  # ASE promises nothing for others
        self.add(f"energy in {_THREADS} threads", worst, "eV", limit, note)

    def memory(self) -> None:
        """Measures how the memory of the process grows with evaluations, after a few that fill caches (Linux)."""
        statistics = Path("/proc/self/statm")
        if not statistics.exists():
            return
        moving, sizes = self.atoms.copy(), []
        for _ in range(2 * _AGAIN):
            moving.positions += self.rng.normal(scale=1e-3, size=moving.positions.shape)
            self.evaluate([moving])
            sizes.append(int(statistics.read_text("ascii").split()[1]) * 4096 / 2**20)
        self.add(f"memory over {_AGAIN} evaluations", max(sizes[_AGAIN:]) - max(sizes[:_AGAIN]), "MiB", None)

    def skin(self) -> None:
        """Compares answers on a walk that exhausts the skin several times and compresses the structure."""
        moving, worst, before = self.atoms.copy(), 0.0, self.base.num_neighbor_builds
        for _ in range(10):
            moving.set_cell(0.99 * moving.cell.array)
            moving.positions = 0.99 * moving.positions + self.rng.normal(scale=0.05, size=moving.positions.shape)
            one, other = evaluator(self.base)([moving])[0], self.without_skin([moving])[0]
            worst = max(worst, abs(one.energy - other.energy), float(np.abs(one.forces - other.forces).max()))
        exact = self.base.graph_skin == 0.0
        note = f"10 structures, {self.base.num_neighbor_builds - before} searches" + ", must be equal" * exact
        limit = 0.0 if exact else self.limits.derivative
        self.add("kept neighbors beside fresh ones", worst, "eV, eV/Å", limit, note)

    def crossings(self) -> None:
        """Measures the largest jumps where a token appears or disappears as an atom moves through the cutoff."""
        found = [pair for one in self.members for pair in _token_changes(one, *_path(self.atoms, one.cutoff))]
        answers = [self.without_skin(pair) for pair in found[: _CROSSINGS * len(self.members)]]
        if not answers:
            self.add("energy where neighbors come and go", 0.0, "eV", None, "none did on the path")
            return
        energy = max(abs(after.energy - before.energy) for before, after in answers)
        forces = max(float(np.abs(after.forces - before.forces).max()) for before, after in answers)
        note, jump = f"{len(answers)} changes of the graph", self.limits.jump
        self.add("energy where neighbors come and go", energy, "eV", jump, note)
        self.add("forces where neighbors come and go", forces, "eV/Å", 100 * jump, note)

    def conservation(self, seed: int, temperature: float) -> None:
        """Measures how the energy error falls with the timestep: to second order for Verlet, not at all for a leak.

        Where the energy surface has features finer than a step, the step is halved again.
        """
        timestep = min(0.5 * math.sqrt(float(self.atoms.get_masses().min())), 1.0)  # fs: 0.5 for hydrogen
        settings = MDSettings(temperature=temperature, velocities="draw", timestep=timestep)
        errors, order = [self.energy_error(seed, settings, 1)], 0.0
        if not self.conservative:
            self.add("energy error of a short NVE run", errors[0], "meV/atom", None, f"at {timestep:.3g} fs")
            return
        while len(errors) < 4 and order < 1.5:
            errors.append(self.energy_error(seed, settings, 2 ** len(errors)))
            order = math.log2(errors[-2] / errors[-1]) if errors[-1] > self.limits.leak else 2.0
        told = ", ".join(f"{error:.2e} at {timestep / 2**index:.3g} fs" for index, error in enumerate(errors))
        self.add("energy error, order of the timestep below 2", max(2.0 - order, 0.0), "", 0.5, f"meV/atom: {told}")

    def energy_error(self, seed: int, settings: MDSettings, parts: int) -> float:
        """Returns the root mean square change of the total energy in meV/atom, at the same times for any ``parts``."""
        moving = self.atoms.copy()
        moving.calc = self.calculator
        prepare_velocities(moving, settings, np.random.default_rng(seed))
        dynamics = VelocityVerlet(moving, settings.timestep / parts * units.fs)
        first, seen = float(moving.get_total_energy()), []
        for _ in range(_STEPS):
            dynamics.run(parts)
            seen.append(float(moving.get_total_energy()) - first)
        return 1e3 * float(np.sqrt(np.mean(np.square(seen)))) / len(moving)


def pair_elements(calculator: BaseCalculator, structures: Sequence[Atoms]) -> list[str]:
    """Returns the elements that all potentials of a calculator know; where these are many, those of the structures."""
    base: Any = getattr(calculator, "calculator", calculator)
    known = [set(potential.metadata.elements) for potential in getattr(base, "potentials", ())]
    common = set.intersection(*known) if known else set()
    if not 0 < len(common) <= _MAX_ELEMENTS:
        common = {int(number) for atoms in structures for number in atoms.numbers}
    return [ase.data.chemical_symbols[number] for number in sorted(common)]


def check_pairs(
    calculator: BaseCalculator, elements: Sequence[str], *, reach: float = 6.0, demanded: bool = False
) -> CheckReport:
    """Scans the energy of two atoms of every pair of elements, from 0.4 times the sum of their covalent radii.

    A right energy only rises as atoms approach inside a bond, has one minimum, and changes smoothly; curves that fall
    there let simulations collapse. Pairs that the calculator refuses are left out and counted.

    Args:
        calculator: any of ASE's.
        elements: symbols.
        reach: Å, the largest distance.
        demanded: whether a fall of more than 0.5 eV is a failure, and not information: few data show such pairs.

    Raises:
        UsageError: the calculator evaluates none of the pairs.
    """
    members: Sequence[Potential] = getattr(calculator, "potentials", ())
    evaluate = evaluator(members[0] if len(members) == 1 else calculator)  # a potential takes a curve at once
    curves, refused = dict[str, tuple[float, int, float]](), list[str]()
    for one, other in itertools.combinations_with_replacement(elements, 2):
        contact = covalent_radii[atomic_numbers[one]] + covalent_radii[atomic_numbers[other]]
        distances = np.arange(0.4 * contact, max(reach, contact), _STEP)
        frames = [Atoms([one, other], [[0, 0, 0], [0, 0, distance]]) for distance in distances]
        try:
            answers = evaluate(frames)
        except Exception as error:  # calculators refuse elements with any exception
            refused.append(f"{one}-{other}: {first_line(error)}")
            continue
        energies = np.array([answer.energy for answer in answers])
        inner = energies[distances < 0.9 * contact][::-1]
        outer = energies[distances >= 0.9 * contact]
        steps = np.diff(outer)
        turns = np.flatnonzero((steps[:-1] < 0) & (steps[1:] > 0)) + 1
        # A ripple is no minimum: it counts from a depth of 1 meV on, to both sides.
        deep = [k for k in turns if min(outer[:k].max(), outer[k:].max()) - outer[k] > 1e-3]
        pulls = np.array([answer.forces[1, 2] for answer in answers])[distances >= 0.9 * contact]
        fall = float((np.maximum.accumulate(inner) - inner).max(initial=0.0))
        curves[f"{one}-{other}"] = (fall, len(deep), float(np.abs(np.diff(pulls, 2)).max(initial=0.0)))
    if not curves:
        raise UsageError(f"the calculator evaluates no pair of {', '.join(elements)} ({refused[0]}): give --elements")
    falls = {pair: fall for pair, (fall, _, _) in curves.items()}
    minima = {pair: count for pair, (_, count, _) in curves.items()}
    kinks = {pair: kink for pair, (_, _, kink) in curves.items()}
    worst, many, rough = (max(found, key=found.__getitem__) for found in (falls, minima, kinks))
    several = sum(1 for count in minima.values() if count > 1)
    findings = (
        Finding("fall of the energy inside 0.9 of a bond", falls[worst], "eV", _HOLE if demanded else None, worst),
        Finding("pairs with a fall above 0.1 eV", sum(1 for fall in falls.values() if fall > 0.1), "", None),
        Finding("pairs with several minima", several, "", None, f"{many}: {minima[many]}" if several else ""),
        Finding("largest second difference of a force", kinks[rough], "eV/Å", None, f"{rough}, steps of {_STEP:g} Å"),
    )  # fmt: skip
    left = f", {len(refused)} refused ({refused[0]})" if refused else ""
    return CheckReport(f"{len(curves)} pairs of {', '.join(elements)}{left}", findings)


def _path(atoms: Atoms, cutoff: float) -> tuple[Callable[[float], Atoms], float]:
    """Returns a function from a distance in Å to a structure with one atom moved that far, and the whole distance.

    With an open axis, a further atom approaches the outermost one; otherwise the first atom approaches another.
    """
    open_axes = np.flatnonzero(~atoms.pbc)
    moving, length = atoms.copy(), 1.05 * cutoff - 1.0
    if len(open_axes):
        direction = np.eye(3)[open_axes[-1]]
        if atoms.pbc.any():  # perpendicular to the periodic axes
            direction = np.linalg.svd(atoms.cell.array[atoms.pbc])[2][-1]
        outermost = int(np.argmax(atoms.positions @ direction))
        moving += Atoms([atoms.numbers[outermost]], [atoms.positions[outermost] + 1.05 * cutoff * direction])
        index = len(moving) - 1
    else:
        moving = moving.repeat(2) if len(moving) == 1 else moving  # a single atom would not move against its images
        index, length = 0, min(length, 1.0)
        distance = moving.get_distance(0, len(moving) - 1, mic=True, vector=True)
        direction = -distance / np.linalg.norm(distance)

    def at(way: float) -> Atoms:
        placed = moving.copy()
        placed.positions[index] -= way * direction
        return placed

    return at, length


def _token_changes(potential: Potential, at: Callable[[float], Atoms], length: float) -> list[tuple[Atoms, Atoms]]:
    """Returns pairs of structures just before and after a change of the tokens, by bisection."""
    ways = np.linspace(0.0, length, 41)
    tokens = [_tokens(potential, at(way)) for way in ways]
    found: list[tuple[Atoms, Atoms]] = []
    for low, high, before, after in zip(ways[:-1], ways[1:], tokens[:-1], tokens[1:], strict=True):
        if torch.equal(before, after) or len(found) == _CROSSINGS:
            continue
        for _ in range(30):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if torch.equal(_tokens(potential, at(middle)), before) else (low, middle)
        found.append((at(low), at(high)))
    return found


def _tokens(potential: Potential, atoms: Atoms) -> torch.Tensor:
    """Returns rows that identify the tokens, in an order that does not depend on the structure's."""
    graph = potential.graph_of(collate([AtomicData.from_ase(atoms)]).to(potential.device))
    count = graph.num_tokens
    columns = [graph.token_center[:, None], graph.token_neighbor[:, None], graph.shift[:count]]
    if not potential.config.graph.soft:  # counted ranks jump without a change of tokens
        columns.append((2.0 * graph.rank_base[:, None]).long())
    return torch.cat(columns, dim=1).unique(dim=0)
