"""The i-PI deck: ring polymers with the potential over ASE's socket client."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.socketio import actualunixsocketname

from escaip import EScAIPCalculator
from escaip.potential import Potential

Make = Callable[..., Potential]
DECK = Path(__file__).resolve().parents[2] / "md" / "ipi" / "run.py"


@pytest.fixture
def model(make_potential: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Potential:
    monkeypatch.chdir(tmp_path)
    potential = make_potential()
    potential.scale.fill_(0.1)
    potential.save("tiny.escaip")
    return potential


def run_deck(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "tiny.escaip", *arguments])
    runpy.run_path(str(DECK), run_name="__main__")
    prefix = Path(actualunixsocketname("escaip_"))
    assert not list(prefix.parent.glob(f"{prefix.name}*"))


@pytest.mark.skipif(importlib.util.find_spec("ipi") is None, reason="i-PI is not installed: pip install ipi")
@pytest.mark.parametrize("periodic", [False, True])
def test_the_deck_runs_four_beads(
    model: Potential, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], periodic: bool
) -> None:
    atoms: Atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6) if periodic else ase.build.molecule("CH3CH2OH")
    atoms.write("atoms.extxyz")
    run_deck(monkeypatch, "atoms.extxyz", "--steps", "4")
    assert "4 steps of 4 beads" in capsys.readouterr().out
    step, _, conserved, _, kinetic, energy = np.loadtxt("ipi.properties").T
    assert step.tolist() == [0, 1, 2, 3, 4]
    assert np.abs(conserved - conserved[0]).max() < 1e-3
    assert (kinetic > 0.0).all()
    atoms.calc = EScAIPCalculator(model)
    # All beads start in one place; i-PI's electronvolt is off by 1e-7.
    assert energy[0] == pytest.approx(atoms.get_potential_energy(), rel=2e-7)
    assert abs(energy[4] - energy[0]) > 1e-6


@pytest.mark.bad_input
def test_without_ipi_there_is_one_line(model: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "nowhere/python")
    with pytest.raises(SystemExit, match="pip install ipi"):
        run_deck(monkeypatch)
