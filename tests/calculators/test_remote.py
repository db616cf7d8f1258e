"""Calculators in processes of another Python answer like ordinary ones."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT

from escaip.calculators import RemoteCalculator
from escaip.cli import main
from escaip.errors import ConfigError, SimulationError


def test_answers_are_those_of_the_calculator() -> None:
    copper = ase.build.bulk("Cu", cubic=True)
    copper.rattle(0.1, seed=0)
    own = copper.copy()
    own.calc, copper.calc = EMT(), RemoteCalculator("ase.calculators.emt:EMT")
    assert copper.calc.version.startswith("ase ")
    assert copper.get_potential_energy() == own.get_potential_energy()
    assert np.array_equal(copper.get_forces(), own.get_forces())
    assert np.array_equal(copper.get_stress(), own.get_stress())
    process = copper.calc._worker.process
    copper.calc.close()
    assert process.returncode is not None


def test_what_it_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    xenon = ase.build.bulk("Xe", "fcc", a=6.0)
    xenon.calc = RemoteCalculator("ase.calculators.emt:EMT")
    with pytest.raises(SimulationError, match="NotImplementedError: No EMT-potential for Xe"):
        xenon.get_potential_energy()
    copper = ase.build.bulk("Cu")
    copper.calc = xenon.calc  # goes on after a failure
    assert np.isfinite(copper.get_potential_energy())
    copper.calc._worker.process.kill()
    copper.rattle(0.1)
    with pytest.raises(SimulationError, match="has ended"):
        copper.get_potential_energy()
    monkeypatch.chdir(Path(__file__).parents[1] / "distil")
    ion = ase.build.molecule("OH")
    ion.info["charge"] = -1
    ion.calc = RemoteCalculator("teachers:Charged")
    assert ion.get_potential_energy() == -90.0
    with pytest.raises(PropertyNotImplementedError):
        ion.get_stress()
    with pytest.raises(ConfigError, match="calculator no_such:Thing: ModuleNotFoundError"):
        RemoteCalculator("no_such:Thing")


def test_threads_get_their_own_answers() -> None:
    calculator = RemoteCalculator("ase.calculators.emt:EMT")
    structures = [ase.build.bulk("Cu", a=3.4 + 0.05 * k) for k in range(8)]
    found: dict[int, float] = {}
    wrong: list[object] = []

    def ask(k: int) -> None:
        for _ in range(20):
            answer = calculator._worker.ask({"key": str(k), **_message(structures[k])}) or {"key": None}
            if answer["key"] != str(k):
                wrong.append(answer["key"])
                return
        found[k] = answer["frames"][0]["energy"]

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for k, atoms in enumerate(structures):
        atoms.calc = EMT()
        assert found[k] == atoms.get_potential_energy()


def _message(atoms: Atoms) -> dict[str, object]:
    from escaip.calculators.remote import message_of

    return {**message_of(atoms), "max_force": 1e9, "max_stress": 1e9}


def test_the_check_of_a_calculator_of_another_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--calculator", "ase.calculators.emt:EMT", "--python", sys.executable]
    ase.build.bulk("Cu").write(tmp_path / "copper.xyz")
    assert main([*words, "--structure", str(tmp_path / "copper.xyz"), "--out", str(tmp_path / "found.json")]) == 0
    assert "pass  forces: F = -dE/dr, some atoms" in capsys.readouterr().out
    assert (tmp_path / "found.json").is_file()
    assert main(["check", "example:organic", "--python", sys.executable]) == 2
    assert "--python is for --calculator" in capsys.readouterr().err
