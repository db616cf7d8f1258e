"""Results state the model that they come from, its digest and the level of theory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.build
import ase.db
import ase.io
import pytest
import torch
from ase.calculators.emt import EMT
from tiny import make_potential

from escaip.calculators import CommitteeCalculator, DispersionCalculator, EScAIPCalculator
from escaip.cli import main
from escaip.files import sha256
from escaip.potential import PotentialMetadata
from escaip.simulate.output import freeze


@pytest.fixture
def origin(model: Path) -> dict[str, str]:
    return {"model": "tiny.escaip", "model_sha256": sha256(model), "level_of_theory": "random numbers"}


def stated(values: dict[str, Any]) -> dict[str, Any]:
    names = ("model", "model_sha256", "level_of_theory", "dataset", "dispersion")
    return {name: values[name] for name in names if name in values}


@pytest.mark.parametrize(
    ("command", "out"),
    [
        ("predict {model} {data} --out a.extxyz", "a.extxyz"),
        ("relax {model} {data} --all --fmax 100 --out a.extxyz", "a.extxyz"),
        ("relax {model} {data} --fmax 100 --out a.extxyz", "a.extxyz"),
        ("md {model} {data} --frame 1 --steps 1 --quiet --out a.extxyz", "a.extxyz"),
        ("md {model} {data} --frame 1 --steps 1 --quiet --out a.traj", "a.traj"),
        ("evaluate {model} {data} --no-plots --out a", "a/report.json"),
        ("vibrations {model} {data} --frame 1 --relax none --out a", "a/vibrations.json"),
    ],
)
def test_files_state_their_origin(
    model: Path, labelled: Path, origin: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str,
    out: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(command.format(model=model, data=labelled).split()) == 0
    if out.endswith("json"):
        written = json.loads(Path(out).read_text())
        assert Path(written.pop("model")).name == origin.pop("model")
        assert stated(written) == origin
    else:
        for frame in ase.io.read(out, ":"):
            assert stated(frame.info) == origin


def test_calculators_state_their_origin_to_databases(
    model: Path, second: Path, origin: dict[str, str], tmp_path: Path
) -> None:
    several = {
        "model": "tiny.escaip; second.escaip", "model_sha256": f"{origin['model_sha256']}; {sha256(second)}",
        "level_of_theory": "random numbers",
    }  # fmt: skip
    pytest.importorskip("dftd3")
    for calculator, expected in (
        (EScAIPCalculator(model, dtype="float32"), {**origin, "dtype": "torch.float32", "precision": "highest"}),
        (CommitteeCalculator([model, second]), {**several, "dtype": "torch.float64", "precision": "highest"}),
        (EScAIPCalculator(make_potential()), {"dtype": "torch.float64", "precision": "highest"}),
        (
            DispersionCalculator(EScAIPCalculator(model), "pbe"),
            {**origin, "dispersion": "d3bj of pbe", "dtype": "torch.float64", "precision": "highest"},
        ),
    ):
        atoms = ase.build.molecule("H2O")
        atoms.calc = calculator
        atoms.get_forces()
        with ase.db.connect(tmp_path / "rows.db") as database:
            row = database.get(id=database.write(atoms))
        assert row.calculator_parameters == expected
        frame = freeze(atoms)
        assert stated(frame.info) == stated(expected)
        frame.calc = EMT()  # results of another program
        assert not stated(freeze(frame).info)


def test_the_set_whose_references_were_chosen_is_stated() -> None:
    potential = make_potential(metadata=PotentialMetadata(datasets=("a", "b"), level_of_theory="a: PBE; b: HF"))
    potential.set_references(torch.zeros(2, 119, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    calculator = EScAIPCalculator(potential, dataset="b")
    assert calculator.origin == {"level_of_theory": "a: PBE; b: HF", "dataset": "b"}
