"""Elastic constants: against springs, whose constants are known, and second differences of energies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from escaip.errors import ConfigError, SimulationError
from escaip.properties import ElasticConstants, elastic_constants, fit_equation_of_state
from escaip.properties.elastic import young_modulus
from escaip.simulate import relax

KINDS = ("voigt", "reuss", "hill")


def copper(cubic: bool = False) -> Atoms:
    atoms = bulk("Cu", cubic=cubic)
    atoms.calc = EMT()
    return atoms


def hexagonal() -> Atoms:
    """Two atoms in the cell, which move against each other when it is sheared."""
    atoms = bulk("Cu", "hcp", a=2.54, c=4.15)
    atoms.calc = EMT()
    return atoms


def second_difference(atoms: Atoms, strain: np.ndarray, step: float = 0.004, ions: bool = False) -> float:
    """GPa: ``∂²E/∂s² / V`` along ``s · strain``."""

    def energy(size: float) -> float:
        moved = atoms.copy()
        moved.set_cell(atoms.cell.array @ (np.eye(3) + size * strain), scale_atoms=True)
        moved.calc = atoms.calc
        return relax(moved, fmax=1e-5).energy if ions else float(moved.get_potential_energy())

    return (energy(step) + energy(-step) - 2 * energy(0.0)) / step**2 / atoms.get_volume() / units.GPa


def voigt_strain(**components: float) -> np.ndarray:
    places = {"xx": (0, 0), "yy": (1, 1), "zz": (2, 2), "yz": (1, 2), "xz": (0, 2), "xy": (0, 1)}
    strain = np.zeros((3, 3))
    for name, value in components.items():
        row, column = places[name]
        strain[row, column] += value / 2
        strain[column, row] += value / 2
    return strain


@pytest.mark.parametrize("cubic", [False, True])
def test_springs_between_nearest_neighbors_of_fcc(springs: Any, cubic: bool) -> None:
    """``C11 = 2 C12 = 2 C44 = 2k/a`` (central forces without tension)."""
    stiffness, a = 1.7, 4.0
    atoms = bulk("Al", "fcc", a=a, cubic=cubic)
    atoms.calc = springs(stiffness, a / np.sqrt(2))
    found = elastic_constants(atoms, strain=0.001)
    unit = stiffness / a / units.GPa
    expected = unit * np.array([[2, 1, 1], [1, 2, 1], [1, 1, 2]])
    np.testing.assert_allclose(found.stiffness[:3, :3], expected, rtol=1e-5)
    np.testing.assert_allclose(found.stiffness[3:, 3:], unit * np.eye(3), atol=1e-4)
    np.testing.assert_allclose(found.stiffness[:3, 3:], 0.0, atol=1e-8)
    assert found.space_group == "Fm-3m"
    assert found.is_stable
    # Eigenvalues of a cubic stiffness: C11 + 2 C12, C11 − C12 twice, C44 three times.
    np.testing.assert_allclose(found.eigenvalues, unit * np.array([1, 1, 1, 1, 1, 4]), rtol=1e-4)


def test_copper_against_energies() -> None:
    found = elastic_constants(copper())
    c, rest = found.stiffness, found.atoms
    assert c[0, 0] == pytest.approx(second_difference(rest, voigt_strain(xx=1.0)), rel=2e-3)
    assert c[3, 3] == pytest.approx(second_difference(rest, voigt_strain(yz=1.0)), rel=2e-3)
    both = second_difference(rest, voigt_strain(xx=1.0, yy=1.0))
    assert 2 * (c[0, 0] + c[0, 1]) == pytest.approx(both, rel=2e-3)
    curve = fit_equation_of_state(copper())
    assert found.averages["bulk_hill"] == pytest.approx((c[0, 0] + 2 * c[0, 1]) / 3, rel=1e-9)
    assert curve.bulk_modulus == pytest.approx(found.averages["bulk_hill"], rel=3e-3)


def test_atoms_relax_under_strain() -> None:
    """Of a hexagonal crystal C66 = (C11 − C12)/2: what is measured says so only with the inner atoms at rest."""
    atoms = hexagonal()
    found = elastic_constants(atoms, symmetrize=False, fmax=1e-4)
    assert atoms == hexagonal()
    c = found.measured
    assert c[5, 5] == pytest.approx((c[0, 0] - c[0, 1]) / 2, rel=2e-3)
    assert c[5, 5] == pytest.approx(second_difference(found.atoms, voigt_strain(xy=1.0), ions=True), rel=5e-3)
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
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relaxation": "cell"}, "relaxation is 'cell': choose full, ions, none"),
        ({"strain": 0.0}, "strain is 0.0"),
        ({"fmax": -1.0}, "fmax is -1.0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        elastic_constants(copper(), **options)


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
