"""Atoms closer than any in training: how they repel each other, and that nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path

import ase.build
import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from ase.data import covalent_radii

from escaip import EScAIPCalculator, load_potential
from escaip.data import AtomicData, collate
from escaip.errors import ConfigError
from escaip.info import describe_model
from escaip.potential import Potential, PotentialMetadata
from escaip.potential.zbl import closest_distances, fit_zbl_onsets, zbl_onsets
from escaip.testing import check_potential


def make_potential(onset: float | None, **overrides: object) -> Potential:
    potential = tiny.make_potential(**overrides)
    if onset is not None:
        potential.repulsion.onset = torch.full((119, 119), onset)
    return potential


def published(first: int, second: int, r: float) -> float:
    """Of Ziegler, Biersack and Littmark, with constants from its reference implementation in atomic units."""
    a = 0.8854 * 0.529177 / (first**0.23 + second**0.23)
    phi = 0.18175 * math.exp(-3.1998 * r / a) + 0.50986 * math.exp(-0.94229 * r / a)
    phi += 0.28022 * math.exp(-0.4029 * r / a) + 0.02817 * math.exp(-0.20162 * r / a)
    return 27.211386 * 0.529177 * first * second / r * phi


def energy(potential: Potential, atoms: Atoms) -> float:
    return float(potential(collate([AtomicData.from_ase(atoms)]), create_graph=False).energy)


@pytest.mark.parametrize("r", [0.3, 0.8, 1.2, 1.4999])
def test_a_pair_has_the_screened_coulomb_energy(r: float) -> None:
    atoms = Atoms("InP", positions=[[0, 0, 0], [0, 0, r]])
    found = energy(make_potential(1.5), atoms) - energy(make_potential(None), atoms)
    x = r / 1.5
    assert found == pytest.approx(published(49, 15, r) * math.exp(-x * x / (1 - x * x)), rel=1e-5, abs=1e-12)


def test_beyond_the_onset_nothing_changes() -> None:
    atoms = ase.build.molecule("CH3CH2OH")
    batch = collate([AtomicData.from_ase(atoms)])
    bare, walled = (make_potential(onset)(batch, create_graph=False) for onset in (None, 0.9))
    assert torch.equal(bare.energy, walled.energy)
    assert torch.equal(bare.forces, walled.forces)


def test_contracts_hold_where_atoms_repel() -> None:
    molecule = ase.build.molecule("CH3OH")
    crystal = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True)
    crystal.rattle(0.1, seed=1)
    rod = Atoms("C2", positions=[[0, 0, 0], [0.1, 1.3, 0.2]], cell=[[2.6, 0.4, 0], [0, 0, 0], [0, 0, 0]],
                pbc=[True, False, False])  # fmt: skip
    onsets = zbl_onsets(torch.full((119, 119), 3.0, dtype=torch.float64)).float()
    potential = make_potential(None)
    potential.repulsion.onset = onsets
    assert energy(potential, molecule) > energy(make_potential(None), molecule) + 1.0
    check_potential(potential, [molecule, crystal, rod])


def test_hessians_and_virials_of_atoms_have_it() -> None:
    potential, atoms = make_potential(2.0), ase.build.molecule("CH3OH")
    atoms.rattle(0.05, seed=0)
    near = potential.hessian(atoms, method="finite_differences", step=1e-5)
    found = potential.hessian(atoms)
    assert float((near - found).abs().max()) < 1e-6 * float(found.abs().max())
    crystal = ase.build.bulk("Cu", "fcc", a=2.5)
    out = make_potential(2.0)(collate([AtomicData.from_ase(crystal)]), compute_stress=True, compute_virials=True)
    assert torch.allclose(out.atomic_virials.sum(0), out.stress[0] * crystal.cell.volume, atol=1e-8)


def test_direct_forces_have_it_too() -> None:
    atoms = Atoms("C2H", positions=[[0, 0, 0], [0, 0, 0.9], [0, 2.0, 0]])
    batch = collate([AtomicData.from_ase(atoms)])
    bare, walled = (make_potential(onset, forces="direct")(batch, create_graph=False) for onset in (None, 1.2))
    found = (walled.forces - bare.forces).detach().numpy()
    step = 1e-5
    moved = [atoms.copy() for _ in range(2)]
    moved[0].positions[1, 2] += step
    moved[1].positions[1, 2] -= step
    core = [energy(make_potential(1.2), a) - energy(make_potential(None), a) for a in moved]
    np.testing.assert_allclose(found[1, 2], -(core[0] - core[1]) / (2 * step), rtol=1e-6)
    np.testing.assert_allclose(found, [[0, 0, -found[1, 2]], [0, 0, found[1, 2]], [0, 0, 0]], atol=1e-12)


def test_it_keeps_atoms_apart() -> None:
    """Two atoms thrown at each other bounce, where the bare potential lets them through."""
    from ase import units
    from ase.md.verlet import VelocityVerlet

    closest = {}
    for onset in (None, 1.2):
        atoms = Atoms("C2", positions=[[0, 0, 0], [0, 0, 1.8]])
        atoms.set_velocities([[0, 0, 0.35], [0, 0, -0.35]])
        atoms.calc = EScAIPCalculator(make_potential(onset), device="cpu")
        path = []
        dynamics = VelocityVerlet(atoms, 0.2 * units.fs)
        dynamics.attach(lambda atoms=atoms, path=path: path.append(atoms.get_distance(0, 1)))
        dynamics.run(150)
        closest[onset] = min(path)
    assert closest[None] < 0.1
    assert closest[1.2] > 0.4


def test_files_keep_it_whatever_their_precision(tmp_path: Path) -> None:
    potential = make_potential(None)
    potential.repulsion.onset = torch.rand(119, 119)
    potential.save(tmp_path / "walled.escaip")
    potential.float().double()
    for dtype in ("float32", "float64"):
        loaded = load_potential(tmp_path / "walled.escaip", device="cpu", dtype=dtype)
        assert torch.equal(loaded.repulsion.onset, potential.repulsion.onset)
        assert loaded.repulsion.onset.dtype == torch.float32
    make_potential(None).save(tmp_path / "bare.escaip")
    assert not load_potential(tmp_path / "bare.escaip", device="cpu").repulsion
    assert "repulsion.onset" not in make_potential(None).state_dict()


def test_distances_are_the_shortest_of_a_set() -> None:
    sets = [ase.build.molecule("CO"), ase.build.molecule("CH4"), Atoms("C2", positions=[[0, 0, 0], [0, 0, 5.0]])]
    copper = ase.build.bulk("Cu", "fcc", a=3.6)  # its only neighbors are its own images
    copper.set_cell(copper.cell * 0.9, scale_atoms=True)
    across = Atoms("HF", positions=[[0.1, 0, 0], [4.2, 0, 0]], cell=[5.0] * 3, pbc=True)
    found = closest_distances([AtomicData.from_ase(atoms) for atoms in (*sets, copper, across)])
    assert torch.equal(found, found.T)
    assert float(found[6, 8]) == pytest.approx(sets[0].get_distance(0, 1))
    assert float(found[1, 6]) == pytest.approx(1.0897, abs=1e-3)
    assert float(found[1, 9]) == pytest.approx(0.9)
    assert float(found[29, 29]) == pytest.approx(0.9 * 3.6 / math.sqrt(2))
    assert math.isinf(float(found[1, 1]))  # 1.78 Å is no bond
    assert math.isinf(float(found[6, 6]))


def test_a_large_set_is_sampled() -> None:
    structures = [AtomicData.from_ase(Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.5 + 0.001 * i]])) for i in range(100)]
    assert float(closest_distances(structures, 2)[1, 1]) == pytest.approx(0.5)
    assert float(closest_distances(structures[::-1], 2)[1, 1]) == pytest.approx(0.5)
    assert float(closest_distances(structures[1:], 1)[1, 1]) == pytest.approx(0.501)


def test_onsets() -> None:
    closest = torch.full((119, 119), math.inf, dtype=torch.float64)
    closest[6, 6] = 1.2
    found = zbl_onsets(closest, 0.8)
    assert float(found[6, 6]) == pytest.approx(0.96)
    assert float(found[1, 6]) == pytest.approx(0.8 * 0.7 * (covalent_radii[1] + covalent_radii[6]))
    for fraction in (0.0, 1.1, math.nan):
        with pytest.raises(ConfigError, match="it must be above 0 and at most 1, or null"):
            zbl_onsets(closest, fraction)


def test_nothing_repels_beyond_the_cutoff() -> None:
    potential = make_potential(None)
    cesium = Atoms("Cs2", positions=[[0, 0, 0], [0, 0, 5.5]])
    fit_zbl_onsets(potential.repulsion, [AtomicData.from_ase(cesium)], potential.cutoff)
    assert float(closest_distances([AtomicData.from_ase(cesium)])[55, 55]) == pytest.approx(5.5)
    assert float(potential.repulsion.onset.max()) == potential.cutoff
    inside, outside = (Atoms("Cs2", positions=[[0, 0, 0], [0, 0, potential.cutoff + x]]) for x in (-1e-3, 1e-3))
    bare = make_potential(None)
    for atoms in (inside, outside):
        assert abs(energy(potential, atoms) - energy(bare, atoms)) < 1e-9


def test_a_file_says_where_it_begins(tmp_path: Path) -> None:
    potential = make_potential(None)
    potential.set_metadata(PotentialMetadata(elements=(1, 6)))
    for expected in ("none", [0.391, 0.981]):
        potential.save(tmp_path / "model.escaip")
        assert describe_model(tmp_path / "model.escaip")["repulsion_below"] == expected
        fit_zbl_onsets(potential.repulsion, [AtomicData.from_ase(ase.build.molecule("CH4"))], potential.cutoff)
