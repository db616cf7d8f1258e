"""Harmonic vibrations from second derivatives of the energy.

Modes are eigenvectors of ``H_ij / √(m_i m_j)``; of free molecules translations and rotations are taken out first
(Wilson, Decius and Cross, Molecular Vibrations, 1955), so that ``3n − 6`` are left, or ``3n − 5`` of a linear one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase import Atoms, units
from ase.constraints import FixAtoms
from ase.thermochemistry import HarmonicThermo, IdealGasThermo

from escaip.errors import ConfigError, DataError
from escaip.files import write_results
from escaip.properties.common import ACCENT, MODEL, at_rest, new_figure, table

_TO_EV = units._hbar * 1e10 / np.sqrt(units._e * units._amu)
"""Factor from ``ω`` in √(eV/Å²/amu) to ``ħω`` in eV."""
_LINEAR = 1e-4  # ratio of singular values below which a rotation does not move a linear molecule
_NOTED_ASYMMETRY = 1e-2
_FRAMES, _AMPLITUDE = 20, 0.25


@dataclass(frozen=True)
class Vibrations:
    """Harmonic vibrations of ``n`` atoms.

    Attributes:
        atoms: the structure with its calculator.
        energies: (k,) meV, ascending; those of imaginary modes are negative.
        modes: (k, n, 3) Cartesian, mass-weighted orthonormal: Σ_i m_i u·u' = δ (amu^−1/2).
        num_rigid: translations and rotations taken out.
        rigid_energy: meV, largest of those; zero for exact second derivatives.
        largest_force: eV/Å; where it is not small, frequencies do not belong to a minimum.
        asymmetry: of the Hessian before it was made symmetric, relative to its largest entry.
    """

    atoms: Atoms
    energies: np.ndarray
    modes: np.ndarray
    num_rigid: int
    rigid_energy: float
    largest_force: float
    asymmetry: float

    @property
    def frequencies(self) -> np.ndarray:
        """``(k,)`` cm⁻¹, negative where imaginary."""
        return self.energies * 1e-3 / units.invcm

    @property
    def num_imaginary(self) -> int:
        """Number of modes along which the energy falls."""
        return int((self.energies < 0).sum())

    @property
    def zero_point_energy(self) -> float:
        """``Σ ħω/2`` of the real modes, eV."""
        return float(0.5e-3 * self.energies[self.energies > 0].sum())

    def thermochemistry(self, symmetry_number: int = 1, spin: float = 0.0) -> IdealGasThermo | HarmonicThermo:
        """Returns ASE's thermochemistry: of an ideal gas for a free molecule, else of harmonic oscillators.

        ``get_gibbs_energy(temperature, pressure)`` and ``get_helmholtz_energy(temperature)`` of the result take K and
        Pa and return eV.

        Args:
            symmetry_number: number of rotations that map a free molecule onto itself, such as 2 for water.
            spin: total electronic spin of a free molecule, 0.5 for one unpaired electron.

        Raises:
            ConfigError: a mode is imaginary.
        """
        if self.num_imaginary:
            raise ConfigError(f"{self.num_imaginary} modes are imaginary: relax to a minimum before thermochemistry")
        energies, potential = (1e-3 * self.energies).tolist(), float(self.atoms.get_potential_energy())
        if self.num_rigid < 3 or self.atoms.pbc.any():
            return HarmonicThermo(energies, potential)
        geometry: Literal["monatomic", "linear", "nonlinear"]
        geometry = "monatomic" if len(self.atoms) == 1 else "linear" if self.num_rigid == 5 else "nonlinear"
        return IdealGasThermo(energies, geometry, potential, self.atoms, symmetry_number, spin)

    def summary(self) -> str:
        """Returns a table of all modes, the zero-point energy, and how far to trust them."""
        rows = [["mode", "cm⁻¹", "meV"]]
        for number, (frequency, energy) in enumerate(zip(self.frequencies, self.energies), 1):
            mark = "i" if energy < 0 else ""
            rows.append([str(number), f"{abs(frequency):.1f}{mark}", f"{abs(energy):.2f}{mark}"])
        kind = f"{self.num_imaginary} imaginary modes" if self.num_imaginary else "a minimum: no imaginary mode"
        lines = [table(rows), f"zero-point energy {self.zero_point_energy:.4f} eV, {kind}"]
        if self.num_rigid:
            lines.append(f"{self.num_rigid} translations and rotations taken out, of up to {self.rigid_energy:.2g} meV")
        if self.asymmetry > _NOTED_ASYMMETRY:
            lines.append(f"second derivatives were asymmetric by {100 * self.asymmetry:.2g} % of the largest")
        return "\n".join(lines)

    def write(self, folder: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> None:
        """Writes ``vibrations.json``, ``vibrations.png`` and ``modes.extxyz``, one period of each mode in turn.

        ``about``, such as the origin of the model, stands first in the JSON.
        """
        frames = [frame for mode in range(len(self.modes)) for frame in self._period(mode)]
        figure = new_figure()
        axis = figure.subplots()
        axis.vlines(self.frequencies, 0, 1, colors=[MODEL if energy > 0 else ACCENT for energy in self.energies])
        axis.set(xlabel="wavenumber (cm⁻¹; imaginary: negative)", yticks=[], ylim=(0, 1.1))
        axis.set_xlim(min(0.0, 1.05 * self.frequencies.min(initial=0.0)))
        axis.set_title(f"{self.atoms.get_chemical_formula()}: {len(self.modes)} harmonic modes")
        values = {
            **(about or {}),
            "formula": self.atoms.get_chemical_formula(), "frequencies_cm-1": self.frequencies,
            "energies_meV": self.energies, "zero_point_energy_eV": self.zero_point_energy,
            "num_imaginary": self.num_imaginary, "num_rigid": self.num_rigid, "rigid_energy_meV": self.rigid_energy,
            "largest_force_eV/A": self.largest_force, "hessian_asymmetry": self.asymmetry,
            "modes_amu-1/2": self.modes, "structure": self.atoms,
        }  # fmt: skip
        files: dict[str, Any] = {"vibrations.json": values, "vibrations.png": figure}
        write_results(folder, {**files, "modes.extxyz": frames} if frames else files)

    def _period(self, mode: int) -> list[Atoms]:
        """Returns one period of a mode, whose atoms move by up to ``_AMPLITUDE`` Å."""
        displacement = self.modes[mode] * (_AMPLITUDE / np.sqrt((self.modes[mode] ** 2).sum(-1).max()))
        period = []
        for index in range(_FRAMES):
            frame = self.atoms.copy()
            frame.set_constraint()
            frame.info = {"mode": mode + 1, "frequency_cm-1": float(self.frequencies[mode]), "frame": index}
            frame.arrays["displacement"] = displacement
            frame.positions += np.sin(2 * np.pi * index / _FRAMES) * displacement
            period.append(frame)
        return period


def molecular_vibrations(
    atoms: Atoms,
    *,
    relaxation: str = "ions",
    fmax: float = 1e-3,
    steps: int = 500,
    finite_differences: bool = False,
    step: float = 0.01,
) -> Vibrations:
    """Computes harmonic vibrations of a molecule, an adsorbate on a fixed support, or a crystal at q = 0.

    Translations are taken out, and rotations of structures that are not periodic, unless ``FixAtoms`` holds atoms.

    Args:
        atoms: structure with a calculator; it is not changed.
        relaxation: ``"ions"``, or ``"none"`` for a structure that is at a minimum or a saddle point.
        fmax: largest force at the end, eV/Å.
        steps: largest number of steps of the relaxation.
        finite_differences: differentiate forces numerically even where the calculator has second derivatives.
        step: of finite differences, Å.

    Raises:
        ConfigError: no calculator, a setting out of range, or a constraint other than ``FixAtoms``.
        DataError: second derivatives are NaN.
        SimulationError: the relaxation did not converge.
    """
    if relaxation == "full":
        raise ConfigError("vibrations are those of a given cell: relax it first (escaip relax --cell)")
    free = _free_atoms(atoms)
    own = at_rest(atoms, relaxation, fmax, steps)
    matrix = second_derivatives(own, free, finite_differences=finite_differences, step=step)
    scale = float(np.abs(matrix).max())
    asymmetry = float(np.abs(matrix - matrix.T).max()) / scale if scale else 0.0
    roots = np.sqrt(np.repeat(own.get_masses()[free], 3))
    weighted = 0.5 * (matrix + matrix.T) / np.outer(roots, roots)
    rigid = _rigid_motions(own) if len(free) == len(own) else np.empty((len(roots), 0))
    basis = np.linalg.svd(rigid)[0][:, rigid.shape[1] :] if rigid.size else np.eye(len(roots))
    values, vectors = np.linalg.eigh(basis.T @ weighted @ basis)
    modes = np.zeros((len(values), len(own), 3))
    modes[:, free] = ((basis @ vectors) / roots[:, None]).T.reshape(len(values), len(free), 3)
    of_rigid = np.linalg.eigvalsh(rigid.T @ weighted @ rigid)
    largest_force = float(np.linalg.norm(own.get_forces(), axis=1).max())  # those of fixed atoms are zero
    rigid_energy = float(np.abs(_energies(of_rigid)).max(initial=0.0))
    return Vibrations(own, _energies(values), modes, rigid.shape[1], rigid_energy, largest_force, asymmetry)


def second_derivatives(
    atoms: Atoms, free: np.ndarray | None = None, *, finite_differences: bool = False, step: float = 0.01
) -> np.ndarray:
    """Returns second derivatives ``(3m, 3m)`` of ``m`` free atoms, eV/Å², not made symmetric.

    They come from the calculator's ``get_hessian(atoms)`` where it has one, else from central differences of forces.

    Raises:
        ConfigError: ``step`` is not above 0, or the forces of the model are no derivatives.
        DataError: second derivatives are NaN or infinite.
    """
    if not step > 0:
        raise ConfigError(f"step is {step} Å: it must be above 0")
    free = np.arange(len(atoms)) if free is None else free
    if not finite_differences and hasattr(atoms.calc, "get_hessian"):
        size = 3 * len(atoms)
        whole = np.asarray(atoms.calc.get_hessian(atoms), dtype=float).reshape(size, size)
        moving = (3 * free[:, None] + np.arange(3)).ravel()
        matrix = whole[np.ix_(moving, moving)]
    else:
        matrix = _differences(atoms, free, step)
    if not np.isfinite(matrix).all():
        raise DataError("second derivatives are NaN or infinite: check the structure for atoms at one place")
    return matrix


def _differences(atoms: Atoms, free: np.ndarray, step: float) -> np.ndarray:
    moved = atoms.copy()
    moved.set_constraint()
    moved.calc = atoms.calc

    def forces(index: int, axis: int, distance: float) -> np.ndarray:
        moved.positions = atoms.positions
        moved.positions[index, axis] += distance
        return moved.get_forces()[free].ravel()

    return np.array([
        (forces(index, axis, -step) - forces(index, axis, step)) / (2 * step) for index in free for axis in range(3)
    ])  # fmt: skip


def _free_atoms(atoms: Atoms) -> np.ndarray:
    is_free = np.ones(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise ConfigError(f"constraint {type(constraint).__name__} has no vibrations: only FixAtoms is understood")
        is_free[constraint.index] = False
    if not is_free.any():
        raise ConfigError("every atom is held by a constraint: free those that shall vibrate")
    return np.flatnonzero(is_free)


def _rigid_motions(atoms: Atoms) -> np.ndarray:
    """Returns translations, and rotations unless periodic, ``(3n, 3 to 6)``, orthonormal and mass-weighted."""
    roots = np.sqrt(atoms.get_masses())[:, None]
    motions = [(roots * axis).ravel() for axis in np.eye(3)]
    if not atoms.pbc.any():
        arms = atoms.positions - atoms.get_center_of_mass()
        motions += [(roots * np.cross(axis, arms)).ravel() for axis in np.eye(3)]
    elif not atoms.pbc.all():
        warnings.warn("rotations of a structure periodic along some axes stay among its modes", stacklevel=3)
    left, sizes, _ = np.linalg.svd(np.array(motions).T, full_matrices=False)
    return left[:, sizes > _LINEAR * sizes[0]]


def _energies(values: np.ndarray) -> np.ndarray:
    """Returns ``ħ√value`` in meV, negative for negative values."""
    return 1e3 * _TO_EV * np.sign(values) * np.sqrt(np.abs(values))
