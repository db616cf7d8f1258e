"""``predict`` and ``relax --all``: the answers in order, in bounded memory; what a kill leaves is continued."""

from __future__ import annotations

import itertools
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms
from tiny import make_potential

from escaip.calculators import CommitteeCalculator, EScAIPCalculator
from escaip.cli import main
from escaip.data import AtomicData
from escaip.evaluate import frames, predictions
from escaip.evaluate.predictions import predict_frames
from escaip.files import try_lock
from escaip.potential import Potential

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("members", [1, 2])
def test_predictions_are_those_of_the_calculators(
    model: Path, second: Path, labelled: Path, tmp_path: Path, members: int
) -> None:
    out = tmp_path / "new" / "out.extxyz"
    command = ["predict", str(model), str(labelled), "--out", str(out), "--max-atoms", "10"]
    assert main([*command, *(["--committee", str(second)] if members == 2 else [])]) == 0
    calculator = CommitteeCalculator([model, second]) if members == 2 else EScAIPCalculator(model)
    written, given = ase.io.read(out, ":"), ase.io.read(labelled, ":")
    assert [list(frame.numbers) for frame in written] == [list(atoms.numbers) for atoms in given]
    for found, atoms in zip(written, given, strict=True):
        atoms.set_constraint()
        atoms.calc = calculator
        assert found.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(found.get_forces(apply_constraint=False), atoms.get_forces(), atol=2e-8)
        assert ("stress" in found.calc.results) == bool(atoms.pbc.any())
        if atoms.pbc.any():
            np.testing.assert_allclose(found.get_stress(), atoms.get_stress(), atol=1e-9)
        assert ("energy_spread" in found.info) == ("forces_spread" in found.arrays) == (members == 2)
        if members == 2:
            assert found.info["energy_spread"] == pytest.approx(calculator.results["energy_spread"], abs=1e-9)
            np.testing.assert_allclose(found.arrays["forces_spread"], calculator.results["forces_spread"], atol=2e-8)
    assert [path.name for path in out.parent.iterdir()] == ["out.extxyz"]


def test_a_committee_reads_a_stream_as_results_are_taken() -> None:
    taken = itertools.count()

    def endless() -> Iterator[AtomicData]:
        while True:
            next(taken)
            yield AtomicData.from_ase(ase.build.molecule("H2O"))

    stream = predict_frames([make_potential(), make_potential(1, num_neighbors=3)], endless(), max_atoms=6)
    for _ in itertools.islice(stream, 70):
        pass
    assert next(taken) == 3 * 16 * 2  # windows of 16 packs of two, read once for both


def interrupt(monkeypatch: pytest.MonkeyPatch, command: list[str], frame: int, number: int = signal.SIGINT) -> int:
    """Runs a command that receives a signal while it makes a frame; returns its exit status."""
    make, made = predictions._frame, itertools.count()

    def stopping(*arguments: Any) -> Any:
        if next(made) == frame:
            signal.raise_signal(number)
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "_frame", stopping)
        patch.setattr(sys, "argv", ["escaip", *command])
        return main(command)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_printed_command_continues_what_a_signal_stopped(
    model: Path,
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    number: signal.Signals,
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["predict", str(model), str(labelled), "--max-atoms", "1", "--out", "out.extxyz"]
    assert main([*command[:-1], "whole.extxyz"]) == 0
    Path("out.extxyz").write_text("of before")
    assert interrupt(monkeypatch, [*command, "--overwrite"], 3, number) == 128 + number
    *_, why, line = capsys.readouterr().out.splitlines()
    assert why == f"{number.name}: stopped; continue with"
    assert line == shlex.join(["escaip", *command, "--overwrite"])
    assert Path("out.extxyz").read_text() == "of before"
    forward, evaluated = Potential.forward, itertools.count()

    def counted(self: Potential, batch: Any, **options: Any) -> Any:
        next(evaluated)
        return forward(self, batch, **options)

    monkeypatch.setattr(Potential, "forward", counted)
    assert main(shlex.split(line)[1:]) == 0
    assert next(evaluated) == 2
    assert Path("out.extxyz").read_bytes() == Path("whole.extxyz").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_a_part_is_continued_after_its_last_whole_frame(
    model: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, part, state = (tmp_path / f"out.extxyz{ending}" for ending in ("", ".part", ".part.json"))
    command = ["predict", str(model), str(labelled), "--out", str(out), "--max-atoms"]
    assert interrupt(monkeypatch, [*command, "1"], 3) == 130
    kept = state.read_bytes()
    assert main([*command, "1", "--device", "cpu"]) == 0  # where it runs is not what it computes
    whole = out.read_bytes()
    first = len(b"".join(whole.splitlines(keepends=True)[:8]))
    for cut in (0, 1, first - 20, first - 1, first, first + 1, first + 30, len(whole) - 1, len(whole)):
        out.unlink()
        part.write_bytes(whole[:cut])
        state.write_bytes(kept)
        assert main([*command, "1"]) == 0
        assert out.read_bytes() == whole, cut


@pytest.mark.bad_input
def test_a_part_of_another_run_is_kept(
    model: Path, second: Path, labelled: Path, molecule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = ["predict", str(model), str(labelled), "--out", "out.extxyz", "--max-atoms", "1"]
    part = Path("out.extxyz.part")
    assert interrupt(monkeypatch, command, 2) == 130
    before = part.read_bytes()
    for changed, name in (
        ([command[0], str(second), *command[2:]], "model"),
        ([*command[:2], str(molecule), *command[3:]], "data"),
        ([*command, "--dtype", "float32"], "dtype"),
        ([*command, "--committee", str(second)], "model"),
    ):
        capsys.readouterr()
        assert main(changed) == 2
        assert f"holds 2 structures of a run with another {name}: repeat" in (text := capsys.readouterr().err)
        assert "--overwrite" in text
        assert part.read_bytes() == before
    with try_lock(part):
        assert main(command) == 1
    assert "out.extxyz.part is being written by another process" in capsys.readouterr().err
    Path("out.extxyz.part.json").write_text(json.dumps([]))
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0
    assert len(ase.io.read("out.extxyz", ":")) == 5
    assert main(command) == 2
    assert "out.extxyz exists: choose another --out, or replace it with --overwrite" in capsys.readouterr().err
    assert main([*command[:4], "out.cif"]) == 2
    assert "out.cif is no extxyz file" in capsys.readouterr().err


@pytest.mark.bad_input
def test_a_bad_structure_is_named_by_its_place_and_those_before_it_are_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    waters = [ase.build.molecule("H2O") for _ in range(40)]
    ase.io.write("in.extxyz", [*waters, ase.build.bulk("Fe")])
    command = ["predict", str(model), "in.extxyz", "--out", "out.extxyz", "--max-atoms", "3"]
    for _ in range(2):
        assert main(command) == 1
        assert "structure 40 (in.extxyz:40): the potential was not trained on Fe" in capsys.readouterr().err
        assert len(ase.io.read("out.extxyz.part", ":", format="extxyz")) == 32
    ase.io.write("in.extxyz", ase.build.bulk("Fe"))
    assert main([*command, "--overwrite"]) == 1
    assert not list(tmp_path.glob("out*"))


def test_relaxing_all_structures_of_a_file_goes_on_after_a_kill(
    model: Path, second: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["relax", str(model), str(labelled), "--all", "--fmax", "0.1", "--out", "out.extxyz"]
    assert main([*command[:-1], "whole.extxyz"]) == 0
    assert "converged: 5 structures" in capsys.readouterr().out
    write, written = frames.ase.io.write, itertools.count()

    def stopping(*arguments: Any, **options: Any) -> None:
        if next(written) == 3:
            signal.raise_signal(signal.SIGTERM)
        write(*arguments, **options)

    monkeypatch.setattr(sys, "argv", ["escaip", *command])
    with monkeypatch.context() as patch:
        patch.setattr(frames.ase.io, "write", stopping)
        assert main(command) == 143
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == shlex.join(["escaip", *command])
    for changed, name in (("--fmax=0.2", "fmax"), ("--cell", "cell"), (f"--committee={second}", "model")):
        assert main([*command, changed]) == 2
        assert f"holds 3 structures of a run with another {name}" in capsys.readouterr().err
    assert main([*command, "--device", "cpu"]) == 0
    for found, expected in zip(ase.io.read("out.extxyz", ":"), ase.io.read("whole.extxyz", ":"), strict=True):
        assert found.info["converged"]
        assert found.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-5)
        assert np.linalg.norm(found.get_forces(), axis=1).max() <= 0.1


@pytest.mark.bad_input
def test_structures_that_do_not_converge_are_named_by_frame(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    atom, water = Atoms("O"), ase.build.molecule("H2O")
    ase.io.write("in.extxyz", [atom, *[water] * 11, atom])
    command = ["relax", str(model), "in.extxyz", "--all", "--fmax", "1e-9", "--steps", "2"]
    assert main(command) == 1
    assert (
        "11 of 13 structures did not converge in 2 steps (frames 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 1 more): those"
        in (capsys.readouterr().err)
    )
    found = ase.io.read("in.relaxed.extxyz", ":")
    assert [frame.info["converged"] for frame in found] == [True, *[False] * 11, True]
    for extra, message in (
        ([], "in.relaxed.extxyz exists"),
        (["--overwrite", "--frame", "-1"], "choose one of the two"),
        (["--overwrite", "--d3", "pbe"], "leave --all or --d3 out"),
        (["--out", "out.cif"], "out.cif is no extxyz file"),
    ):
        assert main([*command, *extra]) == 2
        assert message in capsys.readouterr().err
    ase.io.write("in.extxyz", [atom, Atoms("Fe")])
    assert main([*command, "--overwrite"]) == 1
    assert "structure 1 (Fe): the potential was not trained on Fe" in capsys.readouterr().err
