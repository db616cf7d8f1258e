"""Physics contracts for any potential: invariances, forces and stress as derivatives, independence of batching.

Every check takes an ``Evaluate`` function, made by ``evaluator`` of an escaip ``Potential`` or of
an ASE calculator, and returns the largest error it finds. ``check_potential`` runs them and compares the errors
with tolerances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from scipy.spatial.transform import Rotation

from escaip.data import AtomicData, collate
from escaip.potential import Potential


@dataclass(frozen=True)
class Evaluation:
    """Energy, forces and stress of one structure.

    Attributes:
        energy: eV.
        forces: ``(n, 3)`` eV/Å.
        stress: ``(3, 3)`` eV/Å³, positive in tension; None without a periodic cell.
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None


Evaluate = Callable[[Sequence[Atoms]], list[Evaluation]]


@dataclass(frozen=True)
class Check:
    """Outcome of one contract.

    Attributes:
        name: structure and contract.
        error: the largest error found; relative for energies, eV/Å for forces, eV/Å³ for stress.
        tolerance: largest error allowed.
    """

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def evaluator(potential: Potential | BaseCalculator) -> Evaluate:
    """Wraps a ``Potential`` or an ASE calculator as a function of structures."""
    if isinstance(potential, Potential):
        return lambda structures: _evaluate_potential(potential, structures)
    return lambda structures: [_evaluate_calculator(potential, atoms) for atoms in structures]


def check_potential(
    potential: Potential | BaseCalculator,
    structures: Sequence[Atoms],
    *,
    seed: int = 0,
    energy_tolerance: float = 1e-10,
    derivative_tolerance: float = 1e-6,
    rotation: bool = True,
) -> list[Check]:
    """Runs every contract that applies to the structures, and raises where any of them fails.

    Args:
        potential: an escaip potential (in float64 for the default tolerances) or an ASE calculator.
        structures: at least one. Periodic ones also test re-wrapping, stress and supercells.
        seed: of random rotations, permutations and displacements.
        energy_tolerance: relative.
        derivative_tolerance: in eV/Å and eV/Å³.
        rotation: False for models that are not rotation-equivariant, such as direct-force heads.

    Returns:
        All checks, every one passed.

    Raises:
        AssertionError: at least one check failed; the message lists each with its error and tolerance.
    """
    evaluate = evaluator(potential)
    rng = np.random.default_rng(seed)
    checks: list[Check] = []
    for atoms in structures:
        name = atoms.get_chemical_formula()
        if rotation:
            energy_error, force_error = rotation_errors(evaluate, atoms, rng)
            checks.append(Check(f"{name}: energy under rotation", energy_error, energy_tolerance))
            checks.append(Check(f"{name}: forces under rotation", force_error, derivative_tolerance))
        checks.append(Check(f"{name}: translation", translation_error(evaluate, atoms, rng), energy_tolerance))
        checks.append(Check(f"{name}: permutation", permutation_error(evaluate, atoms, rng), energy_tolerance))
        checks.append(
            Check(f"{name}: F = -dE/dr", force_error_by_difference(evaluate, atoms, rng), derivative_tolerance)
        )
        if atoms.pbc.any():
            checks.append(Check(f"{name}: re-wrapping", wrapping_error(evaluate, atoms, rng), energy_tolerance))
            checks.append(Check(f"{name}: supercell", supercell_error(evaluate, atoms), energy_tolerance))
        if atoms.pbc.all():
            checks.append(Check(f"{name}: stress", stress_error_by_difference(evaluate, atoms), derivative_tolerance))
    checks.append(Check("batching", batching_error(evaluate, structures), energy_tolerance))
    failed = [check for check in checks if not check.passed]
    if failed:
        lines = [f"{check.name}: error {check.error:.3e} above {check.tolerance:.0e}" for check in failed]
        raise AssertionError("; ".join(lines))
    return checks


def rotation_errors(evaluate: Evaluate, atoms: Atoms, rng: np.random.Generator) -> tuple[float, float]:
    """Returns the relative energy error and the force error in eV/Å under a random rotation."""
    matrix = Rotation.random(random_state=rng).as_matrix()
    rotated = atoms.copy()
    rotated.set_cell(atoms.cell.array @ matrix.T)
    rotated.set_positions(atoms.positions @ matrix.T)
    before, after = evaluate([atoms])[0], evaluate([rotated])[0]
    return _relative(before.energy, after.energy), _largest(after.forces - before.forces @ matrix.T)


def translation_error(evaluate: Evaluate, atoms: Atoms, rng: np.random.Generator) -> float:
    """Returns the relative energy error when all atoms move by the same random vector."""
    moved = atoms.copy()
    moved.positions += rng.normal(scale=3.0, size=3)
    return _relative(evaluate([atoms])[0].energy, evaluate([moved])[0].energy)


def permutation_error(evaluate: Evaluate, atoms: Atoms, rng: np.random.Generator) -> float:
    """Returns the larger relative error of energy and forces when atoms change order."""
    order = rng.permutation(len(atoms))
    if (order == np.arange(len(atoms))).all():
        order = order[::-1]
    before, after = evaluate([atoms])[0], evaluate([atoms[order]])[0]
    scale = max(_largest(before.forces), 1.0)
    return max(_relative(before.energy, after.energy), _largest(after.forces - before.forces[order]) / scale)


def wrapping_error(evaluate: Evaluate, atoms: Atoms, rng: np.random.Generator) -> float:
    """Returns the relative energy error when atoms move by whole lattice vectors along periodic axes."""
    unwrapped = atoms.copy()
    jumps = rng.integers(-3, 4, size=(len(atoms), 3)) * atoms.pbc
    unwrapped.positions += jumps @ atoms.cell.array
    return _relative(evaluate([atoms])[0].energy, evaluate([unwrapped])[0].energy)


def supercell_error(evaluate: Evaluate, atoms: Atoms) -> float:
    """Returns the relative error of ``E(supercell) = n·E(cell)``, doubled along each periodic axis and along all."""
    energy = evaluate([atoms])[0].energy
    repeats = [tuple(2 if axis == i else 1 for axis in range(3)) for i in range(3) if atoms.pbc[i]]
    repeats.append(tuple(2 if periodic else 1 for periodic in atoms.pbc))
    return max(
        _relative(int(np.prod(repeat)) * energy, evaluate([atoms.repeat(repeat)])[0].energy) for repeat in repeats
    )


def batching_error(evaluate: Evaluate, structures: Sequence[Atoms]) -> float:
    """Returns the relative energy error between structures evaluated alone and together."""
    together = evaluate(structures)
    return max(
        _relative(evaluate([atoms])[0].energy, answer.energy)
        for atoms, answer in zip(structures, together, strict=True)
    )


def force_error_by_difference(
    evaluate: Evaluate, atoms: Atoms, rng: np.random.Generator, num_components: int = 12, step: float = 1e-4
) -> float:
    """Returns the largest difference in eV/Å between forces and fourth-order central differences of the energy."""
    forces = evaluate([atoms])[0].forces
    components = rng.choice(forces.size, size=min(num_components, forces.size), replace=False)
    worst = 0.0
    for component in components:
        direction = np.zeros(forces.size)
        direction[component] = 1.0
        worst = max(worst, _force_error_along(evaluate, atoms, forces, direction.reshape(-1, 3), step))
    return worst


def direction_error_by_difference(
    evaluate: Evaluate, atoms: Atoms, rng: np.random.Generator, num_directions: int = 4, step: float = 1e-4
) -> float:
    """Returns the error of ``force_error_by_difference`` when all atoms move along random unit vectors, in eV/Å."""
    forces = evaluate([atoms])[0].forces
    worst = 0.0
    for _ in range(num_directions):
        direction = rng.normal(size=forces.shape)
        direction /= np.linalg.norm(direction)
        worst = max(worst, _force_error_along(evaluate, atoms, forces, direction, step))
    return worst


def stress_error_by_difference(evaluate: Evaluate, atoms: Atoms, step: float = 1e-4) -> float:
    """Returns the largest difference in eV/Å³ between the stress and finite symmetric strains."""
    stress = evaluate([atoms])[0].stress
    if stress is None:
        return float("nan")
    worst = 0.0
    for i in range(3):
        for j in range(i, 3):

            def strained(amount: float, i: int = i, j: int = j) -> Atoms:
                deformation = np.eye(3)
                deformation[i, j] += 0.5 * amount
                deformation[j, i] += 0.5 * amount
                copy = atoms.copy()
                copy.set_cell(atoms.cell.array @ deformation)
                copy.set_positions(atoms.positions @ deformation)
                return copy

            worst = max(worst, abs(stress[i, j] - _derivative(evaluate, strained, step) / atoms.get_volume()))
    return worst


def continuity_error(evaluate: Evaluate, path: Sequence[Atoms]) -> tuple[float, float]:
    """Returns the largest jump in energy (eV) and in a force component (eV/Å) along a path of small equal steps.

    The second difference of a smooth function over three neighboring points is of the order of the step squared, and
    contains a jump in full.
    """
    answers = evaluate(path)
    energies = np.array([answer.energy for answer in answers])
    forces = np.stack([answer.forces for answer in answers])
    return _largest(np.diff(energies, n=2)), _largest(np.diff(forces, n=2, axis=0))


def _force_error_along(
    evaluate: Evaluate, atoms: Atoms, forces: np.ndarray, direction: np.ndarray, step: float
) -> float:
    def moved(distance: float) -> Atoms:
        copy = atoms.copy()
        copy.positions += distance * direction
        return copy

    return abs(float((forces * direction).sum()) + _derivative(evaluate, moved, step))


def _derivative(evaluate: Evaluate, at: Callable[[float], Atoms], step: float) -> float:
    energy = [answer.energy for answer in evaluate([at(factor * step) for factor in (-2, -1, 1, 2)])]
    return (energy[0] - 8 * energy[1] + 8 * energy[2] - energy[3]) / (12 * step)


def _evaluate_potential(potential: Potential, structures: Sequence[Atoms]) -> list[Evaluation]:
    batch = collate([AtomicData.from_ase(atoms) for atoms in structures]).to(potential.device)
    conservative = potential.config.is_conservative
    prediction = potential(batch, compute_stress=conservative and bool(batch.pbc.any()), create_graph=False)
    sizes = [len(atoms) for atoms in structures]
    assert prediction.forces is not None
    forces = prediction.forces.detach().cpu().split(sizes)
    answers = []
    for index, atoms in enumerate(structures):
        stress = None
        if prediction.stress is not None and atoms.pbc.any():
            stress = prediction.stress[index].detach().cpu().numpy()
        answers.append(Evaluation(float(prediction.energy[index].detach()), forces[index].numpy(), stress))
    return answers


def _evaluate_calculator(calculator: BaseCalculator, atoms: Atoms) -> Evaluation:
    copy = atoms.copy()
    copy.calc = calculator
    has_stress = "stress" in calculator.implemented_properties and atoms.pbc.any() and atoms.cell.volume > 0
    stress = copy.get_stress(voigt=False) if has_stress else None
    return Evaluation(float(copy.get_potential_energy()), copy.get_forces(), stress)


def _relative(expected: float, found: float) -> float:
    return abs(found - expected) / max(abs(expected), 1.0)


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max()) if values.size else 0.0
