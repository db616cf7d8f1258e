"""Elastic constants from stresses under small strains.

Convention: ``σ_i = Σ_j C_ij ε_j`` in Voigt order xx, yy, zz, yz, xz, xy, with Cauchy stress, positive in tension, and
engineering shear ``ε_4 = 2 ε_yz``; axes are those of the cell as given. At zero stress these are the second derivatives
of the energy per volume.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError

from escaip.errors import ConfigError
from escaip.properties.files import MODEL, new_figure, table, write_results
from escaip.properties.start import at_rest, check_crystal, deformed

VOIGT = ("xx", "yy", "zz", "yz", "xz", "xy")
_PAIRS = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


@dataclass(frozen=True)
class Averages:
    """Of a polycrystal without texture, GPa (Hill, Proc. Phys. Soc. A 65, 349, 1952).

    Attributes:
        bulk_voigt, bulk_reuss, bulk_hill: of uniform strain, of uniform stress, and their mean.
        shear_voigt, shear_reuss, shear_hill: the same.
        young: of the Hill averages.
        poisson: of the Hill averages, without unit.
        anisotropy: ``5 G_V/G_R + B_V/B_R − 6``, 0 for isotropic crystals (Ranganathan and Ostoja-Starzewski, Phys. Rev.
            Lett. 101, 055504, 2008).
    """

    bulk_voigt: float
    bulk_reuss: float
    bulk_hill: float
    shear_voigt: float
    shear_reuss: float
    shear_hill: float
    young: float
    poisson: float
    anisotropy: float

    @classmethod
    def of(cls, stiffness: np.ndarray) -> Averages:
        """Of a ``(6, 6)`` stiffness; NaN where it has no inverse."""
        c = stiffness
        singular = abs(np.linalg.det(c / np.abs(c).max())) < 1e-12
        s = np.full((6, 6), np.nan) if singular else np.linalg.inv(c)
        bulk_voigt = c[:3, :3].sum() / 9
        bulk_reuss = 1 / s[:3, :3].sum()
        normal, mixed = np.trace(c[:3, :3]), c[0, 1] + c[0, 2] + c[1, 2]
        shear_voigt = (normal - mixed + 3 * np.trace(c[3:, 3:])) / 15
        normal, mixed = np.trace(s[:3, :3]), s[0, 1] + s[0, 2] + s[1, 2]
        shear_reuss = 15 / (4 * (normal - mixed) + 3 * np.trace(s[3:, 3:]))
        bulk, shear = (bulk_voigt + bulk_reuss) / 2, (shear_voigt + shear_reuss) / 2
        young = 9 * bulk * shear / (3 * bulk + shear)
        poisson = (3 * bulk - 2 * shear) / (2 * (3 * bulk + shear))
        anisotropy = 5 * shear_voigt / shear_reuss + bulk_voigt / bulk_reuss - 6
        values = (bulk_voigt, bulk_reuss, bulk, shear_voigt, shear_reuss, shear, young, poisson, anisotropy)
        return cls(*(float(value) for value in values))


@dataclass(frozen=True)
class ElasticConstants:
    """A stiffness and what follows from it.

    Attributes:
        atoms: the crystal they are of, with its calculator.
        stiffness: ``(6, 6)`` GPa, symmetric, and as the point group wants it where that was asked for.
        measured: ``(6, 6)`` GPa, as the stresses came.
        stress: ``(6,)`` GPa, of the crystal without strain.
        strain: the largest applied.
        space_group: of the crystal, or None where its symmetry was not used.
    """

    atoms: Atoms
    stiffness: np.ndarray
    measured: np.ndarray
    stress: np.ndarray
    strain: float
    space_group: str | None

    @property
    def averages(self) -> Averages:
        """Voigt, Reuss and Hill averages."""
        return Averages.of(self.stiffness)

    @property
    def eigenvalues(self) -> np.ndarray:
        """``(6,)`` GPa, ascending, of the stiffness."""
        return np.linalg.eigvalsh(self.stiffness)

    @property
    def is_stable(self) -> bool:
        """Born: every strain costs energy, all eigenvalues are positive (Mouhat and Coudert, PRB 90, 224104, 2014)."""
        return bool(self.eigenvalues[0] > 0)

    @property
    def deviation(self) -> float:
        """GPa, the largest change that symmetry made to what was measured."""
        return float(np.abs(self.stiffness - self.measured).max())

    def summary(self) -> str:
        """The stiffness, its averages, and how far to trust them."""
        rows = [["C_ij (GPa)", *VOIGT]]
        rows += [[name, *(f"{round(value, 2) + 0.0:.2f}" for value in row)] for name, row in zip(VOIGT, self.stiffness)]
        found = self.averages
        averages = [
            ["GPa", "Voigt", "Reuss", "Hill"],
            ["bulk", *(f"{value:.2f}" for value in (found.bulk_voigt, found.bulk_reuss, found.bulk_hill))],
            ["shear", *(f"{value:.2f}" for value in (found.shear_voigt, found.shear_reuss, found.shear_hill))],
        ]
        state = "stable" if self.is_stable else "NOT stable"
        group = f", space group {self.space_group}" if self.space_group else ""
        return "\n".join(
            [
                table(rows),
                table(averages),
                f"Young {found.young:.2f} GPa, Poisson {found.poisson:.3f}, anisotropy {found.anisotropy:.3f}",
                f"{state}: smallest eigenvalue {self.eigenvalues[0]:.2f} GPa{group}; symmetry changed entries by up to "
                f"{self.deviation:.2g} GPa; stress before strain up to {np.abs(self.stress).max():.2g} GPa",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Numbers with units in their names."""
        return {
            "formula": self.atoms.get_chemical_formula(),
            "convention": "sigma_i = C_ij eps_j; xx, yy, zz, yz, xz, xy; engineering shear; axes of the cell as given",
            "stiffness_GPa": self.stiffness,
            "measured_GPa": self.measured,
            "averages_GPa": asdict(self.averages),
            "eigenvalues_GPa": self.eigenvalues,
            "stable": self.is_stable,
            "space_group": self.space_group,
            "strain": self.strain,
            "stress_GPa": self.stress,
            "structure": self.atoms,
        }

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``elastic.json`` and ``elastic.png``: the stiffness, and Young's modulus by direction."""
        figure = new_figure(2)
        left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="polar")
        largest = float(np.abs(self.stiffness).max())
        left.imshow(self.stiffness, cmap="RdBu_r", vmin=-largest, vmax=largest)
        left.set(xticks=range(6), yticks=range(6), xticklabels=VOIGT, yticklabels=VOIGT, title="C (GPa)")
        for (row, column), value in np.ndenumerate(self.stiffness):
            left.text(column, row, f"{round(value, 1) + 0.0:.1f}", ha="center", va="center", fontsize=7,
                      color="white" if abs(value) > 0.7 * largest else "black")  # fmt: skip
        if self.is_stable:
            angles = np.linspace(0, 2 * np.pi, 361)
            for name, (first, second), color in zip(
                ("xy", "xz", "yz"), ((0, 1), (0, 2), (1, 2)), (MODEL, "#c1121f", "#606c38")
            ):
                directions = np.zeros((len(angles), 3))
                directions[:, first], directions[:, second] = np.cos(angles), np.sin(angles)
                right.plot(angles, young_modulus(self.stiffness, directions), color=color, label=f"plane {name}")
            right.legend(loc="lower left", fontsize=7)
        right.set_title("Young's modulus (GPa)")
        write_results(folder, {"elastic.json": self.to_dict(), "elastic.png": figure})


def young_modulus(stiffness: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """``(m,)`` along unit vectors ``(m, 3)``: ``1 / s_ij t_i t_j`` with ``t = n ⊗ n``; in the unit of the stiffness."""
    x, y, z = np.asarray(directions, dtype=float).T
    tension = np.stack([x * x, y * y, z * z, y * z, x * z, x * y], axis=-1)
    return 1 / np.einsum("mi,ij,mj->m", tension, np.linalg.inv(stiffness), tension)


def elastic_constants(
    atoms: Atoms,
    *,
    relaxation: str = "full",
    strain: float = 0.005,
    symmetrize: bool = True,
    symprec: float = 1e-3,
    fmax: float = 1e-3,
    steps: int = 500,
) -> ElasticConstants:
    """The stiffness of a crystal, by central differences of its stress with the atoms relaxed at each strain.

    Args:
        atoms: structure with a calculator that knows stress; it is not changed.
        relaxation: ``"full"``: atoms and cell first, then atoms at each strain; ``"ions"``: the cell is taken as it is;
            ``"none"``: atoms never relax, which gives the clamped-ion constants of the cell as it is.
        strain: applied in both directions; the error grows with its square.
        symmetrize: average over the operations of the crystal's space group (pymatgen); without, only ``C = Cᵀ`` is
            imposed.
        symprec: Å, within which symmetry is found.
        fmax: largest force at the end, eV/Å.
        steps: of each relaxation at most.

    Raises:
        ConfigError: not a crystal, no calculator or one without stress, or a setting out of range.
        SimulationError: a relaxation did not converge.
    """
    check_crystal(atoms, "elastic constants")
    if not 0 < strain < 0.1:
        raise ConfigError(f"strain is {strain}: it must be above 0 and below 0.1")
    start = at_rest(atoms, relaxation, fmax, steps)
    within = "none" if relaxation == "none" else "ions"
    stress = _stress(start)
    measured = np.empty((6, 6))
    for column, (first, second) in enumerate(_PAIRS):
        ends = []
        for sign in (1.0, -1.0):
            applied = np.zeros((3, 3))
            # Half of an engineering shear in each of the two places; a normal strain gets both halves.
            applied[first, second] += sign * strain / 2
            applied[second, first] += sign * strain / 2
            name = f"the structure at strain {VOIGT[column]} {sign * strain:+g}"
            ends.append(_stress(at_rest(deformed(start, np.eye(3) + applied), within, fmax, steps, name)))
        measured[:, column] = (ends[0] - ends[1]) / (2 * strain)
    stiffness, group = 0.5 * (measured + measured.T), None
    if symmetrize:
        stiffness, group = _symmetrized(stiffness, start, symprec)
    return ElasticConstants(start, stiffness, measured, stress, strain, group)


def _stress(atoms: Atoms) -> np.ndarray:
    """``(6,)`` GPa."""
    try:
        return np.asarray(atoms.get_stress(), dtype=float) / units.GPa
    except (PropertyNotImplementedError, NotImplementedError) as error:
        raise ConfigError(f"elastic constants need stress: {error or 'this calculator has none'}") from error


def _symmetrized(stiffness: np.ndarray, atoms: Atoms, symprec: float) -> tuple[np.ndarray, str]:
    from pymatgen.analysis.elasticity import ElasticTensor
    from pymatgen.io.ase import AseAtomsAdaptor
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    structure = AseAtomsAdaptor.get_structure(bare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how pymatgen calls spglib
        tensor = ElasticTensor.from_voigt(stiffness).fit_to_structure(structure, symprec=symprec)
        group = SpacegroupAnalyzer(structure, symprec=symprec).get_space_group_symbol()
    return np.asarray(tensor.voigt, dtype=float), group
