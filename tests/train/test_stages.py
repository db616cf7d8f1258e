"""Direct forces, then conservative ones: one run, one set of weights, files that say what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.build
import ase.io
import pytest
import torch
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from lightning.pytorch import Callback
from tiny import batch_of
from training_stand_ins import TINY, make_trainer, write_recipe

from escaip import Potential, load_potential
from escaip.cli import main
from escaip.data import AtomicDataModule
from escaip.models import build_config
from escaip.potential.compile import CompiledEvaluator
from escaip.train import LossSettings, LossTerm, PotentialModule
from escaip.train.metrics import figure_name
from escaip.train.optim import make_optimizer, make_schedule
from escaip.train.stages import forget
from escaip.types import TARGETS


@pytest.mark.parametrize("optimizer", ["soap", "adamw"])
def test_the_weights_stay_and_what_belongs_to_direct_forces_goes(optimizer: str) -> None:
    """Values, state of the optimizer and learning rates; a plain training of the seed starts from the same weights."""
    torch.manual_seed(0)
    plain = Potential(build_config({**TINY, "num_energy_heads": 2}))
    torch.manual_seed(0)
    module = PotentialModule({**TINY, "num_energy_heads": 2}, direct_share=0.5)
    shared = dict(plain.model.named_parameters())
    found = dict(module.potential.model.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in shared.items())
    alone = [weight for name, weight in found.items() if name not in shared]
    assert alone

    names = [f"potential.{name}" for name in module.stages.alone]
    steps = make_optimizer(module, 1e-2, 0.1, name=optimizer, apart=names)
    schedule = make_schedule(steps, 4, 0.5, 0.1)
    for _ in range(2):
        for weight in found.values():
            weight.grad = torch.randn_like(weight)
        steps.step()
        schedule.step()
    before = {weight: steps.state[weight] for weight in steps.state}
    rates = schedule.get_last_lr()
    module.stages.end()
    forget(steps, schedule, module)
    assert not module.stages.is_first
    assert {name: id(weight) for name, weight in module.potential.model.named_parameters()} == {
        name: id(found[name]) for name in shared
    }
    assert sum(len(group["params"]) for group in steps.param_groups) == len(shared)
    assert all(steps.state[weight] is before[weight] for weight in steps.state)
    assert not steps.state.keys() & set(alone)
    steps.step()
    schedule.step()
    assert len(schedule.get_last_lr()) == len(steps.param_groups) < len(rates)


def test_code_compiled_for_the_first_stage_is_dropped() -> None:
    module, batch = PotentialModule(TINY, direct_share=0.5).double(), batch_of()
    potential = module.potential.eval()
    potential.evaluator = CompiledEvaluator(backend="eager")
    first = potential(batch, compute_forces=False)
    module.stages.end()
    torch.testing.assert_close(potential(batch, compute_forces=False).energy, first.energy)


@pytest.mark.parametrize("optimizer", ["soap", "adamw"])
def test_one_run_that_resumes_in_either_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    start = ["fit", "--config", "tiny.yaml", "--model.optimizer", optimizer, "--checkpoint.keep_every_n_steps", "1"]
    stages = [*start, "--model.direct_share", "0.6"]  # the first has four of six steps and a validation
    assert main(stages) == 0
    assert "step 4: forces are conservative from here on" in capsys.readouterr().out
    run = tmp_path / "runs/tiny/version_0"
    forces = {name: load_potential(run / f"{name}.ckpt", "cpu").config.forces for name in ("step-4", "step-5", "best")}
    assert forces == {"step-4": "direct", "step-5": "conservative", "best": "conservative"}
    states = torch.load(run / "step-4.ckpt", weights_only=True)["callbacks"].values()
    assert [state["best_step"] for state in states if "best_step" in state] == [None]  # validated once, direct
    last = load_potential(run / "last.ckpt", "cpu")
    assert last.config == build_config(dict(TINY))
    for step in (2, 5):
        assert main([*stages, "--ckpt_path", str(run / f"step-{step}.ckpt")]) == 0
        resumed = load_potential("runs/tiny/latest/last.ckpt", "cpu").state_dict()
        assert all(torch.equal(value, resumed[name]) for name, value in last.state_dict().items())
        config = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / f"step-{step}.ckpt")]
        assert main(["validate", *config]) == 0
    assert main([*start, "--ckpt_path", str(run / "step-5.ckpt")]) == 2
    assert "trained with model.direct_share 0.6, this run has 0.0" in capsys.readouterr().err


def test_stress_is_learned_in_the_second_stage(tmp_path: Path) -> None:
    frames = []
    for seed in range(8):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed)
        atoms.calc = LennardJones(sigma=2.3, rc=5.0)
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    ase.io.write(tmp_path / "copper.extxyz", frames)
    found = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            found.append(
                (module.stages.is_first, f"train/{figure_name(TARGETS['stress'], 'mae')}" in trainer.callback_metrics)
            )

    losses = LossSettings(stress=LossTerm(1.0))
    module = PotentialModule(TINY, losses, direct_share=0.5)
    data = AtomicDataModule(train=str(tmp_path / "copper.extxyz"), batch_size=2, split={"val": 0})
    make_trainer(tmp_path, [Look()], max_epochs=1, limit_val_batches=0).fit(module, data)
    assert found == [(True, False), (True, False), (False, True), (False, True)]
