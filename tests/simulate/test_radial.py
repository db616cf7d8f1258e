"""Radial distributions against crystals, the ideal gas, ASE, and brute force."""

from __future__ import annotations

import itertools

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.geometry.rdf import get_rdf
from ase.neighborlist import neighbor_list

from escaip.errors import DataError, UsageError
from escaip.simulate.analysis import radial_distribution


def gas(number: int, cell: object, seed: int, symbols: str | None = None) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = Atoms(symbols or f"Ar{number}", cell=cell, pbc=True)
    atoms.set_scaled_positions(rng.uniform(size=(len(atoms), 3)))
    return atoms


@pytest.mark.parametrize("repeat", [0, 1, 2])
def test_the_shells_of_an_fcc_crystal(repeat: int) -> None:
    """Shells at a √(n/2) with 12, 6, 24, 12, 24 atoms; also in the primitive cell, far beyond its size."""
    a = 3.6
    atoms = ase.build.bulk("Cu", a=a) if repeat == 0 else ase.build.bulk("Cu", a=a, cubic=True).repeat(repeat)
    found = radial_distribution([atoms], r_max=6.01, width=0.02)
    edges = found.edges
    expected, total = [12, 6, 24, 12, 24], 0
    for shell, number in enumerate(expected, 1):
        place = a * np.sqrt(shell / 2)
        total += number
        inside = np.searchsorted(edges, place + 0.05)
        assert found.neighbors["all"][inside] == total
        inner = np.abs(found.distance - place) < 0.1
        assert np.flatnonzero(found.g["all"][inner]).size <= 2
        assert found.distance[inner][np.argmax(found.g["all"][inner])] == pytest.approx(place, abs=0.02)
    first = found.first_shell("all")
    assert first.coordination == 12
    assert first.peak == pytest.approx(a / np.sqrt(2), abs=0.02)
    assert a / np.sqrt(2) < first.end < a
    assert (found.g["Cu-Cu"] == found.g["all"]).all()


def test_an_ideal_gas_tends_to_one() -> None:
    number, skewed = 300, [[14.0, 0.0, 0.0], [5.0, 13.0, 0.0], [-4.0, 3.0, 15.0]]
    found = radial_distribution((gas(number, skewed, seed) for seed in range(30)), r_max=11.0, width=0.5)
    shells = np.diff(np.concatenate([[0.0], found.edges]) ** 3) * 4 / 3 * np.pi
    pairs = 30 * number**2 / 2 * shells / np.linalg.det(skewed)  # that were counted on average
    deviation = (found.g["all"] - (1 - 1 / number)) * np.sqrt(pairs)
    assert found.num_frames == 30
    assert np.abs(deviation).max() < 4.5
    assert found.first_shell("all") is None


def test_partial_distributions_agree_with_those_of_ase() -> None:
    frames = [gas(0, [17.0, 18.0, 19.0], seed, "Na60Cl90") for seed in range(3)]
    found = radial_distribution(frames, r_max=8.0, width=0.25)
    for pair in ("all", "Na-Na", "Na-Cl", "Cl-Na", "Cl-Cl"):
        chosen = None if pair == "all" else pair.split("-")
        expected = np.mean([get_rdf(frame, 8.0, 32, elements=chosen, no_dists=True) for frame in frames], axis=0)
        assert found.g[pair] == pytest.approx(expected, rel=1e-9), pair


def test_coordination_numbers_of_both_elements() -> None:
    crystal = ase.build.bulk("CsCl", "cesiumchloride", a=4.1) * (1, 1, 2)
    crystal = crystal[[0, 1, 2]]  # a vacancy: two Cs, one Cl
    assert crystal.get_chemical_symbols() == ["Cs", "Cl", "Cs"]
    found = radial_distribution([crystal], r_max=7.0)
    within = np.searchsorted(found.edges, 3.8)
    assert found.neighbors["Cl-Cs"][within] == 8
    assert found.neighbors["Cs-Cl"][within] == 4
    assert found.neighbors["all"][within] == pytest.approx((8 + 4 + 4) / 3)
    assert found.g["Cl-Cs"] == pytest.approx(found.g["Cs-Cl"])


def test_a_volume_that_changes_is_that_of_each_frame() -> None:
    frames = [gas(40, [length] * 3, int(length)) for length in (9.0, 12.0)]
    both = radial_distribution(frames, r_max=4.0, width=1.0)
    each = [radial_distribution([frame], r_max=4.0, width=1.0).g["all"] for frame in frames]
    assert both.g["all"] == pytest.approx((each[0] + each[1]) / 2)


def test_any_cell_out_to_any_distance() -> None:
    """Against a sum over images, in a flat skewed cell that is narrower than a quarter of r_max."""
    cell = np.array([[4.0, 0.0, 0.0], [3.0, 3.0, 0.0], [-1.0, 2.0, 6.0]])
    atoms = gas(7, cell, 3)
    found = radial_distribution([atoms], r_max=9.0, width=0.3)
    shifts = np.array(list(itertools.product(range(-9, 10), repeat=3))) @ cell
    between = atoms.positions[None, :, None] - atoms.positions[:, None, None] + shifts
    distance = np.linalg.norm(between, axis=-1).ravel()
    counts, _ = np.histogram(distance[distance > 1e-9], bins=30, range=(0.0, 9.0))
    assert found.neighbors["all"] * 7 == pytest.approx(np.cumsum(counts))
    assert len(neighbor_list("i", atoms, 9.0)) == counts.sum()


def test_default_range() -> None:
    assert radial_distribution([ase.build.bulk("Cu", a=3.6)]).edges[-1] == pytest.approx(3.6 / np.sqrt(3) / 2)
    assert radial_distribution([gas(5, [30.0, 40.0, 50.0], 0)]).edges[-1] == 10.0


@pytest.mark.bad_input
def test_what_has_no_radial_distribution_is_refused() -> None:
    slab = ase.build.fcc111("Cu", (2, 2, 2), vacuum=5.0)
    for atoms in (slab, ase.build.molecule("H2O")):
        with pytest.raises(DataError, match="periodic along all three axes"):
            radial_distribution([atoms], 5.0)
    with pytest.raises(DataError, match="no frame"):
        radial_distribution([], 5.0)
    with pytest.raises(DataError, match="different atoms"):
        radial_distribution([gas(5, [9.0] * 3, 0), gas(6, [9.0] * 3, 0)], 4.0)
    for r_max, width in ((0.0, 0.05), (-3.0, 0.05), (5.0, 0.0), (5.0, 6.0), (np.inf, 0.1)):
        with pytest.raises(UsageError, match="r_max is"):
            radial_distribution([gas(5, [9.0] * 3, 0)], r_max, width)
