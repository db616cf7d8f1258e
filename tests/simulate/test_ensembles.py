"""What thermostats and barostats sample, beside what statistical mechanics says of it without knowing the potential."""

from __future__ import annotations

from typing import Any

import ase.build
import numpy as np
import pytest
from ase import Atoms, units
from ase.neighborlist import neighbor_list
from pair_potential import PairPotential, Springs

from escaip.simulate.analysis import Average
from escaip.simulate.ensembles import Ensemble, MDSettings, make_ensemble, prepare_velocities

TEMPERATURE = 800.0
KT = units.kB * TEMPERATURE


class Soft(PairPotential):
    """``ε (1 − r²/c²)⁴`` between nearest images: a fluid, which forgets quickly, in cells wider than ``2c``."""

    EPSILON, cutoff = 0.5, 4.0

    def __init__(self, count: int) -> None:
        super().__init__()
        self.first, self.second = np.nonzero(~np.eye(count, dtype=bool))

    def edges(self, atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        assert np.diag(atoms.cell.array).min() > 2.0 * self.cutoff
        places = atoms.positions @ np.linalg.inv(atoms.cell.array)
        between = places[self.second] - places[self.first]
        return self.first, (between - np.round(between)) @ atoms.cell.array

    def pair(self, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        window = np.maximum(1.0 - (distances / self.cutoff) ** 2, 0.0)
        return self.EPSILON * window**4, -8.0 * self.EPSILON / self.cutoff**2 * window**3


class Bonds(Springs):
    """Springs between those who are neighbors at first: a crystal, whose cell may take any shape."""

    def __init__(self, atoms: Atoms) -> None:
        super().__init__(stiffness=1.0, length=2.9)
        self.first, self.second, self.shift = neighbor_list("ijS", atoms, self.cutoff)

    def edges(self, atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        places = atoms.positions
        return self.first, places[self.second] - places[self.first] + self.shift @ atoms.cell.array


def fluid() -> Atoms:
    atoms = ase.build.bulk("Ar", "fcc", a=4.5, cubic=True).repeat(2)
    atoms.rattle(0.1, seed=0)
    atoms.calc = Soft(len(atoms))
    return atoms


def crystal() -> Atoms:
    """Under 2 GPa, about."""
    atoms = ase.build.bulk("Ar", "fcc", a=4.032, cubic=True).repeat(2)
    atoms.calc = Bonds(atoms)
    atoms.rattle(0.05, seed=0)
    return atoms


def settings(**changes: Any) -> MDSettings:
    return MDSettings(**{"temperature": TEMPERATURE, "timestep": 8.0, "seed": 2, **changes})


def start(atoms: Atoms, asked: MDSettings) -> Ensemble:
    rng = np.random.default_rng(asked.seed)
    prepare_velocities(atoms, asked, rng)
    return make_ensemble(atoms, asked, rng)


def warmed(atoms: Atoms) -> Atoms:
    """In equilibrium: what does not forget, like an oscillating cell, would keep the energy it was started with."""
    run = start(atoms, settings(ensemble="nvt", thermostat="langevin", thermostat_time=100.0)).dynamics
    run.run(200)
    atoms.set_momenta(atoms.get_momenta() - atoms.get_momenta().mean(axis=0))
    return atoms


def found(series: np.ndarray, expected: float, most: float, label: str) -> None:
    """Holds a mean against what it must be, by its own error, which must not exceed ``most``."""
    average = Average.of(series)
    assert average.error < most, f"{label}: too few samples to tell anything"
    assert abs(average.mean - expected) < 5.0 * average.error, f"{label}: {average}, not {expected}"


def check_kinetic(kinetic: np.ndarray, num_degrees: int) -> None:
    """Of ``n`` canonical velocities the energy has mean ``n kT/2`` and variance ``n (kT)²/2``."""
    relative = kinetic / (0.5 * num_degrees * KT)
    found(relative, 1.0, 0.01, "mean")  # a temperature that is off by 5 % is seen
    found(0.5 * num_degrees * (relative - 1.0) ** 2, 1.0, 0.12, "variance")


THERMOSTATS = {"langevin": 40.0, "bussi": 20.0, "nose-hoover": 80.0}  # with times in fs that forget quickly


@pytest.mark.parametrize("name", THERMOSTATS)
def test_kinetic_energies_are_canonical(name: str) -> None:
    atoms = fluid()
    run = start(atoms, settings(ensemble="nvt", thermostat=name, thermostat_time=THERMOSTATS[name]))
    assert run.num_degrees == (96 if name == "langevin" else 93)
    assert getattr(run.dynamics, "ndof", run.num_degrees) == run.num_degrees  # ASE's Bussi counts 96 by itself
    kinetic = []
    for _ in range(3500):
        run.dynamics.step()
        kinetic.append(atoms.get_kinetic_energy())
    check_kinetic(np.array(kinetic[200:]), run.num_degrees)


def sample(atoms: Atoms, asked: MDSettings, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Ensemble]:
    """Kinetic energies, pressures ``(S, 6)`` in Voigt order and volumes after each step."""
    run = start(atoms, asked)
    rows = []
    for _ in range(steps):
        run.dynamics.step()
        pressure = -atoms.get_stress(include_ideal_gas=True)
        rows.append([atoms.get_kinetic_energy(), *pressure, atoms.get_volume()])
    values = np.array(rows)
    return values[:, 0], values[:, 1:7], values[:, 7], run


def test_constant_pressure_samples_volumes_of_its_ensemble() -> None:
    """The weight of a volume has the logarithmic derivative ``β(P − p)``, so that ``⟨f (P − p)⟩ = −kT ⟨f'⟩`` for any
    ``f(V)``: with 1 and ``V``, the mean of the pressure and the width of the volumes."""
    asked = settings(ensemble="npt", pressure=2.5, thermostat_time=100.0, barostat_time=100.0)
    atoms = fluid()
    kinetic, pressures, volumes, run = (x[500:] if isinstance(x, np.ndarray) else x for x in sample(atoms, asked, 5500))
    excess = pressures[:, :3].mean(axis=1) - 2.5 * units.GPa
    found(excess / units.GPa, 0.0, 0.01, "pressure less the target")
    found(-(volumes - volumes.mean()) * excess / KT, 1.0, 0.2, "covariance of volume and pressure")
    check_kinetic(kinetic, run.num_degrees)


def test_a_cell_of_any_shape_has_the_pressure_in_all_components() -> None:
    """``⟨V (P_ab − p δ_ab)⟩ = −kT δ_ab`` (Martyna, Tobias and Klein, J. Chem. Phys. 101, 4177, 1994)."""
    asked = settings(ensemble="npt", barostat="full", pressure=2.0, timestep=6.0, thermostat_time=50.0,
                     barostat_time=200.0)  # fmt: skip
    atoms = warmed(crystal())
    before = atoms.cell.array.copy()
    _, pressures, volumes, _ = sample(atoms, asked, 2000)
    strain = np.linalg.solve(before, atoms.cell.array) - np.eye(3)
    assert np.abs(strain - np.diag(np.diag(strain))).max() > 1e-3  # it does change its shape
    for axis, expected in enumerate([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]):
        excess = volumes * (pressures[:, axis] - 2.0 * units.GPa * expected)
        found(
            excess / volumes.mean() / units.GPa, -expected * KT / volumes.mean() / units.GPa, 0.05, f"pressure {axis}"
        )


CONSERVING: dict[str, dict[str, Any]] = {
    "bussi": {"ensemble": "nvt", "thermostat": "bussi", "thermostat_time": 200.0},
    "nose-hoover": {"ensemble": "nvt", "thermostat": "nose-hoover", "thermostat_time": 50.0},
    "npt isotropic": {"ensemble": "npt", "pressure": 1.5, "thermostat_time": 50.0, "barostat_time": 100.0},
    "npt full": {"ensemble": "npt", "pressure": 1.5, "barostat": "full", "thermostat_time": 50.0,
                 "barostat_time": 100.0},
}  # fmt: skip


@pytest.mark.parametrize("name", CONSERVING)
def test_the_conserved_energy_is_conserved_as_the_timestep_squared(name: str) -> None:
    origin, deviations, exchanged = warmed(crystal()), [], []
    for timestep in (4.0, 2.0):
        atoms = origin.copy()
        atoms.calc = origin.calc
        run = start(atoms, settings(**CONSERVING[name], timestep=timestep))
        conserved, total = [run.conserved_energy()], [atoms.get_total_energy()]
        for _ in range(int(600.0 / timestep)):
            run.dynamics.step()
            conserved.append(run.conserved_energy())
            total.append(atoms.get_total_energy())
        deviations.append(np.std(conserved))
        exchanged.append(np.ptp(total))
    assert exchanged[1] > 100.0 * deviations[1]
    assert 3.0 < deviations[0] / deviations[1] < 5.0
