"""A head registered from outside is trained, saved, evaluated, written and served, without a change to the package."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

from training_stand_ins import TINY, labelled_molecules

from escaip import EScAIPCalculator, load_potential
from escaip.cli import main
from escaip.nn.heads import HEADS, register_head
from escaip.types import TARGETS, Target, register_target

NAME = "dipole"


class DipoleHead(nn.Module):
    """Contributions of the atoms to a vector of the structure; not equivariant, which does not matter here."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 3)

    def forward(self, node: Tensor) -> Tensor:
        """Returns ``(N, 3)`` e·Å of ``(N, H)`` features."""
        out: Tensor = self.linear(node)
        return out


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Registers the target and its head, for these tests alone."""
    register_target(Target(NAME, per_atom=False, shape=(3,), unit="e·Å", reported_unit="me·Å", reported_factor=1e3))
    register_head(NAME)(DipoleHead)
    yield
    del TARGETS[NAME], HEADS[NAME]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and data, whose dipole is 0.1 e·Å per hydrogen along each axis."""
    monkeypatch.chdir(tmp_path)
    frames = labelled_molecules(20)
    for atoms in frames:
        atoms.calc.results[NAME] = np.full(3, 0.1 * float((atoms.numbers == 1).sum()))
    ase.io.write("molecules.extxyz", frames)
    recipe = {
        "model": {
            "architecture": {**TINY, "heads": [NAME]}, "learning_rate": 1e-2,
            "losses": {"properties": {NAME: {"weight": 10.0, "kind": "l2"}}},
        },
        "data": {"train": "molecules.extxyz", "split": {"by": "structure", "val": 4}, "batch_size": 4},
        "ema": {"decay": 0.9},
        "evaluation": {"max_structures": 0},
        "trainer": {"max_epochs": 20, "accelerator": "cpu", "log_every_n_steps": 1, "check_val_every_n_epoch": 20},
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path


def test_from_training_to_molecular_dynamics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "toy.yaml"]) == 0
    assert "dipole MAE (me·Å)" in capsys.readouterr().out
    run = folder / "runs" / "toy" / "latest"
    with (run / "metrics.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    errors = [float(row["train/dipole_mae_me_A"]) for row in rows if row["train/dipole_mae_me_A"]]
    assert np.mean(errors[-8:]) < 0.5 * np.mean(errors[:8])
    (validated,) = (row for row in rows if row["val/dipole_mae_me_A"])
    assert float(validated["val_baseline/dipole_mae_me_A"]) == pytest.approx(300.0, rel=0.3)  # mean label of H2O to CH4
    assert float(validated["val/dipole_mae_me_A"]) < float(validated["val_baseline/dipole_mae_me_A"])

    model = str(run / "best.ckpt")
    potential = load_potential(model, device="cpu")
    potential.save("toy.escaip")
    frames = ase.io.read("molecules.extxyz", ":")
    found = [each.properties[NAME] for each in load_potential("toy.escaip", device="cpu").predict(frames)]
    assert all(torch.equal(x, y.properties[NAME]) for x, y in zip(found, potential.predict(frames), strict=True))

    assert main(["evaluate", "toy.escaip", "molecules.extxyz"]) == 0
    assert "dipole (me·Å)" in capsys.readouterr().out
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))[NAME]
    labels = np.array([atoms.calc.results[NAME] for atoms in frames])
    assert report["errors"]["mae"] == pytest.approx(np.abs(torch.stack(found).numpy() - labels).mean(), rel=1e-5)
    assert report["baselines"]["zero"]["mae"] == pytest.approx(np.abs(labels).mean())
    assert main(["predict", "toy.escaip", "molecules.extxyz", "--out", "predicted.extxyz"]) == 0
    written = ase.io.read("predicted.extxyz", ":")
    np.testing.assert_allclose([atoms.calc.results[NAME] for atoms in written], torch.stack(found), atol=1e-6)

    atoms = frames[0].copy()
    atoms.calc = EScAIPCalculator("toy.escaip", device="cpu")
    np.testing.assert_allclose(atoms.get_dipole_moment(), found[0], atol=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model.architecture.heads", "[]"], "losses.properties.dipole needs a head that predicts dipole"),
        (["--model.losses.properties", "{}"], "head 'dipole' has no loss"),
        (["--model.losses.properties", "{energy: {weight: 1.0}}"], "write losses.energy"),
        (["--model.losses.properties", "{quadrupole: {weight: 1.0}}"], "quadrupole is no registered target"),
        (["--model.losses.properties.dipole.average", "atom"], "dipole has one value per structure"),
        (["--model.losses.properties.dipole.kind", "l3"], "loss kind 'l3'"),
        (["--data.train", "bare.extxyz"], "no training structure has dipole"),
    ],
)
def test_settings_that_do_not_fit(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    ase.io.write("bare.extxyz", labelled_molecules(20))
    assert main(["fit", "--config", "toy.yaml", *options]) == 2
    assert text in capsys.readouterr().err
