"""i-PI with the potential over its socket: ring polymers, a classical trajectory, virials, and what goes wrong."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import ase.build
import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.socketio import actualunixsocketname
from ase.md.verlet import VelocityVerlet

from escaip import EScAIPCalculator
from escaip.calculators import ipi
from escaip.calculators.ipi import run_ipi
from escaip.errors import ConfigError, DataError, SimulationError
from escaip.potential import Potential

Make = Callable[..., Potential]

DECK = Path(__file__).resolve().parents[2] / "md" / "ipi"
needs_ipi = pytest.mark.skipif(importlib.util.find_spec("ipi") is None, reason="i-PI is not installed: pip install ipi")

INPUT = """<simulation verbosity='low'>
  <output prefix='ipi'>
    <properties stride='1' filename='properties'> [ potential{{electronvolt}}, pressure_md{{gigapascal}} ] </properties>
    <trajectory stride='1' filename='place' format='xyz'> positions{{angstrom}} </trajectory>
  </output>
  <total_steps> {steps} </total_steps>
  <ffsocket mode='unix' name='escaip' pbc='False'> <address> escaip </address> <latency> 1e-4 </latency> </ffsocket>
  <system>
    <initialize nbeads='1'>
      <file mode='xyz'> start.xyz </file>
      <velocities mode='xyz'> velocities.xyz </velocities>
    </initialize>
    <forces> <force forcefield='escaip'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nve'> <timestep units='femtosecond'> 0.5 </timestep> </dynamics>
      <fixcom> False </fixcom>
    </motion>
  </system>
</simulation>
"""


def write_xyz(name: str, atoms: Atoms, values: np.ndarray, what: str) -> None:
    box = " ".join(str(x) for x in atoms.cell.cellpar())
    rows = [f"{s} {x:.15g} {y:.15g} {z:.15g}" for s, (x, y, z) in zip(atoms.symbols, values, strict=True)]
    Path(name).write_text(
        "\n".join([str(len(atoms)), f"# CELL(abcABC): {box} {what} cell{{angstrom}}", *rows, ""]), encoding="utf-8"
    )


def write_input(atoms: Atoms, steps: int) -> str:
    """A classical run from these positions and velocities, in the present folder."""
    atomic_time = units._aut * units.s
    write_xyz("start.xyz", atoms, atoms.positions, "positions{angstrom}")
    write_xyz("velocities.xyz", atoms, atoms.get_velocities() / units.Bohr * atomic_time, "velocities{atomic_unit}")
    Path("input.xml").write_text(INPUT.format(steps=steps), encoding="utf-8")
    return "input.xml"


@pytest.fixture
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def no_sockets_are_left() -> bool:
    prefix = Path(actualunixsocketname("escaip_"))
    return not list(prefix.parent.glob(f"{prefix.name}*"))


@needs_ipi
def test_the_deck_runs_four_beads(
    make_potential: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    potential = make_potential()
    potential.scale.fill_(0.1)
    potential.save("tiny.escaip")
    monkeypatch.setattr(sys, "argv", ["run.py", "tiny.escaip", "--steps", "4"])
    runpy.run_path(str(DECK / "run.py"), run_name="__main__")
    assert "4 steps of 4 beads" in capsys.readouterr().out
    assert "positions{angstrom} cell{angstrom}" in Path("start.xyz").read_text(encoding="utf-8")
    step, _, conserved, _, kinetic, energy = np.loadtxt("ipi.properties").T
    assert step.tolist() == [0, 1, 2, 3, 4]
    assert np.abs(conserved - conserved[0]).max() < 1e-3
    assert (kinetic > 0.0).all()
    atoms = ase.build.molecule("CH3CH2OH")
    atoms.calc = EScAIPCalculator(potential)
    # All beads start in one place; i-PI's electronvolt is off by 1e-7.
    assert energy[0] == pytest.approx(atoms.get_potential_energy(), rel=2e-7)
    assert abs(energy[4] - energy[0]) > 1e-6
    assert no_sockets_are_left()


@needs_ipi
@pytest.mark.usefixtures("_in_a_folder")
def test_a_classical_crystal_is_that_of_ase(make_potential: Make) -> None:
    """Energies, pressure and positions, to the seven digits of i-PI's units."""
    potential, atoms = make_potential(), ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.rattle(0.1, seed=0)
    atoms.calc = EScAIPCalculator(potential)
    atoms.set_momenta(np.random.default_rng(0).normal(size=atoms.positions.shape))
    moved = atoms.copy()
    moved.calc = EScAIPCalculator(potential)
    run_ipi(write_input(atoms, 10), moved)
    energy, pressure = np.loadtxt("ipi.properties").T
    start = atoms.get_stress(include_ideal_gas=True)[:3].mean()
    assert pressure[0] == pytest.approx(-start / units.GPa, rel=1e-5)
    assert energy[0] == pytest.approx(atoms.get_potential_energy(), rel=2e-7)
    VelocityVerlet(atoms, 0.5 * units.fs).run(10)
    assert energy[10] == pytest.approx(atoms.get_potential_energy(), rel=2e-7)
    np.testing.assert_allclose(moved.positions, atoms.positions, atol=1e-6)


# What asks once for energy and forces, in i-PI's stead: ASE's server of the same protocol.
SERVER = """
import sys, ase.io
from ase.calculators.socketio import SocketServer, actualunixsocketname
name = sys.argv[2].removeprefix(actualunixsocketname("")) + "escaip"
server = SocketServer(unixsocket=name, timeout=30)
found = server.calculate(ase.io.read("asked.xyz"))
server.close()
print(found["energy"])
"""


@pytest.mark.usefixtures("_in_a_folder")
def test_the_protocol_without_ipi(make_potential: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipi, "_command", lambda: [sys.executable, "-W", "ignore", "-c", SERVER])
    atoms = ase.build.molecule("H2O", vacuum=3.0)
    asked = atoms.copy()
    asked.rattle(0.1, seed=0)
    asked.write("asked.xyz", format="extxyz", columns=["symbols", "positions"], write_info=False)
    Path("input.xml").write_text(INPUT.format(steps=1), encoding="utf-8")
    atoms.calc = EScAIPCalculator(make_potential())
    run_ipi("input.xml", atoms)
    asked.calc = EScAIPCalculator(make_potential())
    answered = float(Path("input.xml.log").read_text(encoding="utf-8"))
    assert answered == pytest.approx(asked.get_potential_energy(), abs=1e-6)
    assert no_sockets_are_left()


@pytest.mark.bad_input
@pytest.mark.usefixtures("_in_a_folder")
def test_what_goes_wrong_is_said_and_nothing_is_left_running(
    make_potential: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms = ase.build.molecule("H2O", vacuum=3.0)
    atoms.calc = EScAIPCalculator(make_potential())
    Path("input.xml").write_text(INPUT.format(steps=1), encoding="utf-8")
    for text, said in (("<simulation>", "is no XML"), ("<simulation/>", "has 0 unix sockets")):
        Path("bad.xml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            run_ipi("bad.xml", atoms)
    with pytest.raises(ConfigError, match=r"none\.xml cannot be read"):
        run_ipi("none.xml", atoms)

    def instead(code: str) -> None:
        monkeypatch.setattr(ipi, "_command", lambda: [sys.executable, "-c", code])

    instead("print('no atoms'); raise SystemExit(3)")
    with pytest.raises(SimulationError, match=r"i-PI did not start \(no atoms\): input\.xml\.log has more"):
        run_ipi("input.xml", atoms)
    instead("import time; time.sleep(60)")
    with pytest.raises(SimulationError, match=r"no socket within 0\.2 s"):
        run_ipi("input.xml", atoms, wait=0.2)
    instead(SERVER + "\nprint('no more'); raise SystemExit(1)")
    atoms.write("asked.xyz", format="extxyz")
    with pytest.raises(SimulationError, match=r"i-PI stopped \(no more\)"):
        run_ipi("input.xml", atoms)

    def fails(*_: object, **__: object) -> None:
        raise DataError("atoms are in two places at once")

    monkeypatch.setattr(atoms.calc.potential, "forward", fails)
    atoms.calc.results = {}
    atoms.positions += 0.01
    with pytest.raises(DataError, match="in two places"):
        run_ipi("input.xml", atoms)
    assert no_sockets_are_left()


@pytest.mark.bad_input
@pytest.mark.usefixtures("_in_a_folder")
def test_without_ipi_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("input.xml").write_text(INPUT.format(steps=1), encoding="utf-8")
    monkeypatch.setattr(sys, "executable", "nowhere/python")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="pip install ipi"):
        run_ipi("input.xml", ase.build.molecule("H2O"))
