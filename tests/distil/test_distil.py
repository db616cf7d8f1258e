"""A whole distillation, what it leaves, how it goes on; and plans that are refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_stand_ins import TINY

from escaip.cli import main
from escaip.data.store import Store
from escaip.distil.labels import Labeler
from escaip.distil.plan import DistilPlan
from escaip.distil.run import distil
from escaip.distil.structures import make_bases
from escaip.errors import ConfigError, DataError, TrainingError
from escaip.files import list_configs, try_lock
from escaip.potential import load_potential

PLAN: dict[str, Any] = {
    "name": "coins",
    "seed": 1,
    "teacher": {"level_of_theory": "EMT", "licence": "LGPL", "citation": ["Jacobsen 1996"], "max_force": 30.0},
    "bases": {
        "metals": {"prototypes": ["A1", "A2"], "elements": ["Cu", "Ag"], "relax": 5},
        "pairs": {"dimers": ["Cu", "Ag"], "points": 4},
    },
    "structures": {"strained": {"of": ["metals"], "count": 8, "atoms": 8, "strain": 0.1, "rattle": 0.1}},
    "dynamics": {"hot": {"of": ["metals"], "count": 2, "atoms": 8, "temperatures": [900], "steps": 20, "every": 10}},
    "student": {
        "config": "inp",
        "steps": 3,
        "options": {"model.architecture": {**TINY, "preset": None}, "evaluation.max_structures": 0},
    },
    "rounds": {
        "count": 1, "steps": 10, "add": 3, "surprise": 0.01, "stop": 0.0,
        "dynamics": {
            "own": {"of": ["metals"], "count": 2, "atoms": 8, "rattle": 0.3, "relax": 0, "steps": 6, "every": 3}
        },
    },
    "hold_out": {"by": "base", "val": 0.2, "test": 0.2},
}  # fmt: skip
EMT = Labeler("ase.calculators.emt:EMT", max_force=30.0)


def plan(tmp_path: Path, **changes: Any) -> DistilPlan:
    file = tmp_path / "plan.yaml"
    content = copy.deepcopy(PLAN)
    del content["student"]["options"]["model.architecture"]["preset"]
    file.write_text(yaml.safe_dump({**content, **changes}), "utf-8")
    return DistilPlan.read(file)


@pytest.mark.filterwarnings("ignore")  # spglib's
def test_from_a_calculator_to_a_potential(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, chosen = tmp_path / "out", plan(tmp_path)
    made = distil(chosen, out, EMT, workers=2)
    said = capsys.readouterr().out
    assert "round 1: " in said
    assert made.model == out / "coins.escaip"
    potential = load_potential(made.model)
    assert potential.metadata.level_of_theory == "EMT"
    assert sorted(potential.metadata.elements) == [29, 47]

    stores = {part: Store(made.data / part) for part in ("train", "val", "test")}
    names = {part: [store[k].structure_id for k in range(len(store))] for part, store in stores.items()}
    together = [name for part in names.values() for name in part]
    assert len(set(together)) == len(together) == sum(made.frames.values())
    assert any("~round-0" in name for name in together)
    groups = {part: {store[k].group for k in range(len(store))} for part, store in stores.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not groups[one] & groups[other]
    manifest = stores["train"].manifest
    assert manifest["licence"] == "LGPL"
    assert manifest["teacher"]["version"].startswith("ase ")

    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["errors"]["all"]["forces"] > 0
    assert report["frames"] == made.frames
    labels = (out / "labels" / "teacher.jsonl").read_bytes()
    again = distil(chosen, out, EMT, workers=2)  # everything is there
    assert again == made
    assert "jobs to do" not in capsys.readouterr().out
    assert (out / "labels" / "teacher.jsonl").read_bytes() == labels

    # Further structures keep the labels that are there, and train anew.
    more = {"strained": {**PLAN["structures"]["strained"], "count": 10}}
    distil(plan(tmp_path, structures=more), out, EMT, labels_only=True)
    assert (out / "labels" / "teacher.jsonl").read_bytes().startswith(labels)
    assert "structures and dynamics: 2 of 12 jobs to do" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_what_stops_a_distillation(tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = {"rounds": {}, "dynamics": {}, "bases": {"pairs": {"dimers": ["Cu"], "points": 12}}, "structures": {}}
    chosen = plan(tmp_path, **small, hold_out={"by": "job"})
    assert distil(chosen, out, EMT, labels_only=True).model is None
    lock = try_lock(out / "lock")
    assert lock is not None
    with lock, pytest.raises(DataError, match="another process works in it"):
        distil(chosen, out, EMT)
    with pytest.raises(DataError, match="a teacher with another calculator: choose another folder"):
        distil(chosen, out, Labeler("ase.calculators.lj:LennardJones", max_force=30.0))
    with pytest.raises(DataError, match="leaves no frame for"):
        distil(plan(tmp_path, **small), out, EMT)
    student = {**PLAN["student"], "options": {"model.no_such": 1}}
    with pytest.raises(TrainingError, match=r"train\.log: the training ended with status 1: .*no_such"):
        distil(plan(tmp_path, **small, hold_out={"by": "job"}, student=student), out, EMT)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("teachers", {}, "teachers is unknown: entries are name, teacher"),
        ("teacher", {}, "teacher.level_of_theory is missing"),
        ("teacher", "EMT", "teacher is 'EMT': write a mapping"),
        ("seed", "one", "seed is 'one': write a whole number"),
        ("bases.metals.prototypes", [], "bases.metals: give one of prototypes, smiles, dimers and file"),
        ("bases.metals.elements", [False], "bases.metals.elements is False: write text"),
        ("bases.metals.formulas", ["MgO"], "bases.metals: prototypes need elements or formulas"),
        ("bases.metals.conformers", 3, "bases.metals: conformers is not for prototypes"),
        ("bases.pairs.relax", 5, "bases.pairs: relax is not for dimers"),
        ("structures.strained.of", ["metal"], "structures.strained.of: there is no base 'metal': bases are metals"),
        ("structures.strained.strain", 0.7, "structures.strained: strain is 0.7"),
        ("structures.strained.cluster", True, None),
        ("structures.strained.density", 1.0, "structures.strained: density needs copies"),
        ("structures.metals", {"of": ["pairs"], "count": 1}, "'metals' names two entries"),
        ("dynamics.hot.temperatures", [0], "dynamics.hot: temperatures are"),
        ("student.config", "no_such_recipe", "'no_such_recipe' is neither a file nor a recipe"),
        ("rounds.members", 1, "rounds.members is 1"),
        ("rounds.dynamics", {}, "rounds.dynamics is missing"),
        ("hold_out.by", "luck", "hold_out.by is 'luck': choose base or job"),
        ("hold_out.val", 0.9, "hold_out: val must be above 0"),
    ],
)
def test_plans_that_are_refused(tmp_path: Path, place: str, value: Any, message: str | None) -> None:
    content = copy.deepcopy(PLAN)
    *parents, last = place.split(".")
    inner = content
    for key in parents:
        inner = inner[key]
    inner[last] = value
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(content), "utf-8")
    if message is None:
        DistilPlan.read(file)
        return
    with pytest.raises(ConfigError, match=message) as error:
        DistilPlan.read(file)
    assert str(file) in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list_configs("distil"))
def test_shipped_plans_are_sound(name: str) -> None:
    shipped = DistilPlan.read(name)
    assert shipped.name == name
    assert shipped.rounds.count > 0
    for base, entry in shipped.bases.items():
        if entry.smiles:
            pytest.importorskip("rdkit")
        assert make_bases(base, dataclasses.replace(entry, count=min(entry.count or 2, 2)), 0)


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(tmp_path)
    words = ["distil", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--calculator"]
    assert main([*words, "no_such_module:Thing"]) == 2
    assert "calculator no_such_module:Thing: ModuleNotFoundError" in capsys.readouterr().err
    assert main([*words[:-1]]) == 2
    assert "calculator" in capsys.readouterr().err
