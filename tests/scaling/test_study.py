"""Which runs a study is made of, and the records that it leaves."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic_runs import record, write

from escaip.errors import ConfigError, DataError
from escaip.scaling.study import Job, Record, StudyPlan, read_records, variants

STUDY: dict[str, Any] = {
    "recipe": "quickstart",
    "settings": {"model": {"architecture": {"angular_channels": [8, 4, 1, 1, 2], "hidden_size": 32, "num_heads": 2}}},
    "widths": [16, 32, 64],
    "width_per_layer": 24,
    "data_sizes": [0.5, 1.0],
    "seeds": [0, 1],
    "epochs": 3,
    "learning_rate": 0.002,
    "variants": {"conservative": {}, "direct": {"model": {"architecture": {"forces": "direct"}}}},
}


def study(**changes: Any) -> dict[str, Any]:
    content = {**copy.deepcopy(STUDY), **changes}
    return {key: value for key, value in content.items() if value is not None}


def train_size(job: Job) -> float:
    return float(job.config["data"]["train_size"])


def test_the_grid_is_whole_and_every_run_is_one_of_its_own() -> None:
    plan = StudyPlan.parse(study())
    jobs = plan.jobs()
    assert len(jobs) == len({job.id for job in jobs}) == 3 * 2 * 2 * 2
    assert {(j.variant, j.size, train_size(j), j.seed) for j in jobs} == set(
        itertools.product(("conservative", "direct"), ("w16", "w32", "w64"), (0.5, 1.0), (0, 1))
    )
    assert jobs == plan.jobs()
    assert [train_size(job) for job in jobs] == sorted(train_size(job) for job in jobs)


def test_the_rule_of_sizes() -> None:
    plan = StudyPlan.parse(study())
    sizes = [plan.architecture("direct", name) for name in plan.sizes]
    assert [(c.hidden_size, c.num_heads, c.num_layers) for c in sizes] == [(16, 1, 1), (32, 2, 1), (64, 4, 3)]
    assert {c.forces for c in sizes} == {"direct"}


def test_what_a_run_is_configured_with() -> None:
    job = StudyPlan.parse(study(learning_rate={"value": 0.01, "base_width": 16})).jobs()[-1]
    config = job.config
    assert config["seed_everything"] == job.seed == 1
    assert config["data"]["train_size"] == 1.0
    assert config["data"]["split"] == {"by": "structure", "val": 0.1}  # of the recipe
    assert config["trainer"]["max_epochs"] == 3
    assert (config["model"]["learning_rate"], config["model"]["base_width"]) == (0.01, 16)
    assert config["model"]["architecture"]["forces"] == "direct"
    assert job.learning_rate == 0.01


def test_steps_numbers_of_structures_and_sizes_by_name() -> None:
    content = study(widths=None, width_per_layer=None, epochs=None, steps=50, data_sizes=[100], seeds=[0], variants={})
    content["variants"] = {"only": {}}
    content["sizes"] = {"a": {"num_layers": 1}, "b": {"num_layers": 2}}
    jobs = StudyPlan.parse(content).jobs()
    assert [job.size for job in jobs] == ["a", "b"]
    assert {(job.config["trainer"]["max_steps"], job.config["trainer"]["max_epochs"]) for job in jobs} == {(50, -1)}
    assert jobs[0].config["data"]["train_size"] == 100


def test_budgets_and_numbers_that_yaml_reads_as_text() -> None:
    content = study(epochs=None, budgets=["1e12", 2e12], data_sizes=[1.0], seeds=[0], learning_rate="1e-3")
    jobs = StudyPlan.parse(content).jobs()
    assert len(jobs) == 2 * 3 * 2
    assert {job.budget for job in jobs} == {1e12, 2e12}
    assert {job.learning_rate for job in jobs} == {1e-3}


def test_a_sweep_gives_each_size_its_rate() -> None:
    plan = StudyPlan.parse(study(learning_rate={"sweep": [0.001, 0.003], "epochs": 1}))
    sweep = plan.sweep_jobs()
    alone = StudyPlan.parse(study(learning_rate={"sweep": [0.001, 0.003], "base_width": 32}))
    assert {job.size for job in alone.sweep_jobs()} == {"w32"}
    assert len(sweep) == 2 * 3 * 2
    assert all(job.config["trainer"]["max_epochs"] == 1 and train_size(job) == 0.5 for job in sweep)
    rates = {(v, s): 0.001 if s == "w16" else 0.003 for v in plan.variants for s in plan.sizes}
    assert {(job.size, job.learning_rate) for job in plan.jobs(rates)} == {
        ("w16", 0.001),
        ("w32", 0.003),
        ("w64", 0.003),
    }


def test_other_settings_are_other_runs() -> None:
    before = {job.id for job in StudyPlan.parse(study()).jobs()}
    after = {job.id for job in StudyPlan.parse(study(learning_rate=0.003)).jobs()}
    assert not before & after
    more = {job.id for job in StudyPlan.parse(study(seeds=[0, 1, 2])).jobs()}
    assert before < more


def test_a_folder_keeps_to_its_study(tmp_path: Path) -> None:
    for seeds in ([0, 1], [0, 1], [0, 1, 2]):  # more of the same is the same study
        plan = StudyPlan.parse(study(seeds=seeds))
        plan.claim_folder(tmp_path, [], plan.jobs())
    plan = StudyPlan.parse(study())
    with pytest.raises(DataError, match=r"holds another study: its run .*-s2-.* is not of this one"):
        plan.claim_folder(tmp_path, [], plan.jobs())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "depth does not exist"),
        ({"recipe": None}, "recipe is missing"),
        ({"recipe": "nothing"}, "neither a file nor a recipe"),
        ({"epochs": None}, "give one .found none."),
        ({"steps": 5}, "give one .found"),
        ({"sizes": {"a": {}}}, "give one of them"),
        ({"widths": [15]}, "width of 15 is not a multiple of the size of a head"),
        ({"widths": ["wide"]}, "widths is 'wide': it must be a number"),
        ({"data_sizes": [0.5, 0.5]}, "give each number once"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": {"rate": 1}}, "learning_rate.rate does not exist"),
        ({"learning_rate": {"sweep": [0.1]}}, "two or more"),
        ({"learning_rate": {"value": -1.0}}, "learning_rate.value is .*above 0"),
        ({"learning_rate": "fast"}, "learning_rate.value is 'fast': it must be a number"),
        ({"learning_rate": {"sweep": [0.1, 0.2], "data_size": "half"}}, "learning_rate.data_size is 'half'"),
        ({"learning_rate": {"sweep": [0.1, 0.2], "epochs": "two"}}, "learning_rate.epochs is 'two'"),
        ({"width_per_layer": 0}, "width_per_layer is 0"),
        ({"seeds": []}, "seeds: there are none"),
        ({"variants": {}}, "variants: there are none"),
        ({"learning_rate": {"sweep": [0.1, 0.2], "base_width": 48}}, "has no such size"),
        ({"epochs": None, "budgets": [1e12]}, "budgets are spent on one set of data"),
        ({"variants": {"a": {"model": {"architecture": {"colour": 1}}}}}, "'colour' does not exist"),
        ({"settings": 3}, "settings is 3: it must be a mapping"),
    ],
)  # fmt: skip
def test_bad_studies(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudyPlan.parse(study(**changes))


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(study()), "utf-8")
    plan = StudyPlan.read(tmp_path / "a.yaml", ["data.train=[a.xyz, b.xyz]", "data.split.val=0.2"])
    data = plan.jobs()[0].config["data"]
    assert data["train"] == ["a.xyz", "b.xyz"]
    assert data["split"] == {"by": "structure", "val": 0.2}
    assert plan.source["settings"]["model"] == STUDY["settings"]["model"]
    for wrong in ("data.train", "=3", "a..b=1", "a=["):
        with pytest.raises(ConfigError, match=r"write KEY=VALUE|is no YAML"):
            StudyPlan.read(tmp_path / "a.yaml", [wrong])


@pytest.mark.bad_input
def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor a recipe: recipes are .*smoke"):
        StudyPlan.read("nothing")
    (tmp_path / "a.yaml").write_text("a: [", "utf-8")
    with pytest.raises(ConfigError, match="is no YAML"):
        StudyPlan.read(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("3", "utf-8")
    with pytest.raises(ConfigError, match="is no mapping"):
        StudyPlan.read(tmp_path / "a.yaml")


def test_records_are_read_in_order_and_twins_count_once(tmp_path: Path) -> None:
    file = write(tmp_path, [record(id="b"), record(id="a", variant="hard"), record(id="b")])
    assert read_records(tmp_path) == (record(id="b"), record(id="a", variant="hard"))
    assert read_records(file) == read_records(tmp_path)
    assert {name: len(group) for name, group in variants(read_records(file)).items()} == {"default": 1, "hard": 1}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], "line 2: no record .*: remove its line and run the study again"),
        (lambda text: text.replace('"id": "a",', '"id": "a"'), "line 1: no record"),
        (lambda text: text.replace('"id": "b"', '"id": "a"'), "line 2: a second, different record of 'a': keep one"),
        (lambda text: "\n", "no records"),
        (lambda text: "[1]", "no record"),
        (lambda text: text.replace('"flops"', '"flips"', 1), "line 1: no record .*'flips'"),
        (lambda text: text.replace('"flops": 3000000000.0, ', "", 1), "line 1: no record .*'flops'"),
    ],
)
def test_damaged_records(tmp_path: Path, damage: Callable[[str], str], message: str) -> None:
    with pytest.raises(DataError, match=r"no records: run `escaip scaling run` first, or name the folder"):
        read_records(tmp_path)
    file = write(tmp_path, [record(id="a"), record(id="b", seed=1)])
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_records(tmp_path)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": 0}, "record a: parameters is 0, not a number above zero"),
        ({"parameters": True}, "parameters is True"),
        ({"structures": "x"}, "structures is 'x'"),
        ({"flops": -1.0}, "flops is -1.0, not a number above zero"),
        ({"losses": {"forces_mae": 0.0}}, "losses.forces_mae is 0.0"),
        ({"losses": [1.0]}, "losses is .*not a mapping"),
        ({"curve": 3}, "no record"),
    ],
)
def test_impossible_fields(change: dict[str, object], message: str) -> None:
    line = json.dumps({**json.loads(record().to_json()), **change})
    with pytest.raises(DataError, match=message):
        Record.from_json(line)
