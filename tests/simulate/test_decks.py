"""Every deck in md/ runs as it stands, in a short form, from any folder."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import ase.io
import pytest
import torch

from escaip.potential import Potential
from escaip.simulate import read_log, read_structure

DECKS = Path(__file__).resolve().parents[2] / "md"


@pytest.fixture
def model(make_potential: Callable[..., Potential], tmp_path: Path) -> Path:
    potential = make_potential(dtype=torch.float32)
    potential.scale.fill_(0.1)  # random forces that hardly push
    potential.save(tmp_path / "tiny.escaip")
    return tmp_path / "tiny.escaip"


Deck = Callable[..., str]


@pytest.fixture
def run_deck(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Deck:
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, str(model), *arguments])
        runpy.run_path(str(DECKS / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["nve.py", "nvt.py", "npt.py"])
def test_dynamics_decks(name: str, run_deck: Deck, tmp_path: Path) -> None:
    printed = run_deck(name, "--steps", "20")
    assert "20 steps, 0.010 ps" in printed
    stem = name.removesuffix(".py")
    assert read_log(tmp_path / f"{stem}.csv")["step"].tolist() == [0, 10, 20]
    assert len(ase.io.read(tmp_path / f"{stem}.extxyz", ":")) == 3
    if name == "nve.py":
        assert "energy drift" in printed
    if name == "npt.py":
        assert "g/cm³" in printed


def test_relaxation_deck(run_deck: Deck, tmp_path: Path) -> None:
    assert "largest force" in run_deck("relax.py", "--steps", "5")
    structure = DECKS / "structures" / "InP.cif"
    run_deck("relax.py", str(structure), "--cell", "--steps", "2", "--out", "inp.extxyz")
    assert len(ase.io.read(tmp_path / "inp.extxyz")) == 8


def test_starting_structures_are_sound() -> None:
    names = sorted(path.name for path in (DECKS / "structures").iterdir())
    assert {"InP.cif", "ethanol.xyz", "water.extxyz"} <= set(names)
    assert all(len(read_structure(DECKS / "structures" / name)) > 1 for name in names)
