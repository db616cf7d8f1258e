"""Error figures against NumPy, the baseline, and the printed table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from training_stand_ins import labelled_molecules

from escaip.data import AtomicData, collate, fit_statistics
from escaip.train.losses import LossSettings
from escaip.train.metrics import ErrorMetrics, format_table
from escaip.types import Prediction


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
    result = metrics.compute()
    model, trivial = result["model"], result["baseline"]
    error, force, label = np.concatenate(energies), np.concatenate(forces), np.concatenate(labels)
    assert model["energy_mae_meV_per_atom"] == pytest.approx(1e3 * np.abs(error).mean(), rel=1e-12)
    assert model["energy_rmse_meV_per_atom"] == pytest.approx(1e3 * np.sqrt((error**2).mean()), rel=1e-12)
    assert model["force_mae_meV_per_A"] == pytest.approx(1e3 * np.abs(force - label).mean(), rel=1e-12)
    assert model["force_rmse_meV_per_A"] == pytest.approx(1e3 * np.sqrt(((force - label) ** 2).mean()), rel=1e-12)
    cosine = (force * label).sum(1) / np.linalg.norm(force, axis=1) / np.linalg.norm(label, axis=1)
    assert model["force_cosine"] == pytest.approx(cosine.mean(), rel=1e-9)
    assert trivial["energy_mae_meV_per_atom"] == pytest.approx(1e3 * np.abs(np.concatenate(baseline)).mean(), rel=1e-9)
    assert trivial["force_mae_meV_per_A"] == pytest.approx(1e3 * np.abs(label).mean(), rel=1e-12)
    assert trivial["force_cosine"] == 0.0
    assert "stress_mae_meV_per_A3" not in model


def test_table_has_a_row_per_error_and_a_column_per_model() -> None:
    model = {"energy_mae_meV_per_atom": 1.234, "force_cosine": 0.5}
    text = format_table({"model": model, "baseline": {"force_cosine": 0.0}})
    lines = text.splitlines()
    assert lines[0].split() == ["validation", "error", "model", "baseline"]
    assert lines[2].split() == ["energy", "MAE", "(meV/atom)", "1.23", "-"]
    assert lines[3].split() == ["force", "cosine", "0.500", "0.000"]
    assert len({len(line) for line in lines}) == 1
