"""Commands and decks: what they print and write, with a model and with EMT in its place, and how they fail."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import ase.build
import ase.io
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

from escaip.cli import main
from escaip.potential import Potential

Capture = pytest.CaptureFixture[str]
DECKS = Path(__file__).resolve().parents[2] / "md"


@pytest.fixture(scope="module")
def model(make_potential: Callable[..., Potential], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.escaip"
    make_potential().save(path)
    return path


@pytest.fixture
def copper(tmp_path: Path) -> Path:
    ase.io.write(tmp_path / "copper.extxyz", ase.build.bulk("Cu"))
    return tmp_path / "copper.extxyz"


@pytest.fixture
def ends(hop: Callable[[], tuple[Atoms, Atoms, Atoms]], tmp_path: Path) -> list[str]:
    """Files of the two ends of a path."""
    names = [str(tmp_path / f"{index}.traj") for index in range(2)]
    for name, atoms in zip(names, hop()[:2], strict=True):
        atoms.calc = None
        ase.io.write(name, atoms)
    return names


@pytest.fixture
def _emt(monkeypatch: pytest.MonkeyPatch) -> None:
    """EMT in the place of the model, which would be evaluated in float64."""

    def calculator(model: str, **options: object) -> EMT:
        assert options == {"dtype": "float64"}
        return EMT()

    monkeypatch.setattr("escaip.calculators.ase.EScAIPCalculator", calculator)


def test_with_a_model(model: Path, copper: Path, tmp_path: Path, capsys: Capture) -> None:
    """Random weights, float64: nothing to rely on, but every number is there."""
    molecule = tmp_path / "water.xyz"
    ase.io.write(molecule, ase.build.molecule("H2O"))
    arguments = [str(model), str(molecule), "--relax", "none", "--out", str(tmp_path / "v")]
    assert main(["vibrations", *arguments]) == 0
    assert len(json.loads((tmp_path / "v" / "vibrations.json").read_text())["frequencies_cm-1"]) == 3
    assert main(["elastic", str(model), str(copper), "--relax", "none", "--out", str(tmp_path / "e")]) == 0
    written = json.loads((tmp_path / "e" / "elastic.json").read_text())
    assert written["stiffness_GPa"][0][0] == pytest.approx(written["stiffness_GPa"][2][2], rel=1e-6)
    assert "rotations taken out" in capsys.readouterr().out


@pytest.mark.bad_input
def test_one_line_for_every_error(model: Path, copper: Path, tmp_path: Path, capsys: Capture) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    arguments = [str(model), str(copper)]
    cases: list[tuple[list[str], int, str]] = [
        (["eos", *arguments, "--points", "3"], 2, "points is 3"),
        (["elastic", *arguments, "--out", str(taken)], 2, "is a file: name a folder"),
        (["elastic", str(model), "none.xyz"], 1, "structure none.xyz does not exist"),
        (["elastic", "none.ckpt", str(copper)], 1, "model file none.ckpt does not exist"),
        (["neb", *arguments], 2, "required: final"),
        (["vibrations", *arguments, "--relax", "full"], 2, "--relax is 'full': choose ions, none"),
    ]
    for command, status, message in cases:
        assert main(command) == status
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1, printed.err
        assert printed.out == ""


RUNS = [
    ("eos", ["--points", "5"], "B0"),
    ("elastic", [], "Fm-3m"),
    ("phonons", ["--supercell", "2", "2", "2", "--mesh", "20"], "no imaginary mode"),
    ("neb", ["--images", "1", "--fmax", "0.1"], "eV forward"),
]
FOOTERS = {
    "eos": "meV/atom above the minimum",
    "elastic": "with clamped atoms: bulk 134",
    "phonons": "highest mode at Γ",
}


@pytest.mark.usefixtures("_emt")
@pytest.mark.parametrize("deck", [False, True], ids=["command", "deck"])
@pytest.mark.parametrize(("name", "options", "printed"), RUNS)
def test_properties_of_copper_and_of_a_path(
    name: str, options: list[str], printed: str, deck: bool, copper: Path, ends: list[str], tmp_path: Path,
    capsys: Capture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name == "phonons":
        pytest.importorskip("phonopy", reason="phonopy is not installed: pip install 'escaip[sim]'")
    structures = ends if name == "neb" else [str(copper)]
    monkeypatch.chdir(tmp_path)
    if deck:
        monkeypatch.setattr(sys, "argv", [name, "model.escaip", *structures, *options])
        runpy.run_path(str(DECKS / f"{name}.py"), run_name="__main__")
        assert FOOTERS.get(name, printed) in capsys.readouterr().out
        assert (tmp_path / name / f"{name}.json").is_file()
        return
    out = tmp_path / name  # by default
    assert main([name, "example:organic", *structures, *options]) == 0
    shown = capsys.readouterr().out
    assert printed in shown
    assert shown.endswith(f"wrote {name}\n")
    written = json.loads((out / f"{name}.json").read_text())
    assert written["saddle_image"] == 1 if name == "neb" else written["formula"] == "Cu"
    assert list(out.glob("*.png"))
    if name == "neb":
        assert main(["neb", "example:organic", ends[0], ends[0], "--out", str(out)]) == 1
        assert "the ends are one structure" in capsys.readouterr().err
