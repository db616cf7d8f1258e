"""Equation of state, elastic constants and phonons: against curves and springs that are known."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.eos
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from pair_potential import Springs
from scipy import constants

from escaip.errors import ConfigError, SimulationError
from escaip.properties import ElasticConstants, crystal_phonons, elastic_constants, fit_equation_of_state
from escaip.properties.elastic import young_modulus
from escaip.simulate import relax

V0, B0, PRIME, E0 = 20.0, 90.0, 4.7, -123456.0


class Curve(Calculator):
    """Energy that follows a Birch–Murnaghan curve of the volume, far from zero."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms: Atoms | None = None, properties: Any = (), system_changes: Any = ()) -> None:
        super().calculate(atoms, properties, system_changes or all_changes)
        volume = self.atoms.get_volume()
        energy = float(ase.eos.birchmurnaghan(volume, 0.0, B0 * units.GPa, PRIME, V0)) + E0
        self.results = {"energy": energy, "forces": np.zeros((len(self.atoms), 3))}


def crystal(volume: float = 20.5) -> Atoms:
    atoms = bulk("Ge", "sc", a=volume ** (1 / 3))
    atoms.calc = Curve()
    return atoms


def test_a_known_curve_comes_back(tmp_path: Path) -> None:
    found = fit_equation_of_state(crystal(), relaxation="none")
    assert found.volume == pytest.approx(V0, rel=1e-5)
    assert found.bulk_modulus == pytest.approx(B0, rel=1e-3)
    assert found.derivative == pytest.approx(PRIME, rel=1e-2)
    assert found.energy == pytest.approx(E0, abs=1e-7)
    assert found.residual < 1e-4
    assert found.atoms.get_volume() == pytest.approx(found.volume, rel=1e-12)
    np.testing.assert_allclose(found(found.volumes), found.energies, atol=1e-7)
    found.write(tmp_path)
    written = json.loads((tmp_path / "eos.json").read_text())
    assert written["B0_GPa"] == found.bulk_modulus
    assert len(ase.io.read(tmp_path / "eos.extxyz", ":")) == 9
    assert (tmp_path / "eos.png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eos.extxyz", "eos.json", "eos.png"]


def test_copper_is_where_its_cell_relaxes() -> None:
    atoms = bulk("Cu", a=3.7)
    atoms.calc = EMT()
    found = fit_equation_of_state(atoms)
    assert found.volume == pytest.approx(relax(atoms, cell=True, fmax=1e-4).volume, rel=1e-4)
    assert 3 < found.derivative < 7
    assert "B0" in found.summary()
    assert atoms.cell.lengths()[0] == pytest.approx(3.7 / np.sqrt(2))


def test_atoms_relax_at_each_volume() -> None:
    """Around a vacancy they move with the volume, and not in the same proportion."""
    atoms = bulk("Cu", a=3.59, cubic=True).repeat((2, 2, 1))[1:]
    atoms.calc = EMT()
    relaxed, clamped = (fit_equation_of_state(atoms, relaxation=way, points=5, fmax=0.01) for way in ("ions", "none"))
    largest = [max(np.abs(frame.get_forces()).max() for frame in found.frames) for found in (relaxed, clamped)]
    assert largest[0] < 0.01 < 0.1 < largest[1]
    assert relaxed.energy < clamped.energy


@pytest.mark.bad_input
def test_volumes_without_a_minimum() -> None:
    with pytest.raises(SimulationError, match=r"still falls at .* smallest volume: start nearer"):
        fit_equation_of_state(crystal(24.0), relaxation="none")
    with pytest.raises(SimulationError, match="largest volume"):
        fit_equation_of_state(crystal(17.0), relaxation="none")
    with pytest.raises(ConfigError, match="needs stress"):
        fit_equation_of_state(crystal())


KINDS = ("voigt", "reuss", "hill")


def copper() -> Atoms:
    atoms = bulk("Cu")
    atoms.calc = EMT()
    return atoms


STIFFNESS, A = 1.7, 4.0


def spring_crystal(cubic: bool = False) -> Atoms:
    atoms = bulk("Al", "fcc", a=A, cubic=cubic)
    atoms.calc = Springs(STIFFNESS, A / np.sqrt(2))
    return atoms


def hexagonal() -> Atoms:
    """Two atoms in the cell, which move against each other when it is sheared."""
    atoms = bulk("Cu", "hcp", a=2.54, c=4.15)
    atoms.calc = EMT()
    return atoms


@pytest.mark.parametrize("cubic", [False, True])
def test_springs_between_nearest_neighbors_of_fcc(cubic: bool) -> None:
    """``C11 = 2 C12 = 2 C44 = 2k/a`` (central forces without tension)."""
    found = elastic_constants(spring_crystal(cubic), strain=0.001)
    unit = STIFFNESS / A / units.GPa
    expected = unit * np.array([[2, 1, 1], [1, 2, 1], [1, 1, 2]])
    np.testing.assert_allclose(found.stiffness[:3, :3], expected, rtol=1e-5)
    np.testing.assert_allclose(found.stiffness[3:, 3:], unit * np.eye(3), atol=1e-4)
    np.testing.assert_allclose(found.stiffness[:3, 3:], 0.0, atol=1e-8)
    assert found.space_group == "Fm-3m"
    assert found.is_stable
    # Eigenvalues of a cubic stiffness: C11 + 2 C12, C11 − C12 twice, C44 three times.
    np.testing.assert_allclose(found.eigenvalues, unit * np.array([1, 1, 1, 1, 1, 4]), rtol=1e-4)


def test_the_bulk_modulus_of_copper_is_that_of_its_equation_of_state() -> None:
    found = elastic_constants(copper())
    c, curve = found.stiffness, fit_equation_of_state(copper())
    assert found.averages["bulk_hill"] == pytest.approx((c[0, 0] + 2 * c[0, 1]) / 3, rel=1e-9)
    assert curve.bulk_modulus == pytest.approx(found.averages["bulk_hill"], rel=3e-3)


def test_atoms_relax_under_strain() -> None:
    """Of a hexagonal crystal C66 = (C11 − C12)/2: what is measured says so only with the inner atoms at rest."""
    atoms = hexagonal()
    found = elastic_constants(atoms, symmetrize=False, fmax=1e-4)
    assert atoms == hexagonal()
    c = found.measured
    assert c[5, 5] == pytest.approx((c[0, 0] - c[0, 1]) / 2, rel=2e-3)
    clamped = elastic_constants(found.atoms, relaxation="none").stiffness
    assert clamped[5, 5] > 1.02 * c[5, 5]
    assert np.abs(found.stiffness - c).max() < 0.01 * c.max()


def test_axes_are_those_of_the_cell() -> None:
    plain = elastic_constants(copper())
    turned = copper()
    turned.rotate(45, "z", rotate_cell=True)
    found = elastic_constants(turned)
    c = plain.stiffness
    along = (c[0, 0] + c[0, 1]) / 2 + c[3, 3]  # C11 along [110]
    assert found.stiffness[0, 0] == pytest.approx(along, rel=1e-3)
    assert found.stiffness[5, 5] == pytest.approx((c[0, 0] - c[0, 1]) / 2, rel=1e-3)
    assert found.deviation < 0.2
    for name in ("bulk_hill", "shear_voigt", "shear_reuss", "young"):
        assert found.averages[name] == pytest.approx(plain.averages[name], rel=1e-3)


def test_averages_of_an_isotropic_solid() -> None:
    lame, shear = 60.0, 30.0
    c = np.diag([2 * shear] * 3 + [shear] * 3)
    c[:3, :3] += lame
    found = ElasticConstants(bulk("Cu"), c, c, np.zeros(6), 0.005, None).averages
    assert [found[f"bulk_{kind}"] for kind in KINDS] == pytest.approx([lame + 2 * shear / 3] * 3)
    assert [found[f"shear_{kind}"] for kind in KINDS] == pytest.approx([shear] * 3)
    assert found["anisotropy"] == pytest.approx(0.0, abs=1e-12)
    assert found["poisson"] == pytest.approx(lame / (2 * (lame + shear)))
    directions = np.array([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]])
    np.testing.assert_allclose(young_modulus(c, directions), found["young"])
    c[5] = c[:, 5] = 0.0  # no inverse
    found = ElasticConstants(bulk("Cu"), c, c, np.zeros(6), 0.005, None).averages
    assert np.isfinite(found["bulk_voigt"])
    assert np.isnan(found["bulk_hill"])


def test_a_crystal_that_is_none(tmp_path: Path) -> None:
    """Copper in a simple cubic lattice gives way to shear, and the results say so."""
    atoms = bulk("Cu", "sc", a=2.4)
    atoms.calc = EMT()
    found = elastic_constants(atoms, relaxation="none")
    assert not found.is_stable
    assert "NOT stable" in found.summary()
    found.write(tmp_path)
    written = json.loads((tmp_path / "elastic.json").read_text())
    assert written["stable"] is False
    assert np.array(written["stiffness_GPa"]).shape == (6, 6)
    assert (tmp_path / "elastic.png").stat().st_size > 1000


@pytest.mark.bad_input
def test_what_has_no_elastic_constants() -> None:
    with pytest.raises(ConfigError, match=r"set atoms\.calc"):
        elastic_constants(bulk("Cu"))
    molecule = Atoms("Cu2", positions=[[0, 0, 0], [2.3, 0, 0]], calculator=EMT())
    with pytest.raises(ConfigError, match="three periodic axes"):
        elastic_constants(molecule)
    far = bulk("Ar", a=5.0)
    far.calc = LennardJones(sigma=3.4, epsilon=0.01, rc=8.0)
    with pytest.raises(SimulationError, match="not relaxed after 1 steps"):
        elastic_constants(far, steps=1, fmax=1e-6)


needs_phonopy = pytest.mark.skipif(
    importlib.util.find_spec("phonopy") is None, reason="phonopy is not installed: pip install 'escaip[sim]'"
)


def known(wave: np.ndarray, mass: float) -> np.ndarray:
    """THz at a wave vector in 1/Å: eigenvalues of ``(k/m) Σ_R R̂ R̂ᵀ (1 − cos q·R)`` over the twelve neighbors."""
    total = np.zeros((3, 3))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            unit = np.zeros(3)
            unit[first], unit[second] = signs[0] / np.sqrt(2), signs[1] / np.sqrt(2)
            total += np.outer(unit, unit) * (1 - np.cos(wave @ unit * A / np.sqrt(2)))
    scale = STIFFNESS * constants.e / 1e-20 / (mass * constants.atomic_mass)
    return np.sqrt(np.maximum(0, scale * np.linalg.eigvalsh(total))) / (2 * np.pi) * 1e-12


@needs_phonopy
@pytest.mark.parametrize("cubic", [False, True])
def test_phonons_of_springs_between_nearest_neighbors_of_fcc(cubic: bool) -> None:
    found = crystal_phonons(spring_crystal(cubic), min_length=9.0, displacement=1e-3)
    assert len(found.primitive) == 1
    mass = found.primitive.get_masses()[0]
    largest = known(2 * np.pi / A * np.array([1.0, 0, 0]), mass).max()
    # √(8k/m) is the longitudinal mode at X and at L; transverse ones are √(4k/m) and √(2k/m).
    np.testing.assert_allclose(found.frequencies([0.5, 0.0, 0.5]), largest * np.sqrt([0.5, 0.5, 1.0]), rtol=1e-4)
    np.testing.assert_allclose(found.frequencies([0.5, 0.5, 0.5]), largest * np.sqrt([0.25, 0.25, 1.0]), rtol=1e-4)
    reciprocal = 2 * np.pi * found.primitive.cell.reciprocal().array
    expected = np.array([known(kpoint @ reciprocal, mass) for kpoint in found.bands.kpoints])
    np.testing.assert_allclose(found.bands.frequencies, expected, atol=2e-3)
    assert found.bands.labels[:4] == ["G", "X", "W", "K"]
    assert found.is_stable
    assert found.imaginary_share == 0


@needs_phonopy
def test_thermal_properties_follow_from_the_modes() -> None:
    found = crystal_phonons(spring_crystal(), min_length=9.0, temperatures=[0.0, 3000.0])
    weights = found.mesh_weights / found.mesh_weights.sum()
    energies = constants.h / constants.e * 1e12 * found.mesh_frequencies
    energies[energies < 1e-6] = np.nan  # acoustic modes at Γ
    assert found.zero_point_energy == pytest.approx(weights @ np.nansum(energies, 1) / 2, rel=1e-6)
    assert found.free_energy[0] == pytest.approx(found.zero_point_energy, rel=1e-4)
    assert found.heat_capacity[1] == pytest.approx(3 * units.kB, rel=2e-3)
    energy = found.free_energy[1] + 3000.0 * found.entropy[1]
    assert energy == pytest.approx(3 * units.kB * 3000.0, rel=2e-3)
    step = np.diff(found.dos_frequencies)
    assert float((found.dos[1:] * step).sum()) == pytest.approx(3.0, rel=0.02)


@needs_phonopy
def test_second_derivatives_and_displacements_agree(tmp_path: Path) -> None:
    atoms = copper()
    by_steps = crystal_phonons(atoms, supercell=(3, 3, 3), displacement=0.005)
    whole = crystal_phonons(atoms, supercell=(3, 3, 3), hessian=True)
    np.testing.assert_allclose(whole.bands.frequencies, by_steps.bands.frequencies, atol=0.02)
    by_steps.write(tmp_path)
    written = json.loads((tmp_path / "phonons.json").read_text())
    np.testing.assert_allclose(written["bands"]["frequencies_THz"], by_steps.bands.frequencies)
    assert {path.name for path in tmp_path.iterdir()} == {"bands.png", "phonons.json", "phonopy.yaml", "thermal.png"}
    import phonopy

    again = phonopy.load(tmp_path / "phonopy.yaml", log_level=0)
    again.run_qpoints([[0.5, 0.0, 0.5]])
    np.testing.assert_allclose(again.qpoints.frequencies[0], by_steps.frequencies([0.5, 0, 0.5]), atol=1e-4)


@needs_phonopy
def test_imaginary_modes_are_reported() -> None:
    """Copper in a simple cubic lattice gives way to shear."""
    atoms = bulk("Cu", "sc", a=2.4)
    atoms.calc = EMT()
    found = crystal_phonons(atoms, relaxation="none", supercell=(4, 4, 4), mesh=20.0)
    assert not found.is_stable
    assert found.lowest < -1
    assert 0 < found.imaginary_share < 1
    assert "NOT stable" in found.summary()
    assert "i" in found.summary().split("X")[1].split("\n")[0]


@needs_phonopy
def test_forces_of_the_perfect_supercell_are_no_answer() -> None:
    """Atoms a little off their places, as relaxations leave them: symmetry is found, and its forces are left out."""
    atoms = spring_crystal(cubic=True)
    atoms.positions[0] += [0.003, 0.001, 0.0]
    options = {"supercell": (2, 2, 2), "symprec": 0.02, "mesh": 20.0}
    found = crystal_phonons(atoms, relaxation="none", **options)
    assert found.residual_force > 0.01
    assert len(found.primitive) == 1
    mass = found.primitive.get_masses()[0]
    expected = known(2 * np.pi / A * np.array([1.0, 0, 0]), mass)
    np.testing.assert_allclose(found.frequencies([0.5, 0.0, 0.5]), expected, rtol=5e-3)
    assert crystal_phonons(atoms, fmax=1e-4, **options).residual_force < 2e-4


@pytest.mark.bad_input
def test_without_phonopy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "phonopy", None)
    with pytest.raises(ConfigError, match=r"phonons need phonopy: pip install 'escaip\[sim\]'"):
        crystal_phonons(spring_crystal())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("compute", "options", "message"),
    [
        (elastic_constants, {"relaxation": "cell"}, "relaxation is 'cell': choose full, ions, none"),
        (elastic_constants, {"strain": 0.0}, "strain is 0.0"),
        (elastic_constants, {"fmax": -1.0}, "fmax is -1.0"),
        (fit_equation_of_state, {"points": 4}, "points is 4"),
        (fit_equation_of_state, {"span": 0.9}, r"span is 0\.9"),
        pytest.param(crystal_phonons, {"supercell": (2, 2)}, r"is \(2, 2\): give three numbers", marks=needs_phonopy),
        pytest.param(crystal_phonons, {"supercell": (0, 2, 2)}, "each at least 1", marks=needs_phonopy),
        pytest.param(crystal_phonons, {"min_length": 0.0}, r"min_length is 0\.0", marks=needs_phonopy),
        pytest.param(crystal_phonons, {"displacement": -0.1}, r"displacement is -0\.1", marks=needs_phonopy),
    ],
)
def test_arguments_out_of_range(compute: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compute(copper(), **options)
