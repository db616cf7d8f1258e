"""The numbers of an evaluation against the same numbers by hand."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ase.io
import numpy as np
import pytest
import torch
from tiny import make_potential

from escaip import EScAIPCalculator
from escaip.cli import main
from escaip.data import collate, open_source
from escaip.errors import DataError
from escaip.evaluate import EvaluationReport, evaluate, evaluate_into
from escaip.evaluate.plots import draw
from escaip.evaluate.report import Records, compute_report
from escaip.evaluate.run import rotation_error
from escaip.potential import Potential, PotentialMetadata
from escaip.potential.loading import load_potential


def evaluate_files(model: Path, data: Path, out: Path, **options: Any) -> EvaluationReport:
    return evaluate_into(out, load_potential(model), open_source(data), {}, plots=False, **options)


def by_hand(model: Path, data: Path) -> list[dict[str, Any]]:
    """Labels and the calculator's answers, structure by structure."""
    rows = []
    for atoms in ase.io.read(data, ":"):
        labels = atoms.calc.results
        free = np.ones(len(atoms), dtype=bool)
        for constraint in atoms.constraints:
            free[constraint.index] = False
        bare = atoms.copy()
        bare.set_constraint()
        bare.calc = EScAIPCalculator(model)
        rows.append({
            "n": len(atoms), "free": free, "numbers": atoms.numbers,
            "energy": bare.get_potential_energy() - labels["energy"], "label": labels["energy"],
            "forces": bare.get_forces() - labels["forces"] if "forces" in labels else None,
            "force_label": labels.get("forces"), "found": bare.get_forces(),
            "stress": bare.get_stress() - labels["stress"] if "stress" in labels else None,
        })  # fmt: skip
    return rows


def test_every_number_equals_the_one_by_hand(model: Path, labelled: Path, tmp_path: Path) -> None:
    report = evaluate_files(model, labelled, tmp_path / "out", max_atoms=10)
    rows = by_hand(model, labelled)
    per_atom = np.array([row["energy"] / row["n"] for row in rows])
    forces = np.concatenate([row["forces"] for row in rows if row["forces"] is not None])
    label = np.concatenate([row["force_label"] for row in rows if row["forces"] is not None])
    found = np.concatenate([row["found"] for row in rows if row["forces"] is not None])
    numbers = np.concatenate([row["numbers"] for row in rows if row["forces"] is not None])
    assert report.num_structures == 5
    assert report.energy.rmse == pytest.approx(np.sqrt(np.mean([row["energy"] ** 2 for row in rows])))
    assert report.energy_per_atom.errors.mae == pytest.approx(np.abs(per_atom).mean())
    means = np.array([row["label"] / row["n"] for row in rows])
    assert report.energy_per_atom.baselines["mean"].mae == pytest.approx(np.abs(means - means.mean()).mean())
    references = make_potential().element_references.numpy()
    linear = [(references[row["numbers"]].sum() - row["label"]) / row["n"] for row in rows]
    assert report.energy_per_atom.baselines["references"].mae == pytest.approx(np.abs(linear).mean())
    assert report.forces.errors.mae == pytest.approx(np.abs(forces).mean())
    assert report.forces.errors.rmse == pytest.approx(np.sqrt((forces**2).mean()))
    assert report.forces.errors.largest == pytest.approx(np.abs(forces).max())
    assert report.forces.errors.count == forces.size
    assert report.forces.baselines["zero"].mae == pytest.approx(np.abs(label).mean())
    cosine = (label * found).sum(1) / np.linalg.norm(label, axis=1) / np.linalg.norm(found, axis=1)
    assert report.force_cosine == pytest.approx(cosine.mean())
    assert report.forces_by_element["O"].mae == pytest.approx(np.abs(forces[numbers == 8]).mean())
    assert set(report.forces_by_element) == {"H", "C", "O", "Cu"}
    stress = rows[-1]["stress"][[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    assert report.stress.errors.mae == pytest.approx(np.abs(stress).mean())
    assert report.energy_forces_within_threshold == 0.0
    assert report.rotation_error is None
    largest = [np.abs(row["forces"]).max() if row["forces"] is not None else 0.0 for row in rows]
    assert report.worst[0][1] == pytest.approx(max(largest))
    assert f":{int(np.argmax(largest))}" in report.worst[0][0] or str(int(np.argmax(largest))) in report.worst[0][0]


def test_free_atoms_only(model: Path, labelled: Path, tmp_path: Path) -> None:
    report = evaluate_files(model, labelled, tmp_path / "out", free_atoms_only=True)
    rows = [row for row in by_hand(model, labelled) if row["forces"] is not None]
    free = np.concatenate([row["forces"][row["free"]] for row in rows])
    assert report.forces.errors.count == free.size
    assert report.forces.errors.mae == pytest.approx(np.abs(free).mean())


def test_packing_does_not_change_the_numbers(labelled: Path) -> None:
    sizes = (1, 7, 1000, None)
    reports = [evaluate(make_potential(), open_source(labelled), max_atoms=size)[0].to_dict() for size in sizes]
    for report in reports:
        del report["seconds"]
    for other in reports[1:]:
        assert json.dumps(_rounded(other)) == json.dumps(_rounded(reports[0]))


def test_records_are_in_the_order_of_the_file(labelled: Path) -> None:
    """Larger than what is recorded together, and smaller ones in between: packing reorders them."""
    potential, once = make_potential(), list(open_source(labelled))
    structures = [data for _ in range(60) for data in once]
    _, records = evaluate(potential, iter(structures))
    assert records.structure_id == tuple(data.structure_id for data in structures)
    assert records.numbers.tolist() == [z for data in structures for z in data.atomic_numbers.tolist()]
    start = 0
    for index, data in enumerate(once):
        with torch.no_grad():
            alone = potential(collate([data]), compute_stress=True, create_graph=False)
        stop = start + data.num_nodes
        assert records.predictions["energy"][index] == pytest.approx(float(alone.energy[0]), abs=1e-10)
        np.testing.assert_allclose(records.predictions["forces"][start:stop], alone.forces, rtol=0, atol=1e-10)
        np.testing.assert_allclose(records.predictions["stress"][index], alone.stress[0], rtol=0, atol=1e-10)
        assert records.reference_energy[index] == float(potential.element_references[data.atomic_numbers].sum())
        start = stop


def test_less_at_once_where_memory_runs_out(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(make_potential(), open_source(labelled))[0].to_dict()
    forward = Potential.forward

    def limited(self: Potential, batch: Any, **options: Any) -> Any:
        if len(batch.atomic_numbers) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, **options)

    monkeypatch.setattr(Potential, "forward", limited)
    with pytest.warns(UserWarning, match=r"out of memory with \d structures"):
        found = evaluate(make_potential(), open_source(labelled))[0].to_dict()
    del found["seconds"], expected["seconds"]
    assert json.dumps(_rounded(found)) == json.dumps(_rounded(expected))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def records(energy_error: list[float], force_error: list[float]) -> Records:
    """Two-atom structures whose force error sits on one component."""
    size = len(energy_error)
    forces = np.zeros((2 * size, 3))
    found = forces.copy()
    found[::2, 1] = force_error
    return Records(
        structure_id=tuple(f"s{i}" for i in range(size)), num_atoms=np.full(size, 2),
        numbers=np.ones(2 * size, dtype=int), fixed=np.zeros(2 * size, dtype=bool),
        structure=np.repeat(np.arange(size), 2), reference_energy=np.zeros(size),
        labels={"energy": np.zeros(size), "forces": forces, "stress": np.full((size, 3, 3), np.nan)},
        predictions={"energy": np.array(energy_error), "forces": found, "stress": np.full((size, 3, 3), np.nan)},
    )  # fmt: skip


def test_energy_and_forces_within_threshold() -> None:
    report = compute_report(records([0.019, 0.021, -0.019, 0.0], [0.029, 0.0, -0.031, 0.0]))
    assert report.energy_forces_within_threshold == 0.5
    assert [name for name, _, _ in report.worst] == ["s2", "s0", "s1", "s3"]
    assert report.stress is None


def test_plots_are_drawn_whatever_is_missing() -> None:
    for found in (records([0.1], [0.0]), records([np.nan, np.nan], [0.1, 0.2])):
        for figure in draw(found).values():
            figure.savefig(io.BytesIO())


def test_the_command(model: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    assert main(["evaluate", str(model), str(labelled), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "predicting zero" in printed.out
    assert printed.err == ""
    assert sorted(path.name for path in out.iterdir()) == ["errors.png", "parity.png", "report.json"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    report = json.loads((out / "report.json").read_text())
    assert report["forces"]["errors"]["count"] == 3 * 18
    assert report["num_structures"] == 5


def test_the_command_takes_atoms_at_once_and_shows_progress_on_a_terminal(
    model: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", str(model), str(labelled), "--out", str(tmp_path / "out"), "--no-plots", "--max-atoms"]
    assert main([*command, "0"]) == 2
    assert capsys.readouterr().err == "escaip: error: max_atoms is 0: it must be at least 1\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*command, "7"]) == 0
    assert "structure" in capsys.readouterr().err


def test_direct_forces_have_a_rotation_error(direct_model: Path, labelled: Path, tmp_path: Path) -> None:
    report = evaluate_files(direct_model, labelled, tmp_path)
    assert report.rotation_error > 1e-6
    assert rotation_error(make_potential(), list(open_source(labelled))) < 1e-10  # of derivatives of an energy
    assert "rotation error" in report.table()
    assert report.stress is None


def test_tables_for_notebooks(direct_model: Path, labelled: Path, tmp_path: Path) -> None:
    report = evaluate_files(direct_model, labelled, tmp_path)
    words = " ".join(ElementTree.fromstring(report._repr_html_()).itertext()).split()
    assert sorted(words) == sorted(report.table().split())
    potential = make_potential(metadata=PotentialMetadata((1, 8), "PBE & <D3>", ("water",)))
    rows = {row[0].text: row[1].text for row in ElementTree.fromstring(potential._repr_html_())}
    count = sum(weight.numel() for weight in potential.parameters())
    assert rows == {
        "model": f"EScAIP, {count:,} parameters, conservative forces", "elements": "H O",
        "level of theory": "PBE & <D3>", "data sets": "water", "cutoff": "4 Å", "device": "cpu, float64",
    }  # fmt: skip


@pytest.mark.bad_input
def test_no_labels_or_no_structures(model: Path, molecule: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no structure has an energy, force or stress label"):
        evaluate_files(model, molecule, tmp_path / "out")
    with pytest.raises(DataError, match="0 structures"):
        evaluate(make_potential(), [])
    assert not (tmp_path / "out").exists()
