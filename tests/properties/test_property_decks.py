"""The decks of properties in md/ run in a short form, from any folder; EMT stands for the model."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

DECKS = Path(__file__).resolve().parents[2] / "md"
Deck = Callable[..., str]


@pytest.fixture
def run_deck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Deck:
    def calculator(model: str, **options: Any) -> EMT:
        assert model == "model.escaip"
        assert options == {"dtype": "float64"}
        return EMT()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("escaip.calculators.ase.EScAIPCalculator", calculator)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, "model.escaip", *arguments])
        runpy.run_path(str(DECKS / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def copper(tmp_path: Path) -> str:
    ase.io.write(tmp_path / "copper.extxyz", ase.build.bulk("Cu"))
    return "copper.extxyz"


def test_crystal_decks(run_deck: Deck, copper: str, tmp_path: Path) -> None:
    assert "meV/atom above the minimum" in run_deck("eos.py", copper, "--points", "5")
    assert "with clamped atoms: bulk 134" in run_deck("elastic.py", copper)
    for name in ("eos", "elastic"):
        assert (tmp_path / name / f"{name}.json").is_file()


def test_phonon_deck(run_deck: Deck, copper: str, tmp_path: Path) -> None:
    pytest.importorskip("phonopy", reason="phonopy is not installed: pip install 'escaip[sim]'")
    assert "highest mode at Γ" in run_deck("phonons.py", copper, "--supercell", "2", "2", "2", "--mesh", "20")
    assert (tmp_path / "phonons" / "phonopy.yaml").is_file()


def test_path_deck(run_deck: Deck, hop: Callable[[], tuple[Atoms, Atoms, Atoms]], tmp_path: Path) -> None:
    names = []
    for index, atoms in enumerate(hop()[:2]):
        atoms.calc = None
        names.append(f"{index}.traj")
        ase.io.write(tmp_path / names[-1], atoms)
    assert "eV forward" in run_deck("neb.py", *names, "--images", "1", "--fmax", "0.1")
    assert (tmp_path / "neb" / "neb.extxyz").is_file()
