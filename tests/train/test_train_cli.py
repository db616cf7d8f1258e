"""``escaip fit`` and its siblings as a user types them, and what they get wrong."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from training_stand_ins import labelled_molecules, write_molecules, write_recipe

from escaip import load_potential
from escaip.cli import main
from escaip.data import AtomicDataModule
from escaip.errors import TrainingError
from escaip.train import PotentialModule
from escaip.train.cli import build


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a recipe, ``tiny.yaml``."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    return tmp_path


def _figures(run: Path, column: str = "train/loss") -> dict[int, str]:
    with (run / "metrics.csv").open(encoding="utf-8") as stream:
        return {int(row["step"]): row[column] for row in csv.DictReader(stream) if row[column]}


def test_fit_then_every_other_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--evaluation.max_structures", "3"]) == 0
    shown = capsys.readouterr()
    assert "force MAE (meV/Å)" in shown.out
    assert "references, zero forces" in shown.out
    assert "validation: loss" in shown.err
    run = folder / "runs" / "tiny" / "latest"
    kept = {"config.yaml", "metrics.csv", "run.log", "best.ckpt", "last.ckpt", "evaluation"}
    assert {path.name for path in run.iterdir()} == kept
    logged = (run / "run.log").read_text(encoding="utf-8").splitlines()
    assert sorted(logged) == sorted(f"{shown.out}{shown.err}".splitlines())
    assert {path.name for path in (run / "evaluation").iterdir()} == {"report.json", "parity.png", "errors.png"}
    report = json.loads((run / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert report["num_structures"] == 3
    assert len(_figures(run)) == 6
    metadata = load_potential(run / "best.ckpt", device="cpu").metadata
    assert metadata.elements == (1, 6, 7, 8)
    assert metadata.provenance["data"]["train"].endswith(" structures")
    error = metadata.provenance["validation_errors"]["force_mae_meV_per_A"]
    assert any(error == pytest.approx(float(value)) for value in _figures(run, "val/force_mae_meV_per_A").values())
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["learning_rate"] == 0.01

    config = str(run / "config.yaml")  # what was saved configures the other commands, and another run
    assert main(["validate", "--config", config, "--ckpt_path", "best"]) == 0
    assert "energy MAE" in capsys.readouterr().out
    write_molecules(folder / "test.extxyz", 5, seed=1)
    assert main(["test", "--config", config, "--data.test", "test.extxyz", "--ckpt_path", "last"]) == 0
    assert "\ntest error" in capsys.readouterr().out
    written = folder / "predictions.extxyz"
    assert main(["predict", str(run / "best.ckpt"), "test.extxyz", "--out", str(written)]) == 0
    frames = ase.io.read(written, ":")
    assert len(frames) == 5
    assert frames[0].get_forces().shape == (len(frames[0]), 3)
    assert frames[0].get_potential_energy() != 0.0
    assert main(["fit", "--config", config, "--trainer.max_epochs", "1"]) == 0
    assert os.readlink(folder / "runs" / "tiny" / "latest") == "version_3"


def test_a_run_that_ends_within_an_epoch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "2"]) == 0
    assert "force MAE (meV/Å)" in capsys.readouterr().out
    checkpoint = torch.load(folder / "runs/tiny/latest/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert main(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "5", "--ckpt_path", "last"]) == 0
    assert sorted(_figures(folder / "runs/tiny/latest")) == [2, 3, 4]


@pytest.mark.parametrize(("patience", "stopped"), [(1, True), (9, False)])
def test_early_stopping_says_so(folder: Path, capsys: pytest.CaptureFixture[str], patience: int, stopped: bool) -> None:
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    stop += [f"--trainer.callbacks.patience={patience}", "--trainer.callbacks.min_delta=1e9"]
    assert main(["fit", "--config", "tiny.yaml", *stop, "--trainer.max_epochs", "3"]) == 0
    assert len(_figures(folder / "runs/tiny/latest")) == (6 if stopped else 9)
    shown = capsys.readouterr().out
    assert ("stopped early at step 6: Monitored metric val/loss did not improve" in shown) == stopped
    assert ("stopped early" in shown) == stopped


@pytest.mark.parametrize(
    ("package", "logger", "written"),
    [
        ("lightning", "CSVLogger --trainer.logger.save_dir logs", "logs/lightning_logs/version_0/metrics.csv"),
        ("tensorboard", "TensorBoardLogger --trainer.logger.save_dir logs", "logs/**/events.out.tfevents.*"),
        ("wandb", "WandbLogger --trainer.logger.offline true", "wandb/offline-run-*/*.wandb"),
        ("mlflow", "MLFlowLogger --trainer.logger.tracking_uri sqlite:///mlflow.db", "mlflow.db"),
    ],
)
def test_loggers_beside_the_csv_file(folder: Path, package: str, logger: str, written: str) -> None:
    pytest.importorskip(package)
    command = ["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1", "--trainer.logger", *logger.split()]
    assert main(command) == 0
    assert len(_figures(folder / "runs/tiny/latest")) == 3
    assert list(folder.glob(written))


def test_the_log_of_a_run_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        sys.stderr.write("\r 10%|#         |")  # a bar
        raise TrainingError("loss is nan")

    monkeypatch.setattr(PotentialModule, "training_step", failing)
    before = sys.stdout, sys.stderr
    assert main(["fit", "--config", "tiny.yaml"]) == 1
    assert (sys.stdout, sys.stderr) == before
    *_, last = (folder / "runs/tiny/version_0/run.log").read_text(encoding="utf-8").splitlines()
    assert last == "TrainingError: loss is nan"


def test_killed_and_resumed(folder: Path) -> None:
    write_recipe(folder, 40, dropout=0.1)
    options = ["--trainer.max_epochs=7", "--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_steps=2"]
    command = ["fit", "--config", "tiny.yaml", *options]
    assert main([*command, "--name", "whole"]) == 0
    expected = _figures(folder / "runs/whole/latest")

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-m", "escaip", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    ) as process:
        last = folder / "runs/tiny/version_0/last.ckpt"
        deadline = time.monotonic() + 60.0
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(0).uniform(0.0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    stopped_at = torch.load(last, weights_only=True)["global_step"]
    assert 0 < stopped_at < 50

    assert main([*command, "--ckpt_path", "last"]) == 0
    resumed = _figures(folder / "runs/tiny/latest")
    assert len(resumed) >= 20
    assert min(resumed) <= stopped_at
    assert resumed == {step: expected[step] for step in resumed}
    assert max(resumed) == max(expected)
    whole, again = (load_potential(folder / f"runs/{name}/latest/last.ckpt", "cpu") for name in ("whole", "tiny"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def _signal_at(monkeypatch: pytest.MonkeyPatch, step: int, *signals: signal.Signals) -> None:
    """Lets the process receive signals in the middle of a step."""
    train = PotentialModule.training_step

    def interrupted(module: PotentialModule, *batch: Any) -> Any:
        if module.trainer.global_step == step:
            for number in signals:
                signal.raise_signal(number)
        return train(module, *batch)

    monkeypatch.setattr(PotentialModule, "training_step", interrupted)


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize(("name", "step"), [("SIGINT", 4), ("SIGTERM", 5), ("SIGUSR1", 3)])  # epochs of three steps
def test_a_signal_saves_and_the_printed_line_continues(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    step: int,
    cluster: bool,
) -> None:
    for key, value in {"JOB_ID": "7", "NTASKS": "1", "JOB_NAME": "job", "PROCID": "0", "LOCALID": "0"}.items():
        if cluster:
            monkeypatch.setenv(f"SLURM_{key}", value)
    command = ["fit", "--config", "tiny.yaml", "--trainer.max_epochs=3", "--data.num_workers", "0"]
    assert main([*command, "--name", "whole"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        _signal_at(patch, step, getattr(signal, name))
        assert main(command) == 128 + getattr(signal, name)
    *_, stopped, line = capsys.readouterr().out.splitlines()
    assert stopped == f"{name}: stopped at step {step + 1}, saved in runs/tiny/version_0/last.ckpt; continue with"
    assert line == "escaip fit --config tiny.yaml --trainer.max_epochs 3 --data.num_workers 0 --ckpt_path last"
    assert torch.load(folder / "runs/tiny/version_0/last.ckpt", weights_only=True)["global_step"] == step + 1
    assert main(shlex.split(line)[1:]) == 0
    whole, parts = (torch.load(folder / f"runs/{run}/latest/last.ckpt", weights_only=True) for run in ("whole", "tiny"))
    assert parts["global_step"] == whole["global_step"] == 9
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][key]), key
    figures = _figures(folder / "runs/tiny/version_0") | _figures(folder / "runs/tiny/latest")
    assert figures == _figures(folder / "runs/whole/latest")
    # Lightning would requeue by itself at a signal outside of training.
    environment = build(command).trainer._accelerator_connector.cluster_environment
    assert not getattr(environment, "auto_requeue", False)


def test_a_signal_before_a_validation_within_an_epoch_loses_neither_it_nor_the_best(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--config", "tiny.yaml", "--trainer.max_epochs=2", "--trainer.val_check_interval=2"]
    assert main([*command, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        _signal_at(patch, 1, signal.SIGTERM)
        assert main(command) == 128 + signal.SIGTERM
    assert "stopped at step 2, " in capsys.readouterr().out
    assert main([*command, "--ckpt_path", "last"]) == 0
    first, second, whole = (folder / "runs" / name for name in ("tiny/version_0", "tiny/latest", "whole/latest"))
    for column in ("train/loss", "val/loss"):
        assert _figures(first, column) | _figures(second, column) == _figures(whole, column)
    best = [torch.load(run / "best.ckpt", weights_only=True)["global_step"] for run in (second, whole)]
    assert best[0] == best[1]


def test_ends_without_a_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second Ctrl-C, Ctrl-C before training, and what Lightning makes of SIGTERM."""
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        _signal_at(patch, 1, signal.SIGINT, signal.SIGINT)
        assert main(["fit", "--config", "tiny.yaml"]) == 130
    assert "SIGINT: stopped before a checkpoint was written" in capsys.readouterr().out
    assert not list(folder.rglob("*.ckpt"))
    assert signal.getsignal(signal.SIGINT) is before
    for error, status in ((KeyboardInterrupt, 130), (SIGTERMException, 143)):
        with monkeypatch.context() as patch:
            patch.setattr(AtomicDataModule, "setup", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            assert main(["fit", "--config", "tiny.yaml"]) == status
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (["--trainer.max_epoch", "5"], 2, "--trainer.max_epoch"),
        (["--model.lr", "1"], 2, "--model.lr"),
        (["--data.trian", "x"], 2, "--data.trian"),
        (["--model.architecture.hiden_size", "8"], 2, "did you mean 'hidden_size'"),
        (["--model.architecture.preset", "3m"], 2, "preset '3m' does not exist"),
        (["--model.architecture.num_heads", "3"], 2, "not a multiple of num_heads 3"),
        (["--model.losses.forces.kind", "l3"], 2, "loss kind 'l3' does not exist"),
        (["--model.losses.energy.weight", "heavy"], 2, "model.losses.energy.weight"),
        (["--model.losses.stress.weight", "1"], 2, "no training structure has stress"),
        (["--config", "no-such-recipe"], 2, "'no-such-recipe' is neither a file nor a recipe"),
        (["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:01:00"], 2, "set trainer.max_steps"),
        (["--trainer.precision", "12"], 2, "precision"),
        (["--data.train", "nowhere.extxyz"], 1, "nowhere.extxyz"),
        (["--data.train", "dataset:spice/nothing.hdf5"], 1, "nothing.hdf5"),
        (["--data.batch_size", "0"], 2, "batch_size"),
        (["--ckpt_path", "nowhere.ckpt"], 1, "checkpoint nowhere.ckpt does not exist"),
        (["--ckpt_path", "last"], 1, "no run in runs/tiny has a last.ckpt"),
        (["--ckpt_path", "molecules.extxyz"], 1, "molecules.extxyz"),
        (["--checkpoint.every_n_steps", "0"], 2, "checkpoint.every_n_steps is 0"),
        (["--ema.decay", "1.0"], 2, "ema.decay is 1.0"),
        (["--ema.decay", "-0.1"], 2, "ema.decay is -0.1"),
        (["--trainer.strategy", "fsdp"], 2, "fsdp divides the weights between processes"),
        (["--trainer.strategy", '{"class_path": "FSDPStrategy"}'], 2, "FSDPStrategy divides the weights"),
        (["--trainer.strategy", "pdd"], 2, "trainer.strategy 'pdd' does not exist: choose among auto, ddp,"),
    ],
)
def test_what_users_get_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, text: str
) -> None:
    assert main(["fit", "--config", "tiny.yaml", *options]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("escaip: error: ")
    assert text in lines[-1]
    assert "Traceback" not in "\n".join(lines)
    assert not (folder / "runs/tiny").exists()


@pytest.mark.bad_input
def test_checkpoints_that_cannot_be_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "3"]) == 0
    last = folder / "runs/tiny/latest/last.ckpt"

    def refused(path: Path, *options: str) -> str:
        assert main(["fit", "--config", "tiny.yaml", "--ckpt_path", str(path), *options]) in (1, 2)
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "raise it to go on" in refused(last, "--trainer.max_epochs", "1")
    assert "trained with model.optimizer soap, this run has adamw: " in refused(last, "--model.optimizer", "adamw")
    assert "num_neighbors 6, this run 5" in refused(last, "--model.architecture.num_neighbors", "5")
    truncated = folder / "truncated.ckpt"
    truncated.write_bytes(last.read_bytes()[:5000])
    assert "truncated.ckpt is damaged" in refused(truncated)
    unsafe = folder / "unsafe.ckpt"
    torch.save({"state_dict": Path("x"), "loops": {}}, unsafe)
    assert "could run code" in refused(unsafe)
    foreign = folder / "foreign.ckpt"
    torch.save({"state_dict": {}, "loops": {}}, foreign)
    assert "another program" in refused(foreign)
    load_potential(last, "cpu").save(folder / "model.escaip")
    assert "model.escaip" in refused(folder / "model.escaip")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a run of two epochs that kept the second of its six steps."""
    folder = tmp_path_factory.mktemp("trained")
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "tiny.yaml", "--checkpoint.keep_every_n_steps", "2"]) == 0
    return folder


@pytest.fixture
def resumed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``trained`` as the working directory."""
    shutil.copytree(trained, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    write_recipe(Path())
    return tmp_path / "here"


RESUME = ["fit", "--config", "tiny.yaml", "--ckpt_path", "last"]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("setting", "was", "value"),
    [
        ("model.learning_rate", "0.01", "0.02"),
        ("model.warmup_fraction", "0.05", "0.5"),
        ("model.losses.energy.weight", "1.0", "3.0"),
        ("model.level_of_theory", "unknown", "PBE"),
        ("model.repulsion", "0.9", "null"),
        ("data.batch_size", "4", "5"),
        ("data.seed", "0", "1"),
        ("trainer.max_epochs", "2", "1"),
        ("trainer.accumulate_grad_batches", "1", "2"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings(
    resumed: Path, capsys: pytest.CaptureFixture[str], setting: str, was: str, value: str
) -> None:
    assert main([*RESUME, f"--{setting}", value]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    last = "runs/tiny/version_0/last.ckpt"
    assert f"{last} was trained with {setting} {was}, this run has {value}: " in line
    assert line.endswith(f"--model.init_from {last}")


@pytest.mark.bad_input
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_run_is_resumed_with_its_own_structures(resumed: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    write_molecules(resumed / "other.extxyz", 16, seed=7)
    command = [*RESUME, "--trainer.max_epochs", "3"]
    assert main([*command, f"--data.{part}", "other.extxyz"]) == 2
    assert "data.train 12 structures (" in (line := capsys.readouterr().err)
    assert sorted(os.listdir("runs/tiny")) == ["latest", "version_0"]
    assert os.readlink("runs/tiny/latest") == "version_0"
    assert f", this run has {12 if part == 'train' else 16} structures (" in line
    assert "--model.init_from" in line
    os.rename("molecules.extxyz", "moved.extxyz")
    assert main([*command, "--data.train", "moved.extxyz", "--data.num_workers", "1", "--name", "tiny"]) == 0


def test_a_longer_run_follows_the_schedule_of_its_length(resumed: Path) -> None:
    """Raising the limit is allowed: the rate goes on where a run of that length has it."""
    assert main([*RESUME, "--trainer.max_epochs", "4"]) == 0
    assert main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "4", "--name", "long"]) == 0
    longer, whole = (_figures(resumed / f"runs/{name}/latest", "lr") for name in ("tiny", "long"))
    assert sorted(longer) == [6, 7, 8, 9, 10, 11]
    assert {step: longer[step] for step in range(7, 12)} == {step: whole[step] for step in range(7, 12)}


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "epochs"), [("last.ckpt", 3), ("last.ckpt", 2), ("best.ckpt", 3), ("step-4.ckpt", 3)])
def test_a_resumed_run_has_its_own_best_and_leaves_the_old_folder_alone(resumed: Path, name: str, epochs: int) -> None:
    old, new = resumed / "runs/tiny/version_0", resumed / "runs/tiny/version_1"
    before = _content(old)
    # Nothing is better than this, so the best so far stays the best.
    options = ["--ckpt_path", str(old / name), f"--trainer.max_epochs={epochs}", "--evaluation.max_structures", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PotentialModule, "_log_errors", _worse(PotentialModule._log_errors))
        assert main(["fit", "--config", "tiny.yaml", *options]) == 0
    assert _content(old) == before
    assert {"best.ckpt", "evaluation/report.json"} <= set(_content(new))
    assert (new / "last.ckpt").exists() == (epochs == 3)
    # After step 4 the best was that of step 3, and the file has gone on since.
    assert torch.load(old / "best.ckpt", weights_only=True)["global_step"] == 6
    assert (_content(new)["best.ckpt"] == before["best.ckpt"]) == (name != "step-4.ckpt")
    report = json.loads((new / "evaluation/report.json").read_text(encoding="utf-8"))
    assert "version_1" in report["model"]


@pytest.mark.bad_input
@pytest.mark.parametrize("options", [["--checkpoint.dirpath", "runs/tiny/version_0"], ["--trainer.logger", "false"]])
def test_a_run_does_not_overwrite_the_checkpoints_of_another(
    resumed: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    for file in (resumed / "runs/tiny/version_0").glob("*.ckpt"):  # where a run without a logger keeps them
        shutil.copy(file, resumed / "runs/tiny")
    before = _content(resumed / "runs")
    assert main(["fit", "--config", "tiny.yaml", *options]) == 2
    assert "holds the checkpoints of another run: choose another --name" in capsys.readouterr().err
    assert _content(resumed / "runs") == before
    assert os.readlink("runs/tiny/latest") == "version_0"
    assert not Path("runs/tiny/version_1").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("prepared", [False, True])
def test_ions_are_refused_by_a_model_that_is_not_told_the_charge(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str, prepared: bool
) -> None:
    structures = labelled_molecules(8)
    for atoms in structures:
        atoms.info["charge"] = -1
    ase.io.write("ions.extxyz", structures)
    if prepared:
        assert main(["data", "convert", "ions.extxyz", "ions"]) == 0
    sets = [f"--data.{part}", "ions" if prepared else "ions.extxyz"]
    sets += ["--data.train", "molecules.extxyz"] if part == "val" else []
    with monkeypatch.context() as patch:
        patch.setattr(PotentialModule, "training_step", lambda *_: pytest.fail("a step was made"))
        assert main(["fit", "--config", "tiny.yaml", *sets]) == 1
    message = rf"data.{part}: (\d) of \1 structures are charged, ions.extxyz:\d the first, and the model is not told: "
    assert re.search(f"{message}set model.architecture.charge to true", capsys.readouterr().err)
    assert not Path("runs/tiny").exists()
    assert main(["fit", "--config", "tiny.yaml", *sets, "--model.architecture.charge", "true"]) == 0


@pytest.mark.bad_input
def test_a_level_of_theory_that_the_data_contradict_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structures = labelled_molecules(8)
    for atoms in structures:
        atoms.info["level_of_theory"] = "PBE"
    ase.io.write("stated.extxyz", structures)
    command = ["fit", "--config", "tiny.yaml", "--data.train", "stated.extxyz", "--model.level_of_theory"]
    assert main([*command, "HF"]) == 2
    message = "model.level_of_theory is HF, the training data state PBE: leave model.level_of_theory out, or correct"
    assert message in capsys.readouterr().err
    assert not Path("runs/tiny").exists()
    assert main([*command, "PBE"]) == 0


def _worse(log: Any) -> Any:
    def logged(module: PotentialModule, stage: str) -> None:
        log(module, stage)
        module.log("val/loss", 1e9 + module.trainer.global_step, batch_size=1)

    return logged


@pytest.mark.bad_input
@pytest.mark.parametrize("mixed", [False, True])
def test_elements_of_the_validation_set_alone_are_refused_before_the_first_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mixed: bool
) -> None:
    monkeypatch.setattr(PotentialModule, "training_step", lambda *_: pytest.fail("a step was made"))
    ase.io.write("ammonia.extxyz", labelled_molecules(8, names=("NH3",)))
    ase.io.write("water.extxyz", labelled_molecules(8, names=("H2O",)))
    train: Any = {"a": {"path": "water.extxyz"}, "b": {"path": "ammonia.extxyz"}} if mixed else "water.extxyz"
    val: Any = {"a": {"path": "ammonia.extxyz"}} if mixed else "ammonia.extxyz"
    shown = [json.dumps(value) if mixed else value for value in (train, val)]
    sets = [f"--data.train={shown[0]}", f"--data.val={shown[1]}"]
    assert main(["fit", "--config", "tiny.yaml", *sets]) == 1
    name = ".a" if mixed else ""
    assert f"data.val{name} holds N, which data.train{name} does not" in capsys.readouterr().err
    assert not Path("runs/tiny").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_model_is_needed(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--config", "tiny.yaml"]) == 2
    assert "pass --ckpt_path FILE" in capsys.readouterr().err


@pytest.mark.parametrize("heads", ["1", "2"])
def test_a_mixture_trains_resumes_and_is_evaluated_by_set(
    folder: Path, capsys: pytest.CaptureFixture[str], heads: str
) -> None:
    write_molecules(folder / "a.extxyz", 20, seed=1)
    write_molecules(folder / "b.extxyz", 8, seed=2)
    shifted = ase.io.read(folder / "b.extxyz", ":")
    for atoms in shifted:
        atoms.calc.results["energy"] -= 7.0 * float((atoms.numbers == 1).sum())
        atoms.numbers[atoms.numbers == 1] = 9
    ase.io.write(folder / "b.extxyz", shifted)
    sets = json.dumps({"a": {"path": "a.extxyz"}, "b": {"path": "b.extxyz"}})
    sampling = json.dumps({"weights": {"a": 1, "b": 1}, "epoch_size": 24})
    split = json.dumps({"by": "structure", "val": 2})
    command = ["fit", "--config", "tiny.yaml", "--data.train", sets, "--data.sampling", sampling, "--data.split", split]
    command += ["--model.architecture.num_energy_heads", heads]
    assert main([*command, "--trainer.max_epochs", "2"]) == 0
    shown = capsys.readouterr().out
    assert "an epoch takes 12 of a, 12 of b" in shown
    header = next(line for line in shown.splitlines() if line.startswith("validation error"))
    assert header.split()[-7:] == ["step", "12", "a", "b", "references,", "zero", "forces"]  # another step may be best
    best = folder / "runs" / "tiny" / "latest" / "best.ckpt"
    potential = load_potential(best, device="cpu")
    assert potential.datasets == ("a", "b")
    assert potential.element_references.shape == (2, 119)
    assert float(potential.element_references[0, 1] - potential.element_references[1, 9]) == pytest.approx(7.0, abs=0.5)
    assert float(potential.core_guard.onset[9, 9]) > 0.0  # in six structures: all of b, few of the mixture
    assert main([*command, "--trainer.max_epochs", "3", "--ckpt_path", "last"]) == 0
    assert main(["validate", *command[1:], "--ckpt_path", str(best)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(best), "b.extxyz", "--no-plots"]) == 2
    assert "references for each of a, b" in capsys.readouterr().err
    assert main(["evaluate", str(best), "b.extxyz", "--no-plots", "--dataset", "b"]) == 0
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert report["num_structures"] == 8
    for words in (
        ["predict", str(best), "b.extxyz", "--out", "p.extxyz"],
        ["md", str(best), "b.extxyz", "--steps", "2"],
    ):
        assert main([*words, "--dataset", "b"]) == 0
    (expected,) = load_potential(best, "cpu", dataset="b").predict(shifted[:1])
    assert ase.io.read("p.extxyz", 0).get_forces() == pytest.approx(expected.forces.numpy(), abs=1e-5)
    name = "val/force_mae_meV_per_A"
    a, b, both = (
        float(*_figures(folder / "runs" / "tiny" / "latest", key).values()) for key in (f"{name}/a", f"{name}/b", name)
    )
    assert min(a, b) < both < max(a, b)
    assert main(["info", str(best)]) == 0
    shown = capsys.readouterr().out
    assert "force_scale" in shown


MERGED = [
    ({"units": {"length": "bohr", "energy": "hartree"}}, ["units.length=bohr", "units.energy=hartree"]),
    ({"keys": {"forces": "F", "energy": "E"}, "units": {"length": "nm"}}, ["keys.energy=E"]),
    ({"keys": {"forces": "G"}, "units": {"length": "nm"}, "limit": 7}, ["keys.forces=G", "limit=7"]),
]


@pytest.mark.parametrize(("expected", "options"), MERGED)
def test_nested_options_are_merged(folder: Path, expected: dict[str, Any], options: list[str]) -> None:
    """Later options leave the earlier ones, and the recipe's, in place; in the equals form and in the other."""
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    recipe["data"]["train"] = {"path": recipe["data"]["train"]}
    if len(expected) > 1:
        recipe["data"]["train"].update(keys={"forces": "F"}, units={"length": "nm"})
    (folder / "merged.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    expected = {"path": recipe["data"]["train"]["path"], **expected}
    for separate in (False, True):
        given = [f"--data.train.{option}" for option in options]
        given = [part for option in given for part in option.split("=")] if separate else given
        assert build(["fit", "--config", "merged.yaml", *given]).config["fit"].data.train == expected


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--data.train.keys.energy", "E"], "--data.train.keys.energy cannot be merged with"),
        (["--data.train.path", "x", "--data.train", "y"], "write --data.train.path y"),
        (["--data.split.by.x", "1"], "--data.split.by.x cannot be merged with 'structure'"),
    ],
)
def test_options_that_cannot_be_merged(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    assert main(["fit", "--config", "tiny.yaml", *options]) == 2
    assert text in capsys.readouterr().err


def test_errors_come_before_heavy_imports(folder: Path) -> None:
    """Wrong names and paths, and a class whose module a configuration would import."""
    (folder / "evil.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    for name, trainer in {
        "class": {"callbacks": [{"class_path": "evil.Callback"}]}, "short": {"logger": "evil.Logger"},
    }.items():  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": trainer}), encoding="utf-8")
    cases = {
        "no-such-recipe": ["fit", "--config", "no-such-recipe"],
        "--modle": ["fit", "--config", "tiny.yaml", "--modle.learning_rate", "1"],
        "nowhere.extxyz": ["fit", "--config=tiny.yaml", "--data.train=nowhere.extxyz"],
        "nothing.hdf5": ["fit", "--config", "tiny.yaml", "--data.val", "dataset:spice/nothing.hdf5"],
        "nowhere.escaip": ["fit", "--config", "tiny.yaml", "--model.init_from", "nowhere.escaip"],
        "nowhere.ckpt": ["validate", "--config", "tiny.yaml", "--ckpt_path", "nowhere.ckpt"],
        "evil.Callback": ["fit", "--config", "class.yaml"],
        "evil.Logger": ["fit", "--config", "short.yaml"],
    }
    code = f"""if True:
        import sys
        from escaip.errors import EscaipError
        from escaip.train import commands
        for text, (command, *options) in {cases!r}.items():
            try:
                getattr(commands, command)(options)
                raise AssertionError(f"{{text}}: no error")
            except EscaipError as error:
                assert text in str(error), (text, error)
        heavy = {{"torch", "numpy", "lightning", "ase"}} & set(sys.modules)
        assert not heavy, heavy
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
