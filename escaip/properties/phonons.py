"""Phonons of a crystal with phonopy (Togo et al., J. Phys.: Condens. Matter 35, 353001, 2023)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units

from escaip.errors import ConfigError
from escaip.files import write_results
from escaip.properties.common import ACCENT, MODEL, MUTED, at_rest, check_crystal, new_figure, table
from escaip.properties.vibrations import second_derivatives

THZ_TO_CM = 1e12 / (units._c * 100)
_KJ_PER_MOL = units.kJ / units.mol
_IMAGINARY = -0.05  # THz: acoustic modes at Γ lie a little below zero by rounding


@dataclass(frozen=True)
class Bands:
    """Frequencies along a path through the Brillouin zone.

    Attributes:
        kpoints: (m, 3) in reciprocal lattice vectors of the primitive cell.
        distances: (m,) length of the path, 1/Å.
        frequencies: (m, 3n) THz, negative where imaginary.
        labels: names of the special points.
        positions: special points on the path, 1/Å.
    """

    kpoints: np.ndarray
    distances: np.ndarray
    frequencies: np.ndarray
    labels: list[str]
    positions: np.ndarray


@dataclass(frozen=True)
class Phonons:
    """Harmonic phonons; ``n`` atoms are in the primitive cell.

    Attributes:
        phonopy: the object of phonopy with force constants.
        atoms: the unit cell with its calculator.
        bands: along the path of the Bravais lattice (Setyawan and Curtarolo, Comput. Mater. Sci. 49, 299, 2010).
        mesh: number of q-points along each axis.
        mesh_frequencies: (q, 3n) THz, negative where imaginary.
        mesh_weights: (q,) of the irreducible q-points.
        dos_frequencies: THz.
        dos: states per THz and primitive cell.
        temperatures: K.
        free_energy: eV per primitive cell, with the zero-point energy.
        entropy: eV/K per primitive cell.
        heat_capacity: at constant volume, eV/K per primitive cell.
        zero_point_energy: eV per primitive cell.
        residual_force: eV/Å, largest in the perfect supercell.
    """

    phonopy: Any
    atoms: Atoms
    primitive: Atoms
    bands: Bands
    mesh: tuple[int, int, int]
    mesh_frequencies: np.ndarray
    mesh_weights: np.ndarray
    dos_frequencies: np.ndarray
    dos: np.ndarray
    temperatures: np.ndarray
    free_energy: np.ndarray
    entropy: np.ndarray
    heat_capacity: np.ndarray
    zero_point_energy: float
    residual_force: float

    def frequencies(self, kpoint: Sequence[float]) -> np.ndarray:
        """Returns ``(3n,)`` THz, ascending, negative where imaginary; ``kpoint`` in primitive reciprocal vectors."""
        return _frequencies(self.phonopy, np.array([kpoint], dtype=float))[0]

    @property
    def imaginary_share(self) -> float:
        """Fraction of the modes on the mesh that are imaginary."""
        return float(self.mesh_weights @ (self.mesh_frequencies < _IMAGINARY).mean(1) / self.mesh_weights.sum())

    @property
    def lowest(self) -> float:
        """Lowest frequency of mesh and path, THz."""
        return float(min(self.mesh_frequencies.min(), self.bands.frequencies.min()))

    @property
    def is_stable(self) -> bool:
        """Whether no mode of mesh or path is imaginary beyond rounding (0.05 THz)."""
        return self.lowest >= _IMAGINARY

    def summary(self) -> str:
        """Returns frequencies at the special points, thermal properties, and a line on imaginary modes."""
        rows, seen = [["q", "reciprocal vectors", "THz"]], set()
        for label, position in zip(self.bands.labels, self.bands.positions):
            index = int(np.abs(self.bands.distances - position).argmin())
            if label not in seen and "," not in label:
                seen.add(label)
                kpoint = " ".join(f"{value:.3f}" for value in self.bands.kpoints[index])
                rows.append([label, kpoint, _ranges(self.bands.frequencies[index])])
        lines = [table(rows)]
        thermal = [["T (K)", "F (eV)", "S (meV/K)", "Cv (meV/K)"]]
        for index, temperature in enumerate(self.temperatures):
            if temperature in (0, 100, 300, 600, 1000):
                values = self.free_energy[index], 1e3 * self.entropy[index], 1e3 * self.heat_capacity[index]
                thermal.append([f"{temperature:.0f}", *(f"{value:.4f}" for value in values)])
        lines.append(
            table(thermal) + f"\nper cell of {len(self.primitive)} atoms; zero point {self.zero_point_energy:.4f} eV"
        )
        if self.is_stable:
            lines.append(f"stable: no imaginary mode on path and {'×'.join(map(str, self.mesh))} mesh")
        else:
            lines.append(
                f"NOT stable: {100 * self.imaginary_share:.2g} % of the modes of the mesh are imaginary, the lowest of "
                f"mesh and path is {-self.lowest:.3f}i THz; thermal properties leave them out"
            )
        lines.append(f"largest force in the perfect supercell {self.residual_force:.2g} eV/Å")
        return "\n".join(lines)

    def write(self, folder: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> None:
        """Writes ``phonopy.yaml`` (with force constants), ``phonons.json``, ``bands.png`` and ``thermal.png``.

        ``about``, such as the origin of the model, stands first in the JSON.
        """
        values = {
            **(about or {}),
            "formula": self.atoms.get_chemical_formula(),
            "supercell": np.asarray(self.phonopy.supercell_matrix),
            "primitive": self.primitive,
            "bands": {
                "kpoints": self.bands.kpoints, "distances_1/A": self.bands.distances,
                "frequencies_THz": self.bands.frequencies, "labels": self.bands.labels,
                "label_distances_1/A": self.bands.positions,
            },
            "dos": {"frequencies_THz": self.dos_frequencies, "states_per_THz": self.dos},
            "thermal": {
                "temperatures_K": self.temperatures, "free_energy_eV": self.free_energy, "entropy_eV/K": self.entropy,
                "heat_capacity_eV/K": self.heat_capacity, "zero_point_energy_eV": self.zero_point_energy,
            },
            "mesh": self.mesh, "stable": self.is_stable, "imaginary_share": self.imaginary_share,
            "lowest_THz": self.lowest, "residual_force_eV/A": self.residual_force,
        }  # fmt: skip
        write_results(folder, {
            "phonopy.yaml": lambda path: self.phonopy.save(path, settings={"force_constants": True}),
            "phonons.json": values, "bands.png": self._draw_bands(), "thermal.png": self._draw_thermal(),
        })  # fmt: skip

    def _draw_bands(self) -> Any:
        figure = new_figure(2)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        left.plot(self.bands.distances, self.bands.frequencies, color=MODEL, linewidth=1)
        for position in self.bands.positions:
            left.axvline(position, color=MUTED, linewidth=0.5)
        left.axhline(0, color=MUTED, linewidth=0.5)
        left.set_xticks(self.bands.positions, [label.replace("G", "Γ") for label in self.bands.labels])
        left.set(xlim=(0, self.bands.distances[-1]), ylabel="frequency (THz; imaginary: negative)")
        right.plot(self.dos, self.dos_frequencies, color=MODEL, linewidth=1)
        right.set(xlabel="states per THz", xlim=(0, None))
        return figure

    def _draw_thermal(self) -> Any:
        figure = new_figure()
        axis = figure.subplots()
        axis.plot(self.temperatures, 1e3 * self.heat_capacity, color=MODEL, label="heat capacity (meV/K)")
        axis.plot(self.temperatures, 1e3 * self.entropy, color=ACCENT, label="entropy (meV/K)")
        axis.axhline(3e3 * units.kB * len(self.primitive), color=MUTED, linewidth=0.8, label="Dulong–Petit")
        axis.set(xlabel="temperature (K)", ylabel=f"per cell of {len(self.primitive)} atoms")
        axis.legend()
        return figure


def crystal_phonons(
    atoms: Atoms,
    *,
    relaxation: str = "full",
    supercell: Sequence[int] | None = None,
    min_length: float = 12.0,
    displacement: float = 0.01,
    hessian: bool = False,
    mesh: float = 60.0,
    path_density: float = 30.0,
    temperatures: Sequence[float] | None = None,
    symprec: float = 1e-4,
    fmax: float = 1e-3,
    steps: int = 500,
) -> Phonons:
    """Computes phonons from forces of displaced atoms in a supercell, without long-range dipoles (no LO-TO splitting).

    Args:
        atoms: unit cell with a calculator; it is not changed.
        relaxation: ``"full"`` (atoms and cell), ``"ions"`` or ``"none"``.
        supercell: repeats along each axis; default the fewest that make it ``min_length`` wide.
        min_length: distance of opposite faces of the supercell, Å; about twice the reach of the forces.
        displacement: of an atom, Å.
        hessian: take force constants from second derivatives of the supercell instead of displaced atoms, without
            a step length but also without use of symmetry.
        mesh: the number of q-points along an axis is this length over that of the primitive vector, Å.
        path_density: q-points per 1/Å along the path.
        temperatures: K; default 0 to 1000 in steps of 10.
        symprec: tolerance of the symmetry, Å.
        fmax: largest force after the relaxation, eV/Å.
        steps: largest number of steps of the relaxation.

    Raises:
        ConfigError: phonopy is missing, not a crystal, no calculator, or a setting out of range.
        SimulationError: the relaxation did not converge.
    """
    check_phonopy()
    check_crystal(atoms, "phonons")
    for name, value in (("min_length", min_length), ("displacement", displacement), ("mesh", mesh)):
        if not value > 0:
            raise ConfigError(f"{name} is {value}: it must be above 0")
    if supercell is not None and (len(supercell) != 3 or min(supercell) < 1):
        raise ConfigError(f"supercell is {supercell}: give three numbers, each at least 1")
    start = at_rest(atoms, relaxation, fmax, steps)
    if supercell is None:
        heights = 1 / np.linalg.norm(start.cell.reciprocal().array, axis=1)
        supercell = np.ceil(min_length / heights - 1e-6).astype(int).tolist()
    phonon, residual = _force_constants(start, supercell, displacement, hessian, symprec)
    primitive = _supercell(phonon.primitive, start)
    primitive.calc = None
    phonon.run_mesh(np.maximum(1, np.ceil(mesh / primitive.cell.lengths()).astype(int)), is_gamma_center=True)
    phonon.run_total_dos()
    kelvin = np.arange(0.0, 1001.0, 10.0) if temperatures is None else np.asarray(temperatures, dtype=float)
    # Acoustic modes at Γ are zero up to rounding and have no thermal properties.
    phonon.run_thermal_properties(temperatures=kelvin, cutoff_frequency=1e-2)
    thermal = phonon.thermal_properties
    _, free_energy, entropy, heat_capacity = (np.asarray(values) for values in thermal.thermal_properties)
    # The lattice of a relaxed cell is exact to some 1e-4 only.
    path = primitive.cell.bandpath(density=path_density, eps=1e-3)
    distances, positions, labels = path.get_linear_kpoint_axis()
    bands = Bands(path.kpts, distances, _frequencies(phonon, path.kpts), list(labels), positions)
    return Phonons(
        phonopy=phonon, atoms=start, primitive=primitive, bands=bands, residual_force=residual, temperatures=kelvin,
        mesh=tuple(int(number) for number in phonon.mesh_numbers),  # type: ignore[arg-type]
        mesh_frequencies=np.array(phonon.mesh.frequencies), mesh_weights=np.array(phonon.mesh.weights, dtype=float),
        dos_frequencies=np.array(phonon.total_dos.frequency_points), dos=np.array(phonon.total_dos.dos),
        free_energy=free_energy * _KJ_PER_MOL, entropy=entropy * 1e-3 * _KJ_PER_MOL,
        heat_capacity=heat_capacity * 1e-3 * _KJ_PER_MOL,
        zero_point_energy=float(thermal.zero_point_energy) * _KJ_PER_MOL,
    )  # fmt: skip


def check_phonopy() -> Any:
    """Returns the module phonopy; raises ConfigError where it is not installed."""
    try:
        import phonopy
    except ImportError as error:
        raise ConfigError("phonons need phonopy: pip install 'escaip[sim]', or pip install phonopy alone") from error
    return phonopy


def _force_constants(
    atoms: Atoms, repeats: Sequence[int], displacement: float, hessian: bool, symprec: float
) -> tuple[Any, float]:
    """Returns the phonopy object with force constants, and the largest force in the perfect supercell."""
    phonopy = check_phonopy()
    from phonopy.structure.atoms import PhonopyAtoms
    from phonopy.structure.cells import guess_primitive_matrix

    cell = PhonopyAtoms(
        symbols=list(atoms.symbols), cell=atoms.cell.array, scaled_positions=atoms.get_scaled_positions(),
        masses=atoms.get_masses(),
    )  # fmt: skip
    phonon = phonopy.Phonopy(
        cell, supercell_matrix=np.diag(repeats), primitive_matrix=guess_primitive_matrix(cell, symprec=symprec),
        symprec=symprec,
    )  # fmt: skip
    perfect = _supercell(phonon.supercell, atoms)
    forces = perfect.get_forces()
    if hessian:
        size = len(perfect)
        matrix = second_derivatives(perfect)
        phonon.force_constants = np.ascontiguousarray(
            (0.5 * (matrix + matrix.T)).reshape(size, 3, size, 3).transpose(0, 2, 1, 3)
        )
    else:
        phonon.generate_displacements(distance=displacement)
        # Forces of the perfect supercell are no response to the displacement.
        phonon.forces = [
            _supercell(moved, atoms).get_forces() - forces for moved in phonon.supercells_with_displacements
        ]
        phonon.produce_force_constants(show_drift=False)
    phonon.symmetrize_force_constants(show_drift=False)
    return phonon, float(np.sqrt((forces**2).sum(1).max()))


def _supercell(cell: Any, atoms: Atoms) -> Atoms:
    """Returns phonopy's atoms as those of ASE, with the calculator."""
    places = {"scaled_positions": cell.scaled_positions, "cell": cell.cell, "pbc": True}
    return Atoms(cell.symbols, masses=cell.masses, calculator=atoms.calc, **places)


def _frequencies(phonon: Any, kpoints: np.ndarray) -> np.ndarray:
    phonon.run_qpoints(kpoints)
    return np.array(phonon.qpoints.frequencies)


def _ranges(frequencies: np.ndarray) -> str:
    """Returns frequencies as text with multiplicities: ``5.02 (2), 7.31``."""
    groups: list[list[float]] = []
    for value in np.sort(frequencies):
        if groups and abs(value - groups[-1][0]) < 5e-3:
            groups[-1].append(float(value))
        else:
            groups.append([float(value)])
    shown = [
        f"{abs(g[0]):.3f}{'i' if g[0] < _IMAGINARY else ''}" + (f" ({len(g)})" if len(g) > 1 else "") for g in groups
    ]
    return ", ".join(shown if len(shown) <= 9 else [*shown[:4], "...", *shown[-4:]])
