"""The race of two trainings: its split, errors, logs, processes and table. Trains nothing."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from peers import race, racing
from peers.racing import Course, Point, RaceFailure

OURS = "epoch 3  step 400/500  validation: loss 4.519  energy 17.9 meV/atom  forces 224.7 meV/Å"
MACE = (
    "2026-11-24 05:00:01.123 INFO: Epoch 7: head: Default, loss=0.01234567, "
    "MAE_E_per_atom=    1.50 meV, MAE_F=   42.75 meV / A"
)


def frame(symbols: str, energy: float, forces: list[list[float]], shift: float = 0.0) -> Atoms:
    atoms = Atoms(symbols, [[1.5 * i + shift, 0.0, 0.0] for i in range(len(forces))])
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.array(forces))
    return atoms


def pair(energy: float = -2.0, shift: float = 0.0) -> Atoms:
    return frame("H2", energy, [[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]], shift)


def test_split_is_reproducible_and_covers_the_frames_once() -> None:
    split = racing.split_frames(500)
    assert {part: len(indices) for part, indices in split.items()} == {"test": 62, "val": 50, "train": 388}
    assert sorted(np.concatenate(list(split.values()))) == list(range(500))
    for part, indices in racing.split_frames(500).items():
        assert np.array_equal(indices, split[part])
    assert not np.array_equal(racing.split_frames(500, seed=1)["test"], split["test"])


def test_split_holds_out_enough() -> None:
    assert len(racing.split_frames(200)["test"]) == 50
    with pytest.raises(RaceFailure, match="199 frames are too few"):
        racing.split_frames(199)


def test_equal_structures_are_taken_once() -> None:
    one, other = pair(), pair(shift=0.5)
    moved = pair(energy=7.0, shift=1e-6)
    larger_cell = pair()
    larger_cell.set_cell([9.0, 9.0, 9.0])
    assert racing.distinct([one, other, moved, larger_cell]) == [one, other, larger_cell]


def test_errors_against_values_by_hand() -> None:
    frames = [pair(-2.0), frame("He", 1.0, [[0.0, 0.0, 0.3]])]
    forces = np.concatenate([atoms.get_forces() for atoms in frames])
    forces[0, 0] += 0.009
    forces[2, 1] -= 0.018
    found = racing.errors(frames, np.array([-1.996, 0.999]), forces)
    assert found == pytest.approx({
        "energy_mae_meV_per_atom": (4.0 / 2 + 1.0) / 2,
        "force_mae_meV_per_A": (9.0 + 18.0) / 9,
        "force_rmse_meV_per_A": math.sqrt((9.0**2 + 18.0**2) / 9),
    })  # fmt: skip


def test_predictions_that_lack_something_are_refused() -> None:
    with pytest.raises(RaceFailure, match="1 energies and 1 forces for 1 frames"):
        racing.errors([pair()], np.zeros(1), np.zeros((1, 3)))
    with pytest.raises(RaceFailure, match="not finite"):
        racing.errors([pair()], np.zeros(1), np.full((2, 3), np.nan))


def test_baseline_knows_the_composition() -> None:
    helium = frame("He", 5.0, [[0.0, 0.0, 0.0]])
    energies, forces = racing.baseline([pair(-2.0), pair(-4.0), helium], [helium, pair()])
    assert energies == pytest.approx([5.0, -3.0])
    assert forces.shape == (3, 3)
    assert not forces.any()


def test_labels_are_energy_and_forces_alone() -> None:
    atoms = pair()
    assert atoms.calc is not None
    atoms.calc.results["stress"] = np.zeros(6)
    atoms.info["group"] = "EOS"
    copy = racing.labelled(atoms)
    assert copy.calc is not None
    assert set(copy.calc.results) == {"energy", "forces"}
    assert not copy.info


def test_both_logs_are_read() -> None:
    assert racing.parse_ours(OURS, 1.5) == Point(4, 1.5, 17.9, 224.7)
    assert racing.parse_mace(MACE, 2.5) == Point(8, 2.5, 1.5, 42.75)
    untrained = MACE.replace("Epoch 7", "Initial")
    assert racing.parse_mace(untrained, 0.1) is None
    assert racing.parse_ours("step 15/300  loss 10.39  energy 180.6 meV/atom  forces 517.9 meV/Å", 0.1) is None


def test_our_progress_prints_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace
    from typing import Any

    from escaip.train.callbacks import TrainingProgress

    metrics = {"val/loss": 4.519, "val/energy_mae_meV_per_atom": 17.9, "val/force_mae_meV_per_A": 224.7}
    trainer: Any = SimpleNamespace(
        callback_metrics=metrics,
        current_epoch=3,
        global_step=400,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
    )
    TrainingProgress(terminal=False).on_validation_end(trainer, trainer)
    assert racing.parse_ours(capsys.readouterr().err, 1.5) == Point(4, 1.5, 17.9, 224.7)


def test_start_up_and_pace() -> None:
    course = Course([Point(1, 2.0, 0, 0), Point(2, 2.5, 0, 0), Point(3, 3.0, 0, 0)])
    assert course.seconds_per_epoch == pytest.approx(30.0)
    assert course.start_up == pytest.approx(90.0)
    assert racing.epochs_in(15.0, 90.0, 30.0) == 27
    with pytest.raises(RaceFailure, match="no epoch in the time"):
        racing.epochs_in(2.0, 90.0, 70.0)


def watched(folder: Path, code: str, epochs: int, wait: bool, limit: float = 20.0) -> Course:
    return racing.watch([sys.executable, "-c", code], folder, {}, racing.parse_ours, epochs, wait=wait, limit=limit)


def printing(lines: int) -> str:
    return f"for i in range({lines}): print({OURS!r}.replace('epoch 3', f'epoch {{i}}'), flush=True)\n"


def test_a_process_is_watched_to_its_end(tmp_path: Path) -> None:
    code = "import sys\nsys.stdout.reconfigure(encoding='utf-8')\n" + printing(2)
    course = watched(tmp_path, code + "open('model', 'w').close()", 2, wait=True)
    assert [point.epoch for point in course.points] == [1, 2]
    assert course.minutes == course.points[-1].minutes > 0
    assert (tmp_path / "model").exists()


def test_a_calibration_is_ended_after_its_epochs(tmp_path: Path) -> None:
    code = "import sys, time\nsys.stdout.reconfigure(encoding='utf-8')\n" + printing(2) + "time.sleep(60)"
    assert len(watched(tmp_path, code, 2, wait=False).points) == 2


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ValueError('no E0s in /a/b/file.xyz')", "status 1 after 0 epochs: ValueError: no E0s in file.xyz"),
        ("pass", "status 0 after 0 epochs: nothing was printed"),
    ],
)  # fmt: skip
def test_a_process_that_fails_says_why(tmp_path: Path, code: str, why: str) -> None:
    with pytest.raises(RaceFailure, match=why):
        watched(tmp_path, code, 1, wait=True)


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RaceFailure, match="not done after 0 s, 0 of 1 epochs"):
        watched(tmp_path, "import time; time.sleep(60)", 1, wait=True, limit=0.3)


def test_table_holds_errors_and_reasons() -> None:
    found = dict.fromkeys(race.ERRORS, 12.345)
    rows = [race.Row("3bpa", "escaip 1m", 879072, 40, 14.96, found), race.Row("3bpa", "MACE small", why="a | b")]
    lines = race.table(rows).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "3bpa", "escaip 1m", "879 072", "40", "15.0", "12.35", "12.3", "12.3", "",
    ]  # fmt: skip
    assert lines[3].count("—") == 6
    assert "| a / b " in lines[3]


def test_no_folder_of_this_machine_is_kept() -> None:
    words = ["--data", "/elsewhere/data", "--sets", "inp", "--out=/elsewhere/x.json"]
    assert race.plain_command(words) == "python benchmarks/peers/race.py --data DIR --sets inp --out=FILE"


def test_commands_ask_for_the_epochs_and_no_stress() -> None:
    ours = race.our_command("inp", True, 7)
    assert ours[ours.index("--trainer.max_epochs") + 1] == "7"
    assert ours[ours.index("--model.losses.stress.weight") + 1] == "0"
    assert ours[ours.index("--model.compile") + 1] == "true"
    theirs = race.mace_command("average", 7)
    assert theirs[theirs.index("--max_num_epochs") + 1] == "7"
    assert not [word for word in theirs if "stress" in word]


@pytest.mark.parametrize(("epochs", "start"), [(1, 1), (2, 1), (3, 2), (7, 5), (20, 15)])
def test_stage_two_is_the_last_quarter(epochs: int, start: int) -> None:
    command = race.mace_command("average", epochs)
    assert command[command.index("--start_swa") + 1] == str(start)
