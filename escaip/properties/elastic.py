"""Elastic constants from stresses under small strains.

Convention: ``σ_i = Σ_j C_ij ε_j`` in Voigt order xx, yy, zz, yz, xz, xy, with Cauchy stress, positive in tension, and
engineering shear ``ε_4 = 2 ε_yz``; axes are those of the cell as given. At zero stress these are the second derivatives
of the energy per volume.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.stress import voigt_6_to_full_3x3_strain
from pymatgen.analysis.elasticity import ElasticTensor
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from escaip.errors import ConfigError
from escaip.files import write_results
from escaip.properties.common import ACCENT, MODEL, at_rest, check_crystal, deformed, new_figure, table

VOIGT = ("xx", "yy", "zz", "yz", "xz", "xy")


@dataclass(frozen=True)
class ElasticConstants:
    """The stiffness of a crystal and what follows from it.

    Attributes:
        atoms: the crystal with its calculator.
        stiffness: (6, 6) GPa, symmetric, and averaged over the point group where that was asked for.
        measured: (6, 6) GPa, from the stresses alone.
        stress: (6,) GPa, of the crystal without strain.
        strain: the largest applied.
        space_group: None where the symmetry was not used.
    """

    atoms: Atoms
    stiffness: np.ndarray
    measured: np.ndarray
    stress: np.ndarray
    strain: float
    space_group: str | None

    @property
    def averages(self) -> dict[str, float]:
        """Moduli of a polycrystal without texture by pymatgen, GPa; NaN where the stiffness has no inverse.

        ``bulk_`` and ``shear_`` ``voigt`` (uniform strain), ``reuss`` (uniform stress) and ``hill``, their mean (Hill,
        Proc. Phys. Soc. A 65, 349, 1952); ``young`` and ``poisson`` (without unit) of the Hill averages; ``anisotropy``
        ``5 G_V/G_R + B_V/B_R − 6`` (Ranganathan and Ostoja-Starzewski, Phys. Rev. Lett. 101, 055504, 2008).
        """
        names = {
            "bulk_voigt": "k_voigt", "bulk_reuss": "k_reuss", "bulk_hill": "k_vrh", "shear_voigt": "g_voigt",
            "shear_reuss": "g_reuss", "shear_hill": "g_vrh", "young": "y_mod", "poisson": "homogeneous_poisson",
            "anisotropy": "universal_anisotropy",
        }  # fmt: skip
        tensor = ElasticTensor.from_voigt(self.stiffness)
        singular = abs(np.linalg.det(self.stiffness / np.abs(self.stiffness).max())) < 1e-12
        known = ("bulk_voigt", "shear_voigt") if singular else names
        found = {name: float(getattr(tensor, names[name])) if name in known else np.nan for name in names}
        return {**found, "young": 1e-9 * found["young"]}  # pymatgen's is in Pa

    @property
    def eigenvalues(self) -> np.ndarray:
        """``(6,)`` GPa, of the stiffness in ascending order."""
        return np.linalg.eigvalsh(self.stiffness)

    @property
    def is_stable(self) -> bool:
        """Whether every strain costs energy, which means that all eigenvalues are positive (PRB 90, 224104, 2014)."""
        return bool(self.eigenvalues[0] > 0)

    @property
    def deviation(self) -> float:
        """Largest change of an entry by symmetry, GPa."""
        return float(np.abs(self.stiffness - self.measured).max())

    def summary(self) -> str:
        """Returns the stiffness, its averages, and how far to trust them."""
        rows = [["C_ij (GPa)", *VOIGT]]
        rows += [[name, *(f"{round(value, 2) + 0.0:.2f}" for value in row)] for name, row in zip(VOIGT, self.stiffness)]
        found, kinds = self.averages, ("voigt", "reuss", "hill")
        averages = [["GPa", *map(str.title, kinds)]]
        averages += [[name, *(f"{found[f'{name}_{kind}']:.2f}" for kind in kinds)] for name in ("bulk", "shear")]
        state = "stable" if self.is_stable else "NOT stable"
        group = f", space group {self.space_group}" if self.space_group else ""
        return "\n".join([
            table(rows),
            table(averages),
            f"Young {found['young']:.2f} GPa, Poisson {found['poisson']:.3f}, anisotropy {found['anisotropy']:.3f}",
            f"{state}: smallest eigenvalue {self.eigenvalues[0]:.2f} GPa{group}; symmetry changed entries by up to "
            f"{self.deviation:.2g} GPa; stress before strain up to {np.abs(self.stress).max():.2g} GPa",
        ])  # fmt: skip

    def write(self, folder: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> None:
        """Writes ``elastic.json`` and ``elastic.png``: the stiffness, and Young's modulus by direction.

        ``about``, such as the origin of the model, stands first in the JSON.
        """
        figure = new_figure(2)
        left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="polar")
        largest = float(np.abs(self.stiffness).max())
        left.imshow(self.stiffness, cmap="RdBu_r", vmin=-largest, vmax=largest)
        left.set(xticks=range(6), yticks=range(6), xticklabels=VOIGT, yticklabels=VOIGT, title="C (GPa)")
        for (row, column), value in np.ndenumerate(self.stiffness):
            color, shown = "white" if abs(value) > 0.7 * largest else "black", f"{round(value, 1) + 0.0:.1f}"
            left.text(column, row, shown, ha="center", va="center", fontsize=7, color=color)
        planes = (("xy", 0, 1, MODEL), ("xz", 0, 2, ACCENT), ("yz", 1, 2, "#606c38"))
        angles = np.linspace(0, 2 * np.pi, 361)
        for name, first, second, color in planes if self.is_stable else ():
            directions = np.zeros((len(angles), 3))
            directions[:, first], directions[:, second] = np.cos(angles), np.sin(angles)
            right.plot(angles, young_modulus(self.stiffness, directions), color=color, label=f"plane {name}")
        if self.is_stable:
            right.legend(loc="lower left", fontsize=7)
        right.set_title("Young's modulus (GPa)")
        values = {
            **(about or {}),
            "formula": self.atoms.get_chemical_formula(),
            "convention": "sigma_i = C_ij eps_j; xx, yy, zz, yz, xz, xy; engineering shear; axes of the cell as given",
            "stiffness_GPa": self.stiffness, "measured_GPa": self.measured, "averages_GPa": self.averages,
            "eigenvalues_GPa": self.eigenvalues, "stable": self.is_stable, "space_group": self.space_group,
            "strain": self.strain, "stress_GPa": self.stress, "structure": self.atoms,
        }  # fmt: skip
        write_results(folder, {"elastic.json": values, "elastic.png": figure})


def young_modulus(stiffness: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Returns Young's modulus ``1 / s_ij t_i t_j``, ``t = n ⊗ n``, along unit vectors ``(m, 3)``: ``(m,)``, as C."""
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
    """Computes the stiffness of a crystal by central differences of its stress, atoms relaxed at each strain.

    Args:
        atoms: structure with a calculator that has stress; it is not changed.
        relaxation: ``"full"``: atoms and cell first, then atoms at each strain; ``"ions"``: the cell stays as it is;
            ``"none"``: atoms never relax, which gives the clamped-ion constants of the cell as it is.
        strain: applied in both directions; the error grows with its square.
        symmetrize: average over the operations of the crystal's space group (pymatgen); without, only ``C = Cᵀ`` is
            imposed.
        symprec: tolerance of the symmetry, Å.
        fmax: largest force at the end, eV/Å.
        steps: largest number of steps of each relaxation.

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
    for column, component in enumerate(VOIGT):
        ends = []
        for size in (strain, -strain):
            moved = deformed(start, voigt_6_to_full_3x3_strain(size * np.eye(6)[column]))
            name = f"the structure at strain {component} {size:+g}"
            ends.append(_stress(at_rest(moved, within, fmax, steps, name)))
        measured[:, column] = (ends[0] - ends[1]) / (2 * strain)
    stiffness, group = 0.5 * (measured + measured.T), None
    if symmetrize:
        stiffness, group = symmetrized(stiffness, start, symprec)
    return ElasticConstants(start, stiffness, measured, stress, strain, group)


def _stress(atoms: Atoms) -> np.ndarray:
    """Returns the stress ``(6,)`` in GPa."""
    try:
        return np.asarray(atoms.get_stress(), dtype=float) / units.GPa
    except NotImplementedError as error:  # ASE's PropertyNotImplementedError is one
        raise ConfigError(f"elastic constants need stress: {error or 'this calculator has none'}") from error


def symmetrized(stiffness: np.ndarray, atoms: Atoms, symprec: float) -> tuple[np.ndarray, str]:
    """Averages a stiffness ``(6, 6)`` over the space group of a crystal, and returns it with the group's symbol."""
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    structure = AseAtomsAdaptor.get_structure(bare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from pymatgen's calls of spglib
        tensor = ElasticTensor.from_voigt(stiffness).fit_to_structure(structure, symprec=symprec)
        group = SpacegroupAnalyzer(structure, symprec=symprec).get_space_group_symbol()
    return np.asarray(tensor.voigt, dtype=float), group
