"""The potentials of md/potentials are what their cards say."""

from __future__ import annotations

from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
from ase import units
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from escaip import EScAIPCalculator, load_potential
from escaip.cli import main
from escaip.errors import UnsupportedElementError
from escaip.simulate import read_structure

FOLDER = Path(__file__).resolve().parents[2] / "md" / "potentials"
FILES = sorted(FOLDER.glob("*.escaip"))

pytestmark = pytest.mark.skipif(not FILES, reason="needs a checkout")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_has_a_card_and_says_what_it_is(file: Path) -> None:
    card = (FOLDER / "README.md").read_text("utf-8").partition(f"## `{file.name}`")[2].partition("\n## ")[0]
    for row in ("trained on", "labels", "command", "not for"):
        assert f"\n| {row} |" in card, row
    assert file.stat().st_size < 16e6
    potential = load_potential(file, device="cpu")
    assert f"{sum(p.numel() for p in potential.parameters()):,}".replace(",", " ") in card
    assert str(potential.metadata.level_of_theory) in card
    assert potential.metadata.provenance["data"]


def test_ethanol() -> None:
    atoms = ase.build.molecule("CH3CH2OH")
    atoms.calc = EScAIPCalculator(FOLDER / "organic.escaip", device="cpu")
    assert BFGS(atoms, logfile=None).run(fmax=0.01, steps=60)
    assert atoms.get_distance(0, 1) == pytest.approx(1.522, abs=0.01)  # C-C
    assert atoms.get_distance(1, 2) == pytest.approx(1.413, abs=0.01)  # C-O
    atoms.set_velocities(np.random.default_rng(0).normal(scale=0.03, size=(9, 3)))
    atoms.set_momenta(atoms.get_momenta() - atoms.get_momenta().mean(axis=0))
    before = atoms.get_total_energy()
    VelocityVerlet(atoms, 0.5 * units.fs).run(60)
    assert atoms.get_total_energy() == pytest.approx(before, abs=5e-3)


def test_silicon() -> None:
    energies = []
    lengths = np.linspace(5.40, 5.54, 5)
    calculator = EScAIPCalculator(FOLDER / "silicon.escaip", device="cpu", dtype="float64")
    for length in lengths:
        crystal = ase.build.bulk("Si", "diamond", a=length)
        crystal.calc = calculator
        energies.append(crystal.get_potential_energy())
    third, second, first, _ = np.polyfit(lengths - 5.47, energies, 3)
    assert -first / (2 * second) == pytest.approx(0.0, abs=0.01)
    a0 = 5.47 - first / (2 * second)
    bulk_modulus = 2 * second / (9 * a0 * 0.25) / units.GPa  # V = a³/4, V d²E/dV² = E''/(9 a/4)
    assert bulk_modulus == pytest.approx(87.8, rel=0.05)
    assert third < 0  # softer when stretched


def test_they_have_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert len(read_structure("example:ethanol")) == 9
    assert load_potential("example:silicon", device="cpu").metadata.elements == (14,)
    assert main(["info", "example:organic"]) == 0
    assert "GFN2-xTB" in capsys.readouterr().out
    relaxed = str(tmp_path / "relaxed.xyz")
    assert main(["relax", "example:organic", "example:ethanol", "--fmax", "0.5", "--out", relaxed]) == 0
    assert main(["info", "example:gold"]) == 1
    assert "example:gold does not exist: examples are organic, silicon, " in capsys.readouterr().err


def test_others_are_refused() -> None:
    copper = ase.build.bulk("Cu")
    copper.calc = EScAIPCalculator(FOLDER / "silicon.escaip", device="cpu")
    with pytest.raises(UnsupportedElementError):
        copper.get_forces()
