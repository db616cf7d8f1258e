"""What a training takes from its data: shifts of the element references, and onsets of the repulsion."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from training_stand_ins import TINY, labelled_molecules, make_data, make_trainer

from escaip import Potential, load_potential
from escaip.data import AtomicData, collate
from escaip.errors import ConfigError
from escaip.potential.zbl import closest_distances, zbl_onsets
from escaip.train import BestAndLast, ForceTerm, LossSettings, PotentialModule, WeightEMA
from escaip.train.atomic_energy_refit import ReferenceFit
from escaip.train.losses import LossTerm
from escaip.types import Prediction

ELEMENTS = (1, 6, 7, 8)
OFF = torch.zeros(119, dtype=torch.float64)
OFF[list(ELEMENTS)] = torch.tensor([0.5, -2.0, 3.0, 1.0], dtype=torch.float64)


def _batch(count: int = 6, seed: int = 0, names: tuple[str, ...] = ("H2O", "NH3", "CH4", "CH3OH", "C2H6")) -> Any:
    return collate([AtomicData.from_ase(atoms) for atoms in labelled_molecules(count, seed, names)])


def _off_by(batch: Any, off: torch.Tensor) -> Prediction:
    """Predictions whose errors are linear in the composition."""
    atomic = off[batch.atomic_numbers]
    energy = batch.energy - atomic.new_zeros(len(batch.energy)).index_add(0, batch.batch, atomic)
    return Prediction(energy, None, None, atomic)


@pytest.mark.parametrize("term", [LossTerm(1.0, "mse"), LossTerm(1.0, "mae"), LossTerm(1.0, "huber", 0.1)])
def test_errors_linear_in_the_composition_are_found_exactly(term: LossTerm) -> None:
    fit = ReferenceFit(ELEMENTS, [True], term)
    for seed in range(3):
        batch = _batch(10, seed)
        batch.energy[seed] = torch.nan  # not labelled
        fit.add(fit.of_batch(_off_by(batch, OFF), batch))
    np.testing.assert_allclose(fit.solve()[0], OFF, atol=1e-10)
    assert not fit.sums.any()


def test_weights_are_those_of_the_loss() -> None:
    """Absolute errors: a wild structure does not move the others, after some rounds."""
    batch = _batch(30)
    found = {}
    for kind in ("mse", "mae"):
        off, fit = OFF.clone(), ReferenceFit(ELEMENTS, [True], LossTerm(1.0, kind))
        for _ in range(30):
            prediction = _off_by(batch, off)
            prediction.energy[0] += 100.0
            fit.add(fit.of_batch(prediction, batch))
            off = off - fit.solve()[0]
        found[kind] = float(off.abs().max())
    assert found["mae"] < 1e-3
    assert found["mse"] > 0.1


def test_one_composition_has_one_sum() -> None:
    batch = _batch(4, names=("CH4",))
    fit = ReferenceFit(ELEMENTS, [True], LossTerm(1.0))
    fit.add(fit.of_batch(_off_by(batch, OFF), batch))
    shift = fit.solve()[0]
    assert float(shift[6] + 4 * shift[1]) == pytest.approx(float(OFF[6] + 4 * OFF[1]), rel=1e-10)
    assert float(shift[7]) == float(shift[8]) == 0.0


def test_sets_are_kept_apart_and_given_references_stay() -> None:
    batch = _batch(10)
    batch.dataset = torch.tensor([0, 1] * 5)
    fit = ReferenceFit(ELEMENTS, [True, False], LossTerm(1.0, "mse"))
    other = batch.clone()
    prediction = _off_by(batch, OFF)
    prediction.energy[1::2] += 7.0
    fit.add(fit.of_batch(prediction, other))
    shifts = fit.solve()
    np.testing.assert_allclose(shifts[0], OFF, atol=1e-9)
    assert not shifts[1].any()


def _train(folder: Path, epochs: int, isolated: dict[str, float] | None = None, **settings: Any) -> Potential:
    """Weights that hardly move, and references that start from the labels alone."""
    seed_everything(0)
    module = PotentialModule(TINY, learning_rate=1e-12, weight_decay=0.0, **settings)
    callbacks = [WeightEMA(0.9), BestAndLast(dirpath=str(folder))]
    data = make_data(folder, 24, isolated_energies=isolated)
    make_trainer(folder, callbacks, max_epochs=epochs).fit(module, data)
    return module.potential


def test_training_moves_them_to_what_the_model_leaves(tmp_path: Path) -> None:
    trained = _train(tmp_path, 2, losses=LossSettings(LossTerm(1.0, "mse"), ForceTerm(1.0)))
    batches = make_data(tmp_path, 24)
    batches.setup("fit")
    rows, left = [], []
    with torch.no_grad():
        for batch in batches.train_dataloader():
            energy = trained(batch, create_graph=False).energy
            sizes = batch.ptr[1:] - batch.ptr[:-1]
            for index, atoms in enumerate(sizes.tolist()):
                numbers = batch.atomic_numbers[batch.batch == index]
                rows.append([float((numbers == z).sum()) / atoms for z in ELEMENTS])
            left.append((batch.energy - energy) / sizes)
    slope = np.linalg.lstsq(np.array(rows), torch.cat(left).numpy(), rcond=None)[0]
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)  # nothing linear is left
    assert float(trained.element_references[1]) == pytest.approx(batches.statistics.element_references[1], rel=1e-12)
    assert float(trained.element_shifts.abs().max()) > 1e-4
    saved = load_potential(tmp_path / "last.ckpt")
    assert torch.equal(saved.element_shifts, trained.element_shifts)
    assert saved(batch, create_graph=False).energy.tolist() == pytest.approx(energy.tolist(), rel=1e-6)


def test_they_stay_where_asked_and_where_given(tmp_path: Path) -> None:
    assert not _train(tmp_path, 2, refit_references=False).element_shifts.any()
    isolated = {"H": -13.0, "C": -5.0, "N": -5.5, "O": -6.0}
    trained = _train(tmp_path, 2, isolated)
    assert trained.element_references[list(ELEMENTS)].tolist() == [-13.0, -5.0, -5.5, -6.0]
    assert not trained.element_shifts.any()


def _repelled(folder: Path, epochs: int = 1, resume: str | None = None, **settings: Any) -> tuple[Potential, Any]:
    module, data = PotentialModule(TINY, **settings), make_data(folder, 12)
    trainer = make_trainer(folder, [WeightEMA(0.9), BestAndLast(dirpath=str(folder))], max_epochs=epochs)
    trainer.fit(module, data, ckpt_path=resume)
    return module.potential, data


def test_onsets_are_those_of_the_training_set(tmp_path: Path) -> None:
    trained, data = _repelled(tmp_path)
    expected = zbl_onsets(closest_distances(data.datasets["train"])).float()
    assert 0.7 < float(expected[1, 8]) < 0.97
    for potential in (trained, load_potential(tmp_path / "last.ckpt"), load_potential(tmp_path / "best.ckpt")):
        assert torch.equal(potential.repulsion.onset, expected)
    loaded = load_potential(tmp_path / "last.ckpt")
    loaded.save(tmp_path / "model.escaip")
    assert torch.equal(load_potential(tmp_path / "model.escaip").repulsion.onset, expected)


def test_a_resumed_run_keeps_what_its_checkpoint_has(tmp_path: Path) -> None:
    _repelled(tmp_path, repulsion=None)
    assert not load_potential(tmp_path / "last.ckpt").repulsion
    resumed, _ = _repelled(tmp_path, 2, str(tmp_path / "last.ckpt"))
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
    fractions = [float(_repelled(tmp_path / str(f), repulsion=f)[0].repulsion.onset[1, 8]) for f in (0.45, 0.9)]
    assert fractions[1] == pytest.approx(2 * fractions[0], rel=1e-5)
    with pytest.raises(ConfigError, match="repulsion is 2"):
        PotentialModule(TINY, repulsion=2.0)
