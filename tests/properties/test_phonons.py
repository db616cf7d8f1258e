"""Phonons: springs with a dispersion that is known in closed form, and EMT copper."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from scipy import constants

from escaip.errors import ConfigError
from escaip.properties import crystal_phonons
from escaip.properties.phonons import THZ_TO_MEV

STIFFNESS, A = 1.7, 4.0
REASON = "phonopy is not installed: pip install 'escaip[sim]'"


@pytest.fixture
def _phonopy() -> None:
    pytest.importorskip("phonopy", reason=REASON)


def spring_crystal(springs: Any, cubic: bool = False) -> Atoms:
    atoms = bulk("Al", "fcc", a=A, cubic=cubic)
    atoms.calc = springs(STIFFNESS, A / np.sqrt(2))
    return atoms


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


@pytest.mark.usefixtures("_phonopy")
@pytest.mark.parametrize("cubic", [False, True])
def test_springs_between_nearest_neighbors_of_fcc(springs: Any, cubic: bool) -> None:
    found = crystal_phonons(spring_crystal(springs, cubic), min_length=9.0, displacement=1e-3)
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


@pytest.mark.usefixtures("_phonopy")
def test_thermal_properties_follow_from_the_modes(springs: Any) -> None:
    found = crystal_phonons(spring_crystal(springs), min_length=9.0, temperatures=[0.0, 50.0, 3000.0])
    weights = found.mesh_weights / found.mesh_weights.sum()
    energies = 1e-3 * THZ_TO_MEV * found.mesh_frequencies
    energies[energies < 1e-6] = np.nan  # acoustic modes at Γ
    assert found.zero_point_energy == pytest.approx(weights @ np.nansum(energies, 1) / 2, rel=1e-6)
    assert found.free_energy[0] == pytest.approx(found.zero_point_energy, rel=1e-4)
    for index, temperature in ((1, 50.0), (2, 3000.0)):
        ratio = energies / (units.kB * temperature)
        free = energies / 2 + units.kB * temperature * np.log1p(-np.exp(-ratio))
        assert found.free_energy[index] == pytest.approx(weights @ np.nansum(free, 1), rel=1e-5)
        heat = units.kB * (ratio / 2 / np.sinh(ratio / 2)) ** 2
        assert found.heat_capacity[index] == pytest.approx(weights @ np.nansum(heat, 1), rel=1e-5)
    assert found.heat_capacity[2] == pytest.approx(3 * units.kB, rel=2e-3)
    step = np.diff(found.dos_frequencies)
    assert float((found.dos[1:] * step).sum()) == pytest.approx(3.0, rel=0.02)


@pytest.mark.usefixtures("_phonopy")
def test_second_derivatives_and_displacements_agree(tmp_path: Path) -> None:
    atoms = bulk("Cu")
    atoms.calc = EMT()
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


@pytest.mark.usefixtures("_phonopy")
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


@pytest.mark.usefixtures("_phonopy")
def test_forces_of_the_perfect_supercell_are_no_answer(springs: Any) -> None:
    """Atoms a little off their places, as relaxations leave them: symmetry is found, and its forces are left out."""
    atoms = spring_crystal(springs, cubic=True)
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
def test_without_phonopy(springs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "phonopy", None)
    with pytest.raises(ConfigError, match=r"phonons need phonopy: pip install 'escaip\[sim\]'"):
        crystal_phonons(spring_crystal(springs))


@pytest.mark.bad_input
@pytest.mark.usefixtures("_phonopy")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"supercell": (2, 2)}, r"supercell is \(2, 2\): give three numbers"),
        ({"supercell": (0, 2, 2)}, "each at least 1"),
        ({"min_length": 0.0}, r"min_length is 0\.0"),
        ({"displacement": -0.1}, r"displacement is -0\.1"),
    ],
)
def test_arguments_out_of_range(springs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        crystal_phonons(spring_crystal(springs), **options)
