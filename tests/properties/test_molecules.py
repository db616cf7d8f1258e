"""Vibrations and nudged elastic bands: springs, counts of modes, and a hop whose saddle is known by symmetry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms, FixedPlane
from pair_potential import Springs
from scipy import constants

from escaip import EScAIPCalculator
from escaip.errors import ConfigError, SimulationError
from escaip.potential import Potential
from escaip.properties import minimum_energy_path, molecular_vibrations
from escaip.simulate import relax


def wavenumber(stiffness: float, mass: float) -> float:
    """``√(k/m) / 2πc`` in cm⁻¹, for eV/Å² and amu, in SI units."""
    newton_per_meter = stiffness * constants.e / 1e-20
    return float(np.sqrt(newton_per_meter / (mass * constants.atomic_mass)) / (2 * np.pi * constants.c * 100))


def test_a_diatomic_spring() -> None:
    stiffness = 30.0
    atoms = Atoms("HF", positions=[[0, 0, 0.1], [0.3, 0.5, 0.9]], calculator=Springs(stiffness, 0.95))
    found = molecular_vibrations(atoms, fmax=1e-6, step=1e-3)
    light, heavy = atoms.get_masses()
    assert found.frequencies.shape == (1,)
    assert found.num_rigid == 5
    assert found.frequencies[0] == pytest.approx(wavenumber(stiffness, light * heavy / (light + heavy)), rel=1e-5)
    assert found.zero_point_energy == pytest.approx(
        0.5 * constants.h * constants.c * 100 * found.frequencies[0] / constants.e, rel=1e-6
    )
    # The mode is along the bond, and the center of mass stays.
    bond = found.atoms.positions[1] - found.atoms.positions[0]
    assert np.abs(np.cross(found.modes[0], bond)).max() < 1e-6
    assert np.abs(atoms.get_masses() @ found.modes[0]).max() < 1e-6


def test_a_linear_chain_of_three() -> None:
    """Stretches of A–B–A: ``k/m_A`` and ``k (1/m_A + 2/m_B)``; its bends cost nothing."""
    stiffness = 20.0
    atoms = Atoms("OCO", positions=[[-1.2, 0, 0], [0, 0, 0], [1.2, 0, 0]], calculator=Springs(stiffness, 1.2))
    found = molecular_vibrations(atoms, step=1e-4)
    oxygen, carbon, _ = atoms.get_masses()
    assert len(found.energies) == 4
    np.testing.assert_allclose(
        found.frequencies[2:],
        [wavenumber(stiffness, oxygen), wavenumber(stiffness, 1 / (1 / oxygen + 2 / carbon))],
        rtol=1e-4,
    )
    assert np.abs(found.frequencies[:2]).max() < 1.0


@pytest.mark.parametrize(("name", "count"), [("H2O", 3), ("CO2", 4), ("CH4", 9), ("H", 0)])
def test_counts_of_modes(name: str, count: int) -> None:
    atoms = molecule(name)
    atoms.calc = EMT()
    found = molecular_vibrations(atoms, relaxation="none")
    assert len(found.energies) == count
    assert found.num_rigid == 3 * len(atoms) - count
    weighted = found.modes.reshape(count, 3 * len(atoms)) * np.sqrt(np.repeat(atoms.get_masses(), 3))
    np.testing.assert_allclose(weighted @ weighted.T, np.eye(count), atol=1e-10)


def test_water_at_rest_is_a_minimum(tmp_path: Path) -> None:
    atoms = molecule("H2O")
    atoms.calc = EMT()
    before = atoms.copy()
    found = molecular_vibrations(atoms)
    assert atoms == before
    assert found.largest_force < 1e-3
    assert found.num_imaginary == 0
    assert found.rigid_energy < 10
    found.write(tmp_path)
    written = json.loads((tmp_path / "vibrations.json").read_text())
    assert written["frequencies_cm-1"] == pytest.approx(found.frequencies.tolist())
    frames = ase.io.read(tmp_path / "modes.extxyz", ":")
    assert len(frames) == 3 * 20
    assert frames[25].info["mode"] == 2
    largest = np.linalg.norm(frames[5].positions - found.atoms.positions, axis=1).max()
    assert largest == pytest.approx(0.25, rel=1e-6)  # a quarter of the period of the first mode
    assert (tmp_path / "vibrations.png").stat().st_size > 1000


def test_thermochemistry() -> None:
    """Entropies of argon, 154.846 J/mol/K at 298.15 K and 1 bar, and of a crystal that does not turn or move."""
    argon = molecular_vibrations(Atoms("Ar", calculator=LennardJones()), relaxation="none").thermochemistry()
    entropy = argon.get_entropy(298.15, 1e5, verbose=False)
    assert entropy / units.kB * constants.R == pytest.approx(154.846, abs=0.02)
    found = molecular_vibrations(Atoms(bulk("Cu", cubic=True), calculator=EMT()))
    assert len(found.energies) == 9  # all but translations
    assert found.rigid_energy < 0.1
    assert found.energies.min() > 10
    oscillators = found.thermochemistry()
    assert oscillators.get_ZPE_correction() == pytest.approx(found.zero_point_energy)
    lowest = found.atoms.get_potential_energy() + found.zero_point_energy
    assert oscillators.get_internal_energy(1.0, verbose=False) == pytest.approx(lowest, rel=1e-9)


def test_a_saddle_has_an_imaginary_mode(hop: Callable[[], tuple[Atoms, Atoms, Atoms]]) -> None:
    """The adsorbate alone moves: three modes each, all real in the hollow, one imaginary on the bridge."""
    hollow, _, bridge = hop()
    for atoms, imaginary in ((hollow, 0), (bridge, 1)):
        atoms.set_constraint(FixAtoms(range(len(atoms) - 1)))
        found = molecular_vibrations(atoms, fmax=1e-3)
        assert len(found.energies) == 3
        assert found.num_rigid == 0
        assert found.num_imaginary == imaginary
        assert np.abs(found.modes[:, :-1]).max() == 0
    assert "i" in found.summary().splitlines()[1]
    assert "1 imaginary" in found.summary()
    with pytest.raises(ConfigError, match="1 modes are imaginary"):
        found.thermochemistry()


def test_second_derivatives_of_a_model_are_used(make_potential: Callable[..., Potential]) -> None:
    atoms = molecule("CH3OH")
    atoms.calc = EScAIPCalculator(make_potential())
    exact, by_steps = (
        molecular_vibrations(atoms, relaxation="none", finite_differences=steps, step=1e-4) for steps in (False, True)
    )
    np.testing.assert_allclose(exact.energies, by_steps.energies, atol=1e-3)
    assert exact.asymmetry < 1e-12 < by_steps.asymmetry
    atoms.calc = EScAIPCalculator(make_potential(forces="direct"))
    with pytest.raises(ConfigError, match="--finite-differences"):
        molecular_vibrations(atoms, relaxation="none")
    found = molecular_vibrations(atoms, relaxation="none", finite_differences=True)
    assert found.asymmetry > 1e-2
    assert "were asymmetric by" in found.summary()
    assert "asymmetric" not in exact.summary()


@pytest.mark.bad_input
def test_what_has_no_vibrations() -> None:
    atoms = Atoms("H2", positions=[[0, 0, 0], [0.8, 0, 0]], calculator=Springs(1.0, 0.8))
    with pytest.raises(ConfigError, match=r"relax it first \(escaip relax --cell\)"):
        molecular_vibrations(atoms, relaxation="full")
    with pytest.raises(ConfigError, match=r"step is 0\.0"):
        molecular_vibrations(atoms, step=0.0)
    atoms.set_constraint(FixedPlane(0, (0, 0, 1)))
    with pytest.raises(ConfigError, match="constraint FixedPlane"):
        molecular_vibrations(atoms)
    atoms.set_constraint(FixAtoms([0, 1]))
    with pytest.raises(ConfigError, match="every atom is held"):
        molecular_vibrations(atoms)


Hop = Callable[[], tuple[Atoms, Atoms, Atoms]]


def test_the_barrier_is_that_of_the_bridge(hop: Hop, tmp_path: Path) -> None:
    """Gold on Al(100): by symmetry the bridge, relaxed, is the saddle."""
    initial, final, bridge = hop()
    before = initial.copy(), final.copy()
    expected = relax(bridge, fmax=0.005).energy - relax(initial, fmax=0.005).energy
    calls: list[float] = []
    found = minimum_energy_path(initial, final, images=3, fmax=0.02, report=lambda step, force: calls.append(force))
    assert found.forward == pytest.approx(expected, abs=2e-3)
    assert found.backward == pytest.approx(found.forward, abs=1e-4)
    assert found.saddle == 2
    assert found.climbed
    np.testing.assert_allclose(found.energies, found.energies[::-1], atol=1e-3)
    assert found.largest_force <= 0.02
    assert calls[-1] == found.largest_force
    assert len(calls) >= found.steps
    assert (initial, final) == before
    found.write(tmp_path)
    images = ase.io.read(tmp_path / "neb.extxyz", ":")
    assert [image.get_potential_energy() for image in images] == pytest.approx(found.energies.tolist(), abs=1e-7)
    assert json.loads((tmp_path / "neb.json").read_text())["barrier_forward_eV"] == found.forward
    assert (tmp_path / "neb.png").stat().st_size > 1000


def test_an_even_band_needs_the_climbing_image(hop: Hop) -> None:
    """No image of four is at the middle: the climbing one goes there, the highest of a plain band stays below."""
    initial, final, _ = hop()
    plain = minimum_energy_path(initial, final, images=2, climb=False)
    climbing = minimum_energy_path(initial, final, images=2)
    assert climbing.forward > plain.forward + 0.05
    assert "need not be the saddle" in plain.summary()
    assert "climbing image" in climbing.summary()


def test_the_way_back_is_the_same(hop: Hop) -> None:
    """Ends of different energy: what is up for one is down for the other."""
    initial, final, _ = hop()
    initial.symbols[0] = final.symbols[0] = "Pt"
    there = minimum_energy_path(initial, final, images=3)
    final.calc = EMT()
    back = minimum_energy_path(final, initial, images=3)
    assert there.forward == pytest.approx(back.backward, abs=5e-3)
    assert there.backward == pytest.approx(back.forward, abs=5e-3)
    assert there.reaction_energy == pytest.approx(there.forward - there.backward, abs=1e-12)
    assert abs(there.reaction_energy) > 0.01


@pytest.mark.bad_input
def test_ends_that_do_not_belong_together(hop: Hop) -> None:
    initial, final, _ = hop()
    with pytest.raises(ConfigError, match="same atoms in the same order"):
        minimum_energy_path(initial, final[::-1])
    wider = final.copy()
    wider.set_cell(final.cell * 1.01)
    with pytest.raises(ConfigError, match="the ends have different cells"):
        minimum_energy_path(initial, wider)
    with pytest.raises(SimulationError, match="the ends are one structure"):
        minimum_energy_path(initial, initial)
    with pytest.raises(ConfigError, match=r"set atoms\.calc"):
        minimum_energy_path(initial.copy(), final)
    with pytest.raises(ConfigError, match="cell is constant along a path"):
        minimum_energy_path(initial, final, relaxation="full")
    with pytest.raises(ConfigError, match="images is 0"):
        minimum_energy_path(initial, final, images=0)
    with pytest.raises(ConfigError, match="optimizer is 'newton'"):
        minimum_energy_path(initial, final, optimizer="newton")
    with pytest.raises(SimulationError, match="the band is not converged after 2 steps"):
        minimum_energy_path(initial, final, relaxation="none", steps=2, fmax=0.001)
