"""Training looks up how close atoms come, and keeps it through checkpoints, averaging and resumption."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_stand_ins import TINY, make_data, make_trainer

from escaip import Potential, load_potential
from escaip.errors import ConfigError
from escaip.potential.zbl import closest_distances, zbl_onsets
from escaip.train import BestAndLast, PotentialModule, WeightEMA


def _train(folder: Path, epochs: int = 1, resume: str | None = None, **settings: Any) -> tuple[Potential, Any]:
    module, data = PotentialModule(TINY, **settings), make_data(folder, 12)
    trainer = make_trainer(folder, [WeightEMA(0.9), BestAndLast(dirpath=str(folder))], max_epochs=epochs)
    trainer.fit(module, data, ckpt_path=resume)
    return module.potential, data


def test_onsets_are_those_of_the_training_set(tmp_path: Path) -> None:
    trained, data = _train(tmp_path)
    expected = zbl_onsets(closest_distances(data.datasets["train"])).float()
    assert 0.7 < float(expected[1, 8]) < 0.97
    for potential in (trained, load_potential(tmp_path / "last.ckpt"), load_potential(tmp_path / "best.ckpt")):
        assert torch.equal(potential.repulsion.onset, expected)
    loaded = load_potential(tmp_path / "last.ckpt")
    loaded.save(tmp_path / "model.escaip")
    assert torch.equal(load_potential(tmp_path / "model.escaip").repulsion.onset, expected)


def test_a_resumed_run_keeps_what_its_checkpoint_has(tmp_path: Path) -> None:
    _train(tmp_path, repulsion=None)
    assert not load_potential(tmp_path / "last.ckpt").repulsion
    resumed, _ = _train(tmp_path, 2, str(tmp_path / "last.ckpt"))
    assert not resumed.repulsion
    assert not load_potential(tmp_path / "last.ckpt").repulsion


def test_a_data_module_without_structures(tmp_path: Path) -> None:
    module = PotentialModule(TINY)
    data = make_data(tmp_path, 12)
    data.setup("fit")
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(statistics=data.statistics))  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="set it to null"):
        module.setup("fit")


def test_it_can_be_chosen(tmp_path: Path) -> None:
    fractions = [float(_train(tmp_path / str(f), repulsion=f)[0].repulsion.onset[1, 8]) for f in (0.45, 0.9)]
    assert fractions[1] == pytest.approx(2 * fractions[0], rel=1e-5)
    with pytest.raises(ConfigError, match="repulsion is 2"):
        PotentialModule(TINY, repulsion=2.0)
