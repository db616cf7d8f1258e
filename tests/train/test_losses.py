"""Losses: values by hand, missing labels, constrained atoms, sums that add up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from training_stand_ins import labelled_molecules

from escaip.data import AtomicData, collate
from escaip.errors import ConfigError
from escaip.train.losses import ForceTerm, LossSettings, LossTerm, loss_sums
from escaip.types import Prediction


def _batch(count: int = 3):
    return collate([AtomicData.from_ase(atoms) for atoms in labelled_molecules(count)])


def _prediction(batch, seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)

    def noisy(labels):
        start = torch.nan_to_num(labels)
        return (start + 0.1 * torch.randn(labels.shape, generator=generator, dtype=labels.dtype)).requires_grad_()

    return Prediction(noisy(batch.energy), noisy(batch.forces), noisy(batch.stress), batch.energy)


def test_values_by_hand() -> None:
    batch = _batch()
    prediction = _prediction(batch)
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
def test_force_kinds_over_atoms(kind: str) -> None:
    batch = _batch()
    prediction = _prediction(batch)
    error = (prediction.forces.detach() - batch.forces).numpy()
    delta = 0.05
    huber = np.where(np.abs(error) < delta, error**2 / (2 * delta), np.abs(error) - delta / 2)
    expected = {
        "l2": np.linalg.norm(error, axis=1).mean(),
        "mae": np.abs(error).mean(),
        "mse": (error**2).mean(),
        "huber": huber.mean(),
    }[kind]
    settings = LossSettings(LossTerm(0.0), ForceTerm(1.0, kind, delta, average="atom"))
    assert float(loss_sums(prediction, batch, settings).total(settings).detach()) == pytest.approx(expected, rel=1e-12)


def test_missing_labels_give_no_nan_and_no_gradient() -> None:
    batch = _batch()
    batch.energy[1] = math.nan
    batch.forces[batch.batch == 2] = math.nan
    batch.forces[0, 1] = math.nan  # one component of one atom
    prediction = _prediction(batch)
    settings = LossSettings(LossTerm(1.0, "huber"), ForceTerm(1.0), LossTerm(1.0))
    terms = loss_sums(prediction, batch, settings)
    assert terms.counts.tolist() == [2.0, 2.0, 0.0]
    terms.total(settings).backward()
    for gradient in (prediction.energy.grad, prediction.forces.grad, prediction.stress.grad):
        assert gradient is not None
        assert bool(torch.isfinite(gradient).all())
    assert float(prediction.energy.grad[1]) == 0.0
    assert not prediction.forces.grad[batch.batch == 2].any()
    assert not prediction.forces.grad[0].any()
    assert bool(prediction.forces.grad[1].any())
    assert not prediction.stress.grad.any()


def test_a_batch_without_any_label_is_exactly_zero_and_differentiable() -> None:
    batch = _batch()
    batch.energy[:] = math.nan
    batch.forces[:] = math.nan
    prediction = _prediction(batch)
    loss = loss_sums(prediction, batch, LossSettings()).total(LossSettings())
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert not prediction.energy.grad.any()
    assert not prediction.forces.grad.any()


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
    whole, parts = collate(structures), [collate(structures[:1]), collate(structures[1:])]

    def shift(batch):
        return Prediction(batch.energy + 0.1, 0.9 * batch.forces, None, batch.energy)

    settings = LossSettings()
    terms = [loss_sums(shift(part), part, settings) for part in parts]
    counts = terms[0].counts + terms[1].counts
    together = sum(float(term.total(settings, counts)) for term in terms)
    assert together == pytest.approx(float(loss_sums(shift(whole), whole, settings).total(settings)), rel=1e-13)


def test_weights_move_to_the_final_ones() -> None:
    settings = LossSettings(LossTerm(1.0, final_weight=100.0), ForceTerm(10.0, final_weight=5.0), LossTerm(3.0), 0.6)
    assert list(settings.weights.values()) == [100.0, 5.0, 3.0]  # used in validations
    for progress in (0.0, 0.3, 0.6):
        assert list(settings.at(progress).weights.values()) == pytest.approx([1.0, 10.0, 3.0])
    assert list(settings.at(0.8).weights.values()) == pytest.approx([10.0, 50.0**0.5, 3.0])
    for progress in (1.0, 1.2):
        assert settings.at(progress).weights == pytest.approx(settings.weights)
    assert LossSettings(LossTerm(1.0, final_weight=4.0), change_after=1.0).at(0.99).weights["energy"] == 1.0
    assert LossSettings().at(0.9) == LossSettings()


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
        (lambda: LossSettings(LossTerm(0.0), ForceTerm(0.0)), "every loss weight is 0"),
        (lambda: LossTerm(1.0, final_weight=0.0), "final_weight 0.0"),
        (lambda: ForceTerm(1.0, final_weight=math.inf), "final_weight inf"),
        (lambda: LossTerm(0.0, final_weight=2.0), "final_weight is 2.0, but weight is 0"),
        (lambda: LossSettings(change_after=1.5), "change_after is 1.5"),
    ],
)
def test_settings_that_mean_nothing(make, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()
