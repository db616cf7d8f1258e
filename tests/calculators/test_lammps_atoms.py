"""What LAMMPS has of each atom: energies and virials, in its units and frame, at the steps at which it asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from lammps_cases import ENERGY_UNITS, molecule, moving, needs_lammps, orthogonal, slab, triclinic, turned

from escaip import EScAIPCalculator
from escaip.calculators.lammps import LammpsDriver
from escaip.potential import Potential

Make = Callable[..., Potential]
Start = Callable[..., LammpsDriver]

# Potential alone, and with the kinetic part, which is what the pressure has.
COMPUTES = """
compute e all pe/atom
compute v all stress/atom NULL fix
compute w all stress/atom NULL
compute sum all reduce sum c_w[1] c_w[2] c_w[3] c_w[4] c_w[5] c_w[6]
dump d all custom {interval} /dev/null id c_e c_v[*] c_w[*]
"""
PRESSURES = ("pxx", "pyy", "pzz", "pxy", "pxz", "pyz")
ROWS, COLUMNS = [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]  # LAMMPS's order


def of_atoms(driver: LammpsDriver, compute: str, kind: int) -> np.ndarray:
    """A compute's vector (1) or array (2), ordered by id."""
    ids = driver.lammps.numpy.extract_atom("id", nelem=driver.lammps.extract_setting("nlocal"))
    return driver.lammps.numpy.extract_compute(compute, 1, kind)[np.argsort(ids)]


def stresses_of(potential: Potential, atoms: Atoms) -> np.ndarray:
    """``(N, 6)`` eV, of each atom the stress times the volume in LAMMPS's frame and order, from ASE's calculator."""
    atoms = atoms.copy()
    atoms.calc = EScAIPCalculator(potential)
    if atoms.pbc.any():
        found = atoms.get_volume() * atoms.get_stresses(voigt=False)
    else:
        found = -atoms.calc.get_property("virials", atoms)
    return (turned(atoms).T @ found @ turned(atoms))[:, ROWS, COLUMNS]


@needs_lammps
@pytest.mark.parametrize("style", ["metal", "real"])
@pytest.mark.parametrize("make", [orthogonal, triclinic, slab, molecule], ids=lambda make: make.__name__)
def test_the_numbers_of_ase(make: Callable[[], Atoms], style: str, start: Start, make_potential: Make) -> None:
    atoms, potential = make(), make_potential()
    driver = start(atoms, potential, style)
    driver.commands(COMPUTES.format(interval=1) + "thermo_style custom step press c_sum[*]\nrun 0")
    unit = ENERGY_UNITS[style]
    # pressure times volume, which LAMMPS makes of energies with a factor of its own
    stresses = of_atoms(driver, "v", 2) * unit / driver.lammps.extract_global("nktv2p")
    expected = stresses_of(potential, atoms)
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(stresses, expected, rtol=1e-9, atol=1e-11)
    pressures = np.array([driver.lammps.get_thermo(name) for name in PRESSURES])
    total = driver.lammps.numpy.extract_compute("sum", 0, 1)
    np.testing.assert_allclose(total, -pressures * driver.lammps.get_thermo("vol"), rtol=1e-9, atol=1e-6)
    energies = of_atoms(driver, "e", 1) * unit
    atoms.calc = EScAIPCalculator(potential)
    np.testing.assert_allclose(energies, atoms.get_potential_energies(), atol=1e-10)


@needs_lammps
@pytest.mark.parametrize("style", ["metal", "real"])
def test_they_belong_to_their_atoms_after_a_run_and_sum_to_the_pressure(
    style: str, start: Start, make_potential: Make
) -> None:
    """Atoms have changed places, the cell its shape, and what moves has a pressure of its own."""
    potential, atoms = make_potential(), moving(triclinic())
    driver = start(atoms, potential, style)
    time = 1.0 if style == "metal" else 1000.0  # ps, in LAMMPS's unit
    driver.commands(COMPUTES.format(interval=20) + "thermo_style custom step press vol c_sum[*]")
    driver.commands(f"fix npt all npt temp 600 600 {0.1 * time} tri 0 0 {time}\ntimestep {0.002 * time}\nrun 20")
    ids = driver.lammps.numpy.extract_atom("id", nelem=len(atoms))
    assert (np.diff(ids) < 0).any()
    found = driver.structure()
    assert 1e-3 < abs(found.get_volume() / atoms.get_volume() - 1.0) < 0.2
    unit = ENERGY_UNITS[style] / driver.lammps.extract_global("nktv2p")
    stresses, with_kinetic = of_atoms(driver, "v", 2) * unit, of_atoms(driver, "w", 2) * unit
    expected = stresses_of(potential, found)
    assert np.ptp(expected, axis=0).min() > 1e-2
    np.testing.assert_allclose(stresses, expected, rtol=1e-6, atol=1e-9)
    assert np.abs(with_kinetic - stresses).max() > 0.1 * np.abs(stresses).max()
    pressures = np.array([driver.lammps.get_thermo(name) for name in PRESSURES])
    total = driver.lammps.numpy.extract_compute("sum", 0, 1)
    np.testing.assert_allclose(total, -pressures * driver.lammps.get_thermo("vol"), rtol=1e-6)


@needs_lammps
@pytest.mark.parametrize("tells", [True, False])
def test_virials_are_evaluated_at_the_steps_that_ask_and_all_in_one(
    tells: bool, start: Start, make_potential: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LAMMPS that does not tell gets them at every step."""
    import escaip.potential.potential

    driver = start(moving(orthogonal()))
    extract, steps, evaluations = driver.lammps.extract_global, [], []
    original, forward = escaip.potential.potential.virials_of, driver.calculator.potential.forward

    def virials_of(*arguments: Any) -> Any:
        steps.append(extract("ntimestep"))
        return original(*arguments)

    def counted(*arguments: Any, **options: Any) -> Any:
        evaluations.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(escaip.potential.potential, "virials_of", virials_of)
    driver.calculator.potential.forward = counted  # type: ignore[method-assign]
    if not tells:
        driver.lammps.extract_global = lambda name: None if name == "vflag_atom" else extract(name)
    driver.commands("fix 1 all nve\nrun 2")
    assert steps == ([0] if tells else [0, 1, 2])  # 0 is what LAMMPS says before anything has asked
    # By dumps, and by whatever thermo might print: at the first and the last step of a run.
    driver.commands(COMPUTES.format(interval=3) + "thermo 100\nrun 6")
    assert steps == ([0, 2, 3, 6, 8] if tells else list(range(9)))
    assert len(evaluations) == (10 if tells else 9)  # step 2 is known but for the virials
    assert np.isfinite(of_atoms(driver, "v", 2)).all()


@needs_lammps
def test_direct_forces_have_none(start: Start, make_potential: Make) -> None:
    driver = start(orthogonal(), make_potential(forces="direct"))
    driver.commands(COMPUTES.format(interval=1) + "run 0")
    assert np.isnan(of_atoms(driver, "v", 2)).all()
    assert np.isfinite(of_atoms(driver, "e", 1)).all()
