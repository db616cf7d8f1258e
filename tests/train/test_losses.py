"""Losses and errors against NumPy: missing labels, constrained atoms, weights that move, sums that add up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from training_stand_ins import labelled_molecules

from escaip.data import AtomicData, collate, fit_statistics
from escaip.errors import ConfigError
from escaip.train.losses import ForceTerm, LossSettings, LossTerm, loss_sums
from escaip.train.metrics import ErrorMetrics
from escaip.types import TARGETS, Prediction, Target


def _batch(count: int = 3) -> Any:
    return collate([AtomicData.from_ase(atoms) for atoms in labelled_molecules(count)])


def _prediction(batch: Any, seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)

    def noisy(labels: torch.Tensor) -> torch.Tensor:
        start = torch.nan_to_num(labels)
        return (start + 0.1 * torch.randn(labels.shape, generator=generator, dtype=labels.dtype)).requires_grad_()

    return Prediction(noisy(batch.energy), noisy(batch.forces), noisy(batch.stress), batch.energy)


def _total(prediction: Prediction, batch: Any, settings: LossSettings) -> float:
    return float(loss_sums(prediction, batch, settings).total(settings).detach())


def test_values_by_hand() -> None:
    batch = _batch()
    prediction = _prediction(batch)
    prediction = replace(prediction, forces=prediction.forces.float())  # as a model in float32 predicts them
    terms = loss_sums(prediction, batch, LossSettings(stress=LossTerm(1.0)))
    natoms = (batch.ptr[1:] - batch.ptr[:-1]).numpy()
    energy = np.abs((prediction.energy.detach() - batch.energy).numpy()) / natoms
    norms = np.linalg.norm((prediction.forces.detach() - batch.forces).numpy(), axis=1)
    per_structure = [norms[start:stop].mean() for start, stop in zip(batch.ptr[:-1], batch.ptr[1:], strict=True)]
    np.testing.assert_allclose(terms.sums.detach().numpy(), [energy.sum(), np.sum(per_structure), 0.0], rtol=1e-12)
    assert terms.counts.tolist() == [3.0, 3.0, 0.0]
    total = terms.total(LossSettings(LossTerm(2.0), ForceTerm(5.0), LossTerm(7.0)))
    assert float(total.detach()) == pytest.approx(2.0 * energy.mean() + 5.0 * np.mean(per_structure), rel=1e-12)


@pytest.mark.parametrize("kind", ["l2", "mae", "mse", "huber"])
def test_kinds(kind: str) -> None:
    batch = _batch()
    prediction = _prediction(batch)
    delta = 0.05

    def expected(error: np.ndarray) -> float:
        huber = np.where(np.abs(error) < delta, error**2 / (2 * delta), np.abs(error) - delta / 2)
        norm = np.linalg.norm(error, axis=1)
        values = {"l2": norm, "mae": np.abs(error), "mse": error**2, "huber": huber}
        return float(values[kind].mean())

    forces = (prediction.forces.detach() - batch.forces).numpy()
    energy = ((prediction.energy.detach() - batch.energy) / (batch.ptr[1:] - batch.ptr[:-1])).numpy()[:, None]
    settings = LossSettings(LossTerm(0.0), ForceTerm(1.0, kind, delta, average="atom"))
    assert _total(prediction, batch, settings) == pytest.approx(expected(forces), rel=1e-12)
    sizes = (batch.ptr[1:] - batch.ptr[:-1]).numpy()[:, None]
    for per, factor in {"atom": 1.0, "root": np.sqrt(sizes), "structure": sizes}.items():
        settings = LossSettings(LossTerm(1.0, kind, delta, per=per), ForceTerm(0.0))
        assert _total(prediction, batch, settings) == pytest.approx(expected(energy * factor), rel=1e-12)


@pytest.mark.parametrize("everything", [False, True])
def test_missing_labels_give_no_nan_and_no_gradient(everything: bool) -> None:
    batch = _batch()
    batch.energy[slice(None) if everything else 1] = math.nan
    batch.forces[slice(None) if everything else batch.batch == 2] = math.nan
    batch.forces[0, 1] = math.nan  # one component of one atom
    prediction = _prediction(batch)
    settings = LossSettings(LossTerm(1.0, "huber"), ForceTerm(1.0), LossTerm(1.0))
    terms = loss_sums(prediction, batch, settings)
    assert terms.counts.tolist() == ([0.0, 0.0, 0.0] if everything else [2.0, 2.0, 0.0])
    total = terms.total(settings)
    total.backward()
    assert (float(total.detach()) == 0.0) == everything
    for gradient in (prediction.energy.grad, prediction.forces.grad, prediction.stress.grad):
        assert bool(torch.isfinite(gradient).all())
    assert float(prediction.energy.grad[1]) == 0.0
    assert not prediction.forces.grad[batch.batch == 2].any()
    assert not prediction.forces.grad[0].any()
    assert bool(prediction.forces.grad[1].any()) != everything
    assert not prediction.stress.grad.any()


def test_fixed_atoms_carry_no_force_loss() -> None:
    batch = _batch()
    batch.fixed[:2] = True
    prediction = _prediction(batch)
    settings = LossSettings(LossTerm(0.0), ForceTerm(1.0, average="atom"))
    terms = loss_sums(prediction, batch, settings)
    assert float(terms.counts[1]) == batch.num_nodes - 2
    terms.total(settings).backward()
    assert not prediction.forces.grad[:2].any()
    assert bool(prediction.forces.grad[2:].any(-1).all())


def test_a_perfect_force_has_a_finite_gradient() -> None:
    batch = _batch()
    forces = batch.forces.clone().requires_grad_()
    prediction = Prediction(batch.energy, forces, None, batch.energy)
    loss_sums(prediction, batch, LossSettings()).total(LossSettings()).backward()
    assert not forces.grad.any()


def test_sums_add_up_over_batches() -> None:
    structures = [AtomicData.from_ase(atoms) for atoms in labelled_molecules(6)]
    structures[4].energy[:] = math.nan
    whole, parts = collate(structures), [collate([structure]) for structure in structures]

    def shift(batch: Any) -> Prediction:
        return Prediction(batch.energy + 0.1, 0.9 * batch.forces, None, batch.energy)

    settings = LossSettings()
    terms = [loss_sums(shift(part), part, settings) for part in parts]
    counts = torch.stack([term.counts for term in terms]).sum(0)
    together = sum(float(term.total(settings, counts)) for term in terms)
    assert together == pytest.approx(_total(shift(whole), whole, settings), rel=1e-13)


def test_weights_move_to_the_final_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "charges", Target("charges", True, (), "e", "me", 1e3))
    rising, falling = LossTerm(1.0, final_weight=100.0), ForceTerm(10.0, final_weight=5.0)
    settings = LossSettings(rising, falling, LossTerm(3.0), 0.6, {"charges": rising})
    expected = {0.0: (1.0, 10.0), 0.3: (1.0, 10.0), 0.6: (1.0, 10.0), 0.8: (10.0, 50.0**0.5), 1.0: (100.0, 5.0)}
    for progress, (energy, forces) in {**expected, 1.2: (100.0, 5.0)}.items():
        found = settings.at(progress).weights
        assert found == pytest.approx({"energy": energy, "forces": forces, "stress": 3.0, "charges": energy})
    assert settings.weights == {"energy": 100.0, "forces": 5.0, "stress": 3.0, "charges": 100.0}  # used in validations
    assert LossSettings(LossTerm(1.0, final_weight=4.0), change_after=1.0).at(0.99).weights["energy"] == 1.0
    assert LossSettings().at(0.9) == LossSettings()
    assert LossSettings().weights == {"energy": 1.0, "forces": 10.0, "stress": 0.0}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LossTerm(1.0, "l1"), "loss kind 'l1'"),
        (lambda: ForceTerm(1.0, "l3"), "loss kind 'l3'"),
        (lambda: ForceTerm(-1.0), "weight -1.0"),
        (lambda: ForceTerm(math.nan), "weight nan"),
        (lambda: LossTerm(1.0, "huber", 0.0), "delta 0.0"),
        (lambda: ForceTerm(average="batch"), "'batch'"),
        (lambda: LossTerm(per="cell"), "'cell'"),
        (lambda: LossSettings(forces=ForceTerm(per="structure")), "forces does not grow"),
        (lambda: LossSettings(LossTerm(1.0, average="atom")), "energy has one value per structure"),
        (lambda: LossSettings(LossTerm(0.0), ForceTerm(0.0)), "every loss weight is 0"),
        (lambda: LossTerm(1.0, final_weight=0.0), "final_weight 0.0"),
        (lambda: ForceTerm(1.0, final_weight=math.inf), "final_weight inf"),
        (lambda: LossTerm(0.0, final_weight=2.0), "final_weight is 2.0, but weight is 0"),
        (lambda: LossSettings(change_after=1.5), "change_after is 1.5"),
    ],
)
def test_invalid_settings(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


def test_errors_and_baseline_against_numpy() -> None:
    structures = [AtomicData.from_ase(atoms) for atoms in labelled_molecules(7)]
    structures[3].energy[:] = math.nan
    structures[5].forces[:] = math.nan
    references = torch.zeros(119, dtype=torch.float64)
    for number, energy in fit_statistics(structures).element_references.items():
        references[number] = energy
    metrics = ErrorMetrics(LossSettings())
    energies, forces, labels, baseline = [], [], [], []
    rng = np.random.default_rng(0)
    for part in (structures[:4], structures[4:]):
        batch = collate(part)
        energy = torch.nan_to_num(batch.energy) + torch.from_numpy(rng.normal(0, 0.1, batch.num_graphs))
        force = torch.nan_to_num(batch.forces) + torch.from_numpy(rng.normal(0, 0.1, batch.forces.shape))
        metrics.update(Prediction(energy, force, None, energy), batch, references[batch.atomic_numbers])
        natoms = (batch.ptr[1:] - batch.ptr[:-1]).numpy()
        known = ~np.isnan(batch.energy.numpy())
        energies.append(((energy - batch.energy).numpy() / natoms)[known])
        sums = np.array([references[data.atomic_numbers].sum().item() for data in part])
        baseline.append(((sums - batch.energy.numpy()) / natoms)[known])
        known = ~np.isnan(batch.forces.numpy()).any(1)
        forces.append(force.numpy()[known])
        labels.append(batch.forces.numpy()[known])
    error, force, label = np.concatenate(energies), np.concatenate(forces), np.concatenate(labels)
    cosine = (force * label).sum(1) / np.linalg.norm(force, axis=1) / np.linalg.norm(label, axis=1)
    result = metrics.compute()
    loss = result["model"].pop("loss")
    assert loss > 0.0
    assert result["model"] == pytest.approx({
        "energy_mae_meV_per_atom": 1e3 * np.abs(error).mean(),
        "energy_rmse_meV_per_atom": 1e3 * np.sqrt((error**2).mean()),
        "force_mae_meV_per_A": 1e3 * np.abs(force - label).mean(),
        "force_rmse_meV_per_A": 1e3 * np.sqrt(((force - label) ** 2).mean()),
        "force_cosine": cosine.mean(),
    })  # fmt: skip
    trivial = result["baseline"]
    assert trivial["energy_mae_meV_per_atom"] == pytest.approx(1e3 * np.abs(np.concatenate(baseline)).mean(), rel=1e-9)
    assert trivial["force_mae_meV_per_A"] == pytest.approx(1e3 * np.abs(label).mean(), rel=1e-12)
    assert trivial["force_cosine"] == 0.0
