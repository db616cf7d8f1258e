"""Models in other formats, and packages of machine code: eager's answers, nothing compiled, nothing run unasked."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from safetensors.torch import save
from tiny import TABLE, batch_of, odd_structures, rattled

from escaip import EScAIPCalculator, Potential, load_potential
from escaip.cli import main
from escaip.errors import CheckpointError, ConfigError
from escaip.info import describe_model
from escaip.potential import PotentialMetadata, export
from escaip.potential.compile import INFO, environment
from escaip.potential.export import VERSION, WEIGHTS, describe_package, export_model
from escaip.potential.loading import read_potential
from escaip.potential.model_file import SCHEMA_VERSION

ROOT = Path(__file__).resolve().parents[2]
METADATA = PotentialMetadata((1, 6, 8, 29), "random numbers", ("none",), {"seed": 0})
make_potential = partial(tiny.make_potential, metadata=METADATA, **TABLE)


def structures() -> list[Atoms]:
    return [*odd_structures(), *rattled(ase.build.bulk("Cu", cubic=True).repeat((3, 2, 1)))]


def fake_package(path: Path, schema: int = SCHEMA_VERSION, **changes: Any) -> Path:
    """A package without code, complete as far as it is read before code is run."""
    potential = make_potential()
    made = environment(potential.device, potential.dtype)
    info = {
        "package": {"version": VERSION, **made, "native_kernels": True, **changes},
        "model": {**potential.describe(), "schema": schema},
        "constants": {},
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"model/{INFO}", json.dumps(info))
        archive.writestr(f"model/{WEIGHTS}", save(dict(potential.state_dict())))
    return path


def test_a_training_checkpoint_becomes_a_model_file(tmp_path: Path) -> None:
    potential = make_potential()
    state = {f"potential.{name}": tensor for name, tensor in potential.state_dict().items()}
    torch.save({"escaip": potential.describe(), "state_dict": state}, tmp_path / "last.ckpt")
    out = tmp_path / "model.escaip"
    assert main(["export", str(tmp_path / "last.ckpt"), "--format", "escaip", "--out", str(out)]) == 0
    loaded = load_potential(out, device="cpu")
    assert loaded.metadata == potential.metadata
    assert loaded.dtype == torch.float64
    batch = batch_of(*structures())
    assert torch.equal(loaded(batch).energy, potential(batch).energy)
    export_model(read_potential(out), tmp_path / "single.escaip", "escaip", dtype="float32")
    assert load_potential(tmp_path / "single.escaip", device="cpu").dtype == torch.float32


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "aoti", "--out", "model.escaip"], r"run only from files named \*\.pt2"),
        (["--format", "escaip", "--out", "model.pt2"], r"\.pt2 is for packages"),
        (["--format", "escaip", "--out", "model.escaip", "--device", "cpu"], "leave --device out"),
        (["--format", "onnx", "--out", "model.onnx"], "choose escaip, aoti"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make_potential().save("made.escaip")
    assert main(["export", "made.escaip", *options]) == 2
    captured = capsys.readouterr().err
    assert len(captured.splitlines()) == 1
    assert re.search(message, captured)


@pytest.mark.bad_input
def test_without_a_compiler_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    make_potential().save(tmp_path / "made.escaip")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*no-such-compiler"):
        export_model(make_potential(), tmp_path / "model.pt2", "aoti")
    assert [path.name for path in tmp_path.iterdir()] == ["made.escaip"]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "1.0.0"}, r"for torch 1\.0\.0, and not for"),
        ({"escaip": "0.0.1"}, r"for escaip 0\.0\.1, and not for"),
        ({"version": 99}, "for format version 99"),
        ({"platform": "plan9"}, "for platform plan9"),
        ({"machine": "vax"}, "for machine vax"),
        ({"instructions": ["avx4096"]}, "needs a processor with avx4096"),
        ({"device": "cuda"}, "package for device cuda, and not for cpu"),
        ({"dtype": "float32"}, "package for dtype float32, and not for float64"),
        ({"schema": 1000}, "has schema 1000"),
        ({}, "the code in .* cannot be used"),
    ],
    ids=lambda value: "-".join(value) or "no code" if isinstance(value, dict) else "",
)
def test_packages_for_other_places_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = fake_package(tmp_path / "model.pt2", **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load_potential(path, device="cpu", dtype="float64")
    assert "\n" not in str(caught.value)
    assert describe_package(path)["native_kernels"]


@pytest.mark.bad_input
def test_machine_code_is_run_only_from_files_named_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ExportedEvaluator", lambda *_: pytest.fail("code was run"))
    for name in ("model.escaip", "model.ckpt", "model"):
        path = fake_package(tmp_path / name)
        with pytest.raises(CheckpointError, match="holds machine code"):
            load_potential(path, device="cpu")
        assert describe_model(path)["package"]["dtype"] == "float64"


@pytest.mark.bad_input
@pytest.mark.parametrize("damage", ["text", "other archive", "truncated", "no weights", "a model of another name"])
def test_damaged_packages_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    path = fake_package(tmp_path / "model.pt2")
    if damage == "text":
        path.write_text("no archive")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "a model of another name":
        make_potential().save(path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"model/{INFO if damage == 'no weights' else 'data.pkl'}", "{}")
    for read in (load_potential, read_potential, describe_model):
        with pytest.raises(CheckpointError, match="is no package, or is damaged") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.bad_input
def test_a_folder_that_is_not_there_costs_no_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "compile_ahead", lambda *_: pytest.fail("compiled"))
    make_potential().save(tmp_path / "made.escaip")
    with pytest.raises(CheckpointError, match=r"cannot write .*model\.pt2: No such file"):
        export_model(make_potential(), tmp_path / "missing" / "model.pt2", "aoti")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, compile_once: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("package")
    make_potential().save(folder / "made.escaip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "compile_ahead", compile_once)
        lines = export_model(make_potential(), folder / "made.pt2", "aoti")
    assert "load only packages that you made" in lines[-1]
    assert sorted(path.name for path in folder.iterdir()) == ["made.escaip", "made.pt2"]
    return folder / "made.pt2"


IN_A_FRESH_PROCESS = """
import json, sys
commands = []
def watch(event, arguments):
    if event == "subprocess.Popen":
        commands.append(" ".join(map(str, arguments[1])))
sys.addaudithook(watch)
from ase.io import read
from escaip import EScAIPCalculator
results = []
for atoms in read(sys.argv[2], ":"):
    atoms.calc = EScAIPCalculator(sys.argv[1])
    stress = atoms.get_stress().tolist() if atoms.pbc.any() else None
    results.append([atoms.get_potential_energy(), atoms.get_forces().tolist(), stress])
kind = type(atoms.calc.potential.evaluator).__name__
print(json.dumps({"results": results, "commands": commands, "kind": kind}))
"""


@pytest.mark.slow
def test_a_package_gives_eager_answers_in_a_process_that_compiles_nothing(package: Path, tmp_path: Path) -> None:
    made, expected = structures(), []
    ase.io.write(tmp_path / "made.traj", made)
    for atoms in made:
        atoms.calc = EScAIPCalculator(make_potential())
        stress = atoms.get_stress().tolist() if atoms.pbc.any() else None
        expected.append([atoms.get_potential_energy(), atoms.get_forces().tolist(), stress])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS, str(package), str(tmp_path / "made.traj")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kind"] == "ExportedEvaluator"
    assert [command for command in found["commands"] if "--version" not in command] == []
    for result, right in zip(found["results"], expected, strict=True):
        for x, y in zip(result, right, strict=True):
            if y is not None:
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_package_is_a_model_wherever_one_is_asked_for(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    water = ase.build.molecule("H2O")
    water.rattle(0.1, seed=0)
    ase.io.write(tmp_path / "water.xyz", water)
    water.calc = EScAIPCalculator(make_potential())
    water.get_potential_energy(), water.get_forces()
    ase.io.write(tmp_path / "labelled.extxyz", water)
    file, out = str(tmp_path / "water.xyz"), str(tmp_path / "md.extxyz")
    assert (
        main(["md", str(package), file, "--ensemble", "nve", "--steps", "3", "--temperature", "10", "--out", out]) == 0
    )
    relaxed = str(tmp_path / "relaxed.xyz")
    assert main(["relax", str(package), file, "--fmax", "100", "--out", relaxed]) == 0
    report = tmp_path / "report"
    options = ["--no-plots", "--out", str(report)]
    assert main(["evaluate", str(package), str(tmp_path / "labelled.extxyz"), *options]) == 0
    assert '"dtype": "torch.float64"' in (report / "report.json").read_text()
    assert main(["info", str(package)]) == 0
    assert "instructions" in capsys.readouterr().out
    assert main(["export", str(package), "--format", "escaip", "--out", str(tmp_path / "back.escaip")]) == 0
    batch = batch_of(*structures())
    assert torch.equal(load_potential(tmp_path / "back.escaip")(batch).energy, make_potential()(batch).energy)


@pytest.mark.slow
def test_copies_pickles_and_second_derivatives(package: Path) -> None:
    potential, batch = load_potential(package, dataset=None), batch_of(*structures())
    expected = make_potential()(batch, compute_stress=True)
    for other in (potential, copy.deepcopy(potential), pickle.loads(pickle.dumps(potential)), potential.to("cpu")):
        found = other(batch, compute_stress=True)
        torch.testing.assert_close(found.forces, expected.forces, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.stress, expected.stress, rtol=1e-9, atol=1e-11, equal_nan=True)
    potential.compile()
    torch.testing.assert_close(potential(batch, compute_forces=False).energy, expected.energy)
    batch.positions.requires_grad_()
    forces = potential(batch, create_graph=True).forces
    (row,) = torch.autograd.grad(forces[-1, 0], batch.positions)
    assert row.abs().max() > 0


@pytest.mark.slow
def test_a_package_follows_weights_that_are_changed(package: Path) -> None:
    potential, eager, batch = load_potential(package), make_potential(), batch_of(*structures())
    for each in (potential, eager):
        with torch.no_grad():
            for weight in each.model.parameters():
                weight.mul_(1.1)
    torch.testing.assert_close(potential(batch).forces, eager(batch).forces, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda potential: potential.train(), "cannot be trained"),
        (lambda potential: potential.requires_grad_(), "cannot be trained"),
        (lambda potential: potential.float(), "the dtype and device that it was exported for"),
        (lambda potential: potential.compile(cuda_graphs=True), "cuda_graphs"),
        (lambda potential: setattr(potential, "evaluator", InHalf(potential.evaluator)), "no other precision"),
    ],
    ids=["train", "gradients", "dtype", "graphs", "precision"],
)
def test_what_a_package_cannot_do_is_said(package: Path, change: Callable[[Potential], Any], message: str) -> None:
    def evaluate_changed() -> None:
        potential = load_potential(package)
        change(potential)
        potential(batch_of(Atoms("Cu")), create_graph=True)

    with pytest.raises(ConfigError, match=message):
        evaluate_changed()


class InHalf:
    """Evaluates under autocast."""

    def __init__(self, evaluator: Any) -> None:
        self.evaluator = evaluator

    def __call__(self, *arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.evaluator(*arguments)


@pytest.mark.slow
@pytest.mark.bad_input
def test_code_that_does_not_belong_to_its_weights_is_refused(package: Path, tmp_path: Path) -> None:
    """As when the model code changes between export and use: the answers of code and weights are compared."""
    changed = tmp_path / "changed.pt2"
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(changed, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(INFO):
                info = json.loads(content)
                info["model"]["config"]["cutoff"] = 5.0
                content = json.dumps(info).encode()
            new.writestr(item, content)
    with pytest.raises(CheckpointError, match="does not give what its weights give"):
        load_potential(changed)
