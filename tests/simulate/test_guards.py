"""Atoms that are too close are found wherever they are, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from tiny import make_potential

from escaip import EScAIPCalculator
from escaip.calculators import CommitteeCalculator
from escaip.data import AtomicData
from escaip.potential.zbl import fit_onsets
from escaip.simulate import MDSettings, run_md
from escaip.simulate.guards import RangeMonitor, find_contact


@pytest.mark.parametrize("box", [None, 50.0, 5000.0])
def test_a_molecule_in_any_box(box: float | None) -> None:
    molecule = ase.build.molecule("C6H6")
    if box is not None:
        molecule.cell = [box] * 3
    assert find_contact(molecule) is None
    molecule.positions[11] = molecule.positions[0] + [0.3, 0.0, 0.0]
    assert find_contact(molecule) == "atoms 0 (C) and 11 (H) are 0.30 Å apart"


def test_contacts_across_the_boundary_and_of_an_atom_with_its_image() -> None:
    pair = Atoms("H2", positions=[[0.1, 1.0, 1.0], [5.9, 1.0, 1.0]], cell=[6.0] * 3)
    assert find_contact(pair) is None
    assert find_contact(Atoms()) is None
    pair.pbc = True
    assert find_contact(pair) == "atoms 0 (H) and 1 (H) are 0.20 Å apart"
    image = Atoms("Cu", cell=[0.5, 5.0, 5.0], pbc=[True, False, False])
    assert find_contact(image) == "atoms 0 (Cu) and 0 (Cu) are 0.50 Å apart"


@pytest.mark.parametrize("seed", range(4))
def test_the_worst_contact_is_that_of_ase(seed: int) -> None:
    rng = np.random.default_rng(seed)
    atoms = Atoms(numbers=rng.choice([1, 8, 29], size=60), positions=rng.uniform(0, 6, (60, 3)), cell=[6, 6, 7])
    atoms.pbc = rng.random(3) < 0.5
    distance = neighbor_list("d", atoms, 0.4 * covalent_radii[atoms.numbers])
    assert f"{distance.min():.2f} Å apart" in find_contact(atoms)


def test_distances_that_training_did_not_show(tmp_path: Path) -> None:
    potential = make_potential(elements=(1, 6))
    ethane = ase.build.molecule("C2H6")
    ethane.calc = EScAIPCalculator(potential)
    off = RangeMonitor(ethane)
    off.look(ethane, 0)
    assert (off.looks, str(off)) == (0, "")  # a model without guards says nothing
    guards = {potential.core_guard: 0.98, potential.bond_guard: 0.9}
    fit_onsets(guards, [[AtomicData.from_ase(ethane)]], potential.cutoff)
    ethane.calc = EScAIPCalculator(potential)
    monitor = RangeMonitor(ethane)
    monitor.look(ethane, 0)
    assert (monitor.looks, str(monitor)) == (1, "")
    stretched = ethane.copy()
    stretched.positions[[0, 2, 3, 4]] += 0.3 * (ethane.positions[0] - ethane.positions[1]) / 1.53
    monitor.look(stretched, 10)
    close = ethane.copy()
    close.positions[[0, 2, 3, 4]] -= 0.3 * (ethane.positions[0] - ethane.positions[1]) / 1.53
    monitor.look(close, 20)
    assert str(monitor).startswith(
        "outside of the training range in 2 of 3 frames looked at, first at step 10: atoms 0 (C)"
    )
    assert str(monitor).endswith("between bonds and the next distance of training")
    again = RangeMonitor(ethane)
    again.look(close, 5)
    assert "step 5: atoms 0 (C) and 1 (C) are 1.23 Å apart" in str(again)
    assert str(again).endswith("closer than in training")
    ethane.calc = CommitteeCalculator([make_potential(elements=(1, 6)), potential])
    one_of_two = RangeMonitor(ethane)
    one_of_two.look(close, 5)
    assert str(one_of_two) == str(again)
    stretched.calc = EScAIPCalculator(potential)
    result = run_md(stretched, MDSettings(steps=10, timestep=0.1, temperature=10.0), out=tmp_path / "out.extxyz")
    assert result.outside in result.summary().splitlines()
    assert result.outside.startswith("outside of the training range in 2 of 2")
