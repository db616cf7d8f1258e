"""The command line: exit status, one line per error, what commands print and write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import typing
import warnings
from pathlib import Path

import ase.build
import ase.io
import pytest

import escaip.cli
import escaip.train.cli
from escaip import __version__
from escaip.cli import main, parameters_of
from escaip.data.commands import inspect
from escaip.simulate import read_log

Capture = pytest.CaptureFixture[str]


def fails(arguments: list[str], status: int, message: str, capsys: Capture) -> None:
    """One line on the error stream that names the thing, nothing on the other, the right status."""
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.bad_input
def test_usage_errors(capsys: Capture) -> None:
    fails(["dance"], 2, "no command 'dance'", capsys)
    fails(["data", "insect"], 2, "did you mean data inspect?", capsys)
    fails(["md"], 2, "model, structure", capsys)
    fails(["md", "m.ckpt", "s.xyz", "--steps", "ten"], 2, "--steps is 'ten'", capsys)
    fails(["md", "m.ckpt", "s.xyz", "--temp", "3"], 2, "did you mean --temperature?", capsys)
    fails(["md", "m.ckpt", "s.xyz", "--ensemble", "nvx"], 2, "choose nve, nvt, npt", capsys)
    examples = ["example:organic", "example:ethanol"]
    fails(["md", *examples, "--timestep", "-1"], 2, "timestep is -1.0 fs", capsys)
    fails(["evaluate", "m", "d", "--units", "bohr"], 2, "--units 'bohr' is not understood", capsys)
    fails(["analyze", "t.xyz", "--fit", "1"], 2, "expected 2 arguments", capsys)


@pytest.mark.bad_input
def test_models_that_are_none(molecule: Path, tmp_path: Path, capsys: Capture) -> None:
    fails(["relax", "none.ckpt", str(molecule)], 1, "model file none.ckpt does not exist", capsys)
    text = tmp_path / "text.ckpt"
    text.write_text("this is no model")
    fails(["info", str(text)], 1, "text.ckpt is no model file", capsys)
    fails(["info", str(tmp_path)], 1, "does not exist", capsys)


@pytest.mark.bad_input
def test_structures_that_are_none(model: Path, tmp_path: Path, capsys: Capture) -> None:
    fails(["relax", str(model), "none.xyz"], 1, "structure none.xyz does not exist", capsys)
    empty = tmp_path / "empty.xyz"
    empty.write_text("")
    fails(["relax", str(model), str(empty)], 1, "empty.xyz is empty", capsys)
    lead = tmp_path / "gold.xyz"
    ase.io.write(lead, ase.build.molecule("SiH4"))
    fails(["relax", str(model), str(lead)], 1, "not trained on Si: use structures of H C N O Cu", capsys)
    assert not list(tmp_path.glob("*.relaxed*"))


@pytest.mark.bad_input
@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="nothing to fail on")
def test_outputs_that_cannot_be_written(
    model: Path, molecule: Path, labelled: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    fails(["relax", str(model), str(molecule), "--fmax", "9", "--out", str(file / "a.xyz")], 1, str(file), capsys)
    fails(["evaluate", str(model), str(labelled), "--no-plots", "--out", str(file)], 1, "choose another --out", capsys)
    arguments = ["md", str(model), str(molecule), "--ensemble", "nve", "--steps", "1", "--temperature", "9", "--quiet"]
    fails([*arguments, "--out", str(file / "a.traj")], 1, str(file), capsys)
    full = tmp_path / "full.extxyz"
    full.symlink_to("/dev/full")
    fails([*arguments, "--overwrite", "--out", str(full)], 1, "No space left on device: make room", capsys)


@pytest.mark.bad_input
def test_bugs_and_interruptions_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken(arguments: list[str]) -> int:
        raise KeyError("a\nb")

    monkeypatch.setattr(escaip.train.cli, "run", broken)
    fails(["fit", "--config", "quickstart"], 1, "unexpected KeyError", capsys)
    with pytest.raises(KeyError):
        main(["fit", "--debug"])

    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(escaip.train.cli, "run", interrupted)
    fails(["fit"], 130, "interrupted", capsys)

    def full(arguments: list[str]) -> int:
        raise OSError(28, "No space left on device", "x.ckpt")

    monkeypatch.setattr(escaip.train.cli, "run", full)
    fails(["fit"], 1, "x.ckpt: no space left on device", capsys)


def test_training_commands_get_the_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(escaip.train.cli, "run", lambda arguments: seen.append(arguments) or 0)
    assert main(["fit", "--config", "quickstart", "--trainer.max_epochs", "3"]) == 0
    assert seen == [["fit", "--config", "quickstart", "--trainer.max_epochs", "3"]]


def test_warnings_of_ours_are_one_line_and_those_of_others_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def noisy(arguments: list[str]) -> int:
        warnings.warn_explicit("ours\nin two lines", UserWarning, "x.py", 1, module="escaip.simulate.md")
        warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="lightning.pytorch")
        return 0

    monkeypatch.setattr(escaip.train.cli, "run", noisy)
    assert main(["fit"]) == 0
    assert capsys.readouterr().err == "escaip: warning: ours in two lines\n"


def test_info_of_the_installation_shows_what_each_attention_backend_supports(capsys: Capture) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert __version__ in text
    assert "reference" in text
    assert main(["info", "--json"]) == 0
    backends = json.loads(capsys.readouterr().out)["attention_backends"]
    assert backends["dense"].endswith(
        "any derivative; on any device; float64 float32 float16 bfloat16; dropout; node attention"
    )
    assert backends["sdpa"].split("; ")[1] == "1 derivative"


def test_info_of_a_model(model: Path, capsys: Capture) -> None:
    assert main(["info", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["elements"] == ["H", "C", "N", "O", "Cu"]
    assert found["level_of_theory"] == "random numbers"
    assert found["element_references"]["H"] == pytest.approx(-2.0 + 4.0 / 118)
    assert len(found["sha256"]) == 64
    assert found["parameters"] > 1000
    assert main(["info", str(model)]) == 0
    text = capsys.readouterr().out
    assert "eV/angstrom" in text
    assert "num_neighbors" in text


def test_a_file_states_licence_and_works_to_cite(model: Path, tmp_path: Path, capsys: Capture) -> None:
    card = {"licence": "CC-BY-4.0", "citation": ["A, B 1 (2020)", "C, D 2 (2021)"]}
    out, again = (str(tmp_path / f"{name}.escaip") for name in "ab")
    command = ["export", str(model), "--format", "escaip", "--out", out, "--licence", card["licence"], "--citation"]
    assert main([*command, *card["citation"]]) == 0
    assert main(["export", out, "--format", "escaip", "--out", again]) == 0
    capsys.readouterr()
    assert main(["info", again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"] == card
    assert main(["info", again]) == 0
    assert "A, B 1 (2020); C, D 2 (2021)" in capsys.readouterr().out


def test_relax_writes_where_it_says(
    model: Path, molecule: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(molecule.parent)
    assert main(["relax", str(model), str(molecule), "--fmax", "0.05"]) == 0
    assert "wrote methanol.relaxed.extxyz" in capsys.readouterr().out
    atoms = ase.io.read("methanol.relaxed.extxyz")
    assert (atoms.get_forces() ** 2).sum(axis=1).max() ** 0.5 <= 0.05


@pytest.mark.bad_input
def test_a_relaxation_that_does_not_converge(model: Path, molecule: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "r.extxyz"
    fails(
        ["relax", str(model), str(molecule), "--fmax", "1e-9", "--steps", "2", "--out", str(out)], 1,
        "not converged after 2 steps", capsys,
    )  # fmt: skip
    assert out.exists()


def test_md_from_the_command_line_with_resume(
    model: Path, molecule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["md", str(model), str(molecule), "--ensemble", "nvt", "--temperature", "300", "--interval", "5"]
    for name, parts in (("whole", ["20"]), ("parts", ["10", "20"])):
        for index, steps in enumerate(parts):
            assert main([*common, "--steps", steps, "--out", f"{name}.extxyz", *(["--resume"] if index else [])]) == 0
            printed = capsys.readouterr()
            assert f"{steps} steps, " in printed.out
            assert f"step {steps}/{steps} (100 %)" in printed.err
    assert (tmp_path / "whole.extxyz").read_bytes() == (tmp_path / "parts.extxyz").read_bytes()
    assert read_log(tmp_path / "parts.csv")["step"].tolist() == [0, 5, 10, 15, 20]
    arguments = [*common, "--steps", "30", "--resume", "--out", "nothing.extxyz"]
    fails(arguments, 1, "there is no restart file nothing.restart.npz", capsys)


def test_md_killed_at_any_moment_resumes_bit_for_bit(model: Path, molecule: Path, tmp_path: Path) -> None:
    common = ["md", str(model), str(molecule), "--ensemble", "nvt", "--temperature", "300", "--interval", "1",
              "--restart-interval", "10", "--steps", "150", "--timestep", "0.02", "--quiet"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "escaip", *common, "--out", str(tmp_path / "parts.extxyz")]
    process = subprocess.Popen(command, env=environment)
    log = tmp_path / "parts.csv"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.read_bytes().count(b"\n") > 25):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert log.read_bytes().count(b"\n") < 150
    assert main([*common, "--out", str(tmp_path / "parts.extxyz"), "--resume"]) == 0
    assert main([*common, "--out", str(tmp_path / "whole.extxyz")]) == 0
    assert (tmp_path / "whole.extxyz").read_bytes() == (tmp_path / "parts.extxyz").read_bytes()


def test_data_commands(labelled: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["data", "list"]) == 0
    assert "spice" in capsys.readouterr().out
    assert main(["data", "info", "spice"]) == 0
    assert "GFN2-xTB" in capsys.readouterr().out
    assert main(["data", "inspect", str(labelled)]) == 0
    assert "5" in capsys.readouterr().out
    assert main(["data", "convert", str(labelled), str(tmp_path / "c.extxyz"), "--limit", "3"]) == 0
    assert len(ase.io.read(tmp_path / "c.extxyz", ":")) == 3
    assert main(["data", "prepare", "ase", str(labelled), "--out", str(tmp_path / "store")]) == 0
    capsys.readouterr()
    fails(["data", "info", "nothing"], 2, "nothing", capsys)
    fails(["data", "inspect", str(tmp_path / "none.xyz")], 1, "none.xyz", capsys)


def test_a_structure_from_a_prepared_store(model: Path, labelled: Path, tmp_path: Path, capsys: Capture) -> None:
    store = tmp_path / "store"
    assert main(["data", "prepare", "ase", str(labelled), "--out", str(store)]) == 0
    out = tmp_path / "r.extxyz"
    assert main(["relax", str(model), str(store), "--frame", "1", "--fmax", "1", "--out", str(out)]) == 0
    assert len(ase.io.read(out)) == 3


def test_the_formats_listed_are_those_that_exist() -> None:
    from escaip.data.readers import READERS

    (formats,) = [p.type for p in parameters_of(inspect) if p.name == "format"]
    assert sorted(typing.get_args(formats)) == sorted(READERS)
