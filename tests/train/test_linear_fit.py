"""The linear energy that is solved for before training begins."""

from __future__ import annotations

import math
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from tiny import make_potential

from escaip.data import AtomicData, Statistics, collate
from escaip.errors import ConfigError
from escaip.potential import Potential
from escaip.train.linear_fit import LinearRefit, fit_linear_energy

DENSITY = {"density_radial": 6, "density_degree": 2, "num_neighbors": None}


def crystals(count: int, seed: int) -> list[Atoms]:
    rng, frames = np.random.default_rng(seed), []
    for _ in range(count):
        atoms = ase.build.bulk("NaCl", "rocksalt", a=5.4 + 0.4 * rng.random(), cubic=True)
        atoms.positions += 0.15 * rng.standard_normal(atoms.positions.shape)
        del atoms[int(rng.integers(8))]  # another composition, and holes
        frames.append(atoms)
    return frames


def silent(**options: Any) -> Potential:
    """A potential whose network gives nothing, so that its energy is linear."""
    potential = make_potential(**{**DENSITY, **options})
    potential.model.energy_head.mlp.output.weight.data.zero_()
    return potential


def labelled(teacher: Potential, frames: list[Atoms]) -> list[AtomicData]:
    structures = []
    for frame, found in zip(frames, teacher.predict(frames, compute_stress=True), strict=True):
        data = AtomicData.from_ase(frame)
        data.energy = torch.tensor([found.energy], dtype=torch.float64)
        data.forces, data.stress = found.forces, found.stress.reshape(data.stress.shape)
        structures.append(data)
    return structures


@pytest.fixture(scope="module")
def taught() -> tuple[list[AtomicData], list[AtomicData], float]:
    teacher = silent(elements=(11, 17))
    density = teacher.model.density
    density.channel.zero_()
    density.channel[[11, 17], [0, 1]] = 1.0
    train, test = (labelled(teacher, crystals(count, seed)) for count, seed in ((60, 0), (10, 1)))
    rms = math.sqrt(float(torch.cat([data.forces for data in train]).square().mean()))
    return train, test, rms


def student(**options: Any) -> Potential:
    potential = silent(elements=(11, 17), **options)
    potential.model.density.coefficients.fill_(7.0)
    return potential


def errors(potential: Potential, structures: list[AtomicData]) -> tuple[float, float, float]:
    """Largest errors of energy, forces and stress over the largest labels, energies less the mean."""
    found = potential.predict(structures, compute_stress=True)
    pairs = [
        ([p.energy for p in found], [float(s.energy) for s in structures]),
        (torch.cat([p.forces for p in found]), torch.cat([s.forces for s in structures])),
        (torch.stack([p.stress for p in found]), torch.stack([s.stress.reshape(3, 3) for s in structures])),
    ]
    arrays = [(np.asarray(a), np.asarray(b)) for a, b in pairs]
    return tuple(float(np.abs(a - b).max() / np.ptp(b)) for a, b in arrays)  # type: ignore[return-value]


def test_a_linear_teacher_is_found(taught: tuple[list[AtomicData], list[AtomicData], float]) -> None:
    train, test, rms = taught
    potential = student()
    fit_linear_energy(potential, train, rms)
    assert max(errors(potential, test)) < 0.08
    assert float(potential.scale) < 0.1 * rms  # what is left for the network
    features = potential.model.density.standardized(
        torch.zeros(2, potential.model.density.num_features, dtype=torch.float64), torch.tensor([11, 17])
    )
    assert float(features.abs().max()) < 4.0


def test_missing_labels_change_nothing(taught: tuple[list[AtomicData], list[AtomicData], float]) -> None:
    train, test, rms = taught
    bare = [data.clone() for data in train[:5]]
    for data in bare:
        data.energy[:], data.forces[:], data.stress[:] = math.nan, math.nan, math.nan
    potential = student()
    fit_linear_energy(potential, [*train, *bare], rms)
    assert max(errors(potential, test)) < 0.08


def test_isolated_atoms_keep_their_energies(taught: tuple[list[AtomicData], list[AtomicData], float]) -> None:
    train, _, rms = taught
    potential = student()
    fit_linear_energy(potential, train, rms, constants=False)
    assert not potential.element_shifts.any()
    assert float(potential.model.density.coefficients.abs().max()) != 7.0


def test_it_follows_what_the_model_leaves(taught: tuple[list[AtomicData], list[AtomicData], float]) -> None:
    train, test, rms = taught
    potential = student()
    fit_linear_energy(potential, train, rms)
    fitted, shifts = potential.model.density.coefficients.clone(), potential.element_shifts.clone()
    fit, still = LinearRefit(potential, True), LinearRefit(potential, False)
    potential.model.density.coefficients.mul_(1.2)  # a network that gives a fifth of it
    potential.element_shifts[11] += 0.3
    before = errors(potential, test)
    for first in range(0, len(train), 10):
        torch.manual_seed(first)
        batch = collate(train[first : first + 10])
        prediction = potential(batch, compute_stress=True, create_graph=False)
        for one in (fit, still):
            one.add(one.of_batch(prediction, batch), 6)
    assert [fit.is_due(step, 100, True) for step in (20, 40, 41)] == [False, True, False]
    still.apply(potential)
    assert float(potential.element_shifts[11] - shifts[11]) == pytest.approx(0.3)
    potential.model.density.coefficients.copy_(1.2 * fitted)
    fit.apply(potential)
    after = errors(potential, test)
    assert all(new < 0.2 * old for new, old in zip(after, before, strict=True)), (before, after)
    fit.apply(potential)  # what has been added is not added again
    assert all(new < 0.2 * old for new, old in zip(errors(potential, test), before, strict=True))


@pytest.mark.bad_input
def test_what_cannot_be_fitted(taught: tuple[list[AtomicData], list[AtomicData], float]) -> None:
    one = Statistics({11: 0.0, 17: 0.0}, 1.0, 0.0, (11, 17), 1, 1)
    several = student()
    several.set_statistics({"one": one, "two": one})
    with pytest.raises(ConfigError, match="is for one training set"):
        fit_linear_energy(several, *taught[::2])
    with pytest.raises(ConfigError, match="density_channels is 1, but the training set has 2 elements: set it to 2"):
        fit_linear_energy(student(density_channels=1), *taught[::2])
    with pytest.raises(ConfigError, match="no training structure has any: set it to 0"):
        fit_linear_energy(student(), taught[0], math.nan)
