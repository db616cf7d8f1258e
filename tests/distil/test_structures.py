"""Bases and variations of a plan: what is made, that it is sound, and that it depends on the seed alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.data import covalent_radii

from escaip.distil.plan import Base, Variation
from escaip.distil.structures import Structure, make_bases, make_variations, vary
from escaip.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING:DeprecationWarning")  # of spglib

COPPER = ase.build.bulk("Cu", cubic=True)
SALT = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
WATER = ase.build.molecule("H2O")
BENZENE = ase.build.molecule("C6H6")


def varied(base: Atoms, seed: int = 0, /, **changes: Any) -> Atoms:
    return vary(base, Variation(("base",), 1, **changes), np.random.default_rng(seed))


def nearest(atoms: Atoms) -> float:
    """The smallest distance in units of the sum of covalent radii."""
    distances = atoms.get_all_distances(mic=True)
    radii = covalent_radii[atoms.numbers]
    return float((distances / (radii[:, None] + radii) + np.diag(np.full(len(atoms), np.inf))).min())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"prototypes": ("A1", "A2"), "elements": ("Cu", "Ni")}, ["A1-Cu", "A1-Ni", "A2-Cu", "A2-Ni"]),
        # Both sites of CsCl are alike; those of Cu3Au are not.
        ({"prototypes": ("B2", "L1_2"), "elements": ("Cu", "Ni")}, ["B2-CuNi", "L1_2-Cu3Ni", "L1_2-CuNi3"]),
        ({"prototypes": ("B1", "C1"), "formulas": ("MgO", "CaF2")}, ["B1-MgO", "C1-CaF2"]),
        ({"prototypes": ("E2_1",), "formulas": ("SrTiO3",)}, ["E2_1-SrTiO3", "E2_1-SrTiO3-2"]),
    ],
)
def test_prototypes(settings: dict[str, Any], names: list[str]) -> None:
    made = make_bases("b", Base(**settings), 0)
    assert sorted(one.name for one in made) == sorted(f"b/{name}" for name in names)
    for one in made:
        assert one.atoms.pbc.all()
        repeated = one.atoms.repeat(3)
        assert nearest(repeated) == pytest.approx(1.0)
    assert [one.name for one in make_bases("b", Base(**settings, count=1), 3)] == [
        one.name for one in make_bases("b", Base(**settings, count=1), 3)
    ]


def test_molecules_with_charges() -> None:
    pytest.importorskip("rdkit")
    base = Base(smiles=("CCO", "Cc1ccccc1C(=O)[O-]"), conformers=2, charges=(1,))
    made = make_bases("m", base, 0)
    facts = [(one.group, one.atoms.info, len(one.atoms)) for one in made]
    assert facts[::2] == [
        ("CCO", {}, 9), ("CCO", {"charge": 1, "spin": 2}, 9), ("c1ccccc1", {"charge": -1}, 17),
        ("c1ccccc1", {"charge": 1}, 17),
    ]  # fmt: skip
    assert not np.allclose(made[4].atoms.positions, made[5].atoms.positions)
    for one in made:
        assert 0.8 < nearest(one.atoms) < 1.2


def test_groups_take_their_places() -> None:
    pytest.importorskip("rdkit")
    base = Base(smiles=("C{R}", "c1c({R})cc({X})cc1", "O"), groups={"R": ("[H]", "O", "C"), "X": ("F", "Cl")})
    names = [one.name.split("/")[1].split()[0] for one in make_bases("m", base, 0)]
    assert names == ["C[H]", "CO", "CC", *(f"c1c({r})cc({x})cc1" for r in ("[H]", "O", "C") for x in ("F", "Cl")), "O"]
    few = [one.name for one in make_bases("m", dataclasses.replace(base, count=3), 0)]
    assert len(few) == 3
    assert set(few) < {one.name for one in make_bases("m", base, 0)}
    with pytest.raises(ConfigError, match="groups has no 'Y'"):
        make_bases("m", Base(smiles=("C{Y}",)), 0)


def test_dimers_reach_from_contact_to_the_cutoff() -> None:
    made = make_bases("d", Base(dimers=("H", "O"), points=5, reach=4.0), 0)
    assert [one.group for one in made[::5]] == ["H-H", "H-O", "O-O"]
    lengths = [one.atoms.get_distance(0, 1) for one in made]
    for first in (0, 5, 10):
        assert lengths[first : first + 5] == sorted(lengths[first : first + 5])
        assert lengths[first + 4] == pytest.approx(4.0)
        assert nearest(made[first].atoms) == pytest.approx(0.6)
    assert [one.atoms.info for one in made[::5]] == [{}, {"spin": 2}, {}]


def test_frames_of_a_file_keep_their_state_and_lose_their_labels(tmp_path: Path) -> None:
    ions = [Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"charge": -1, "energy": 3.0}) for _ in range(3)]
    ase.io.write(tmp_path / "ions.extxyz", ions)
    made = make_bases("f", Base(file=str(tmp_path / "ions.extxyz"), count=2), 0)
    assert [one.atoms.info for one in made] == [{"charge": -1}] * 2
    assert made[0].name < made[1].name


@pytest.mark.parametrize(
    ("atoms", "changes", "formula"),
    [
        (COPPER, {"atoms": 33}, "Cu32"),
        (COPPER, {"atoms": 33, "vacancies": 2}, "Cu30"),
        (COPPER, {"atoms": 33, "interstitials": 1}, "Cu33"),
        (SALT, {"swaps": 3}, "Cl4Na4"),
        (COPPER, {"atoms": 20, "cluster": True}, "Cu20"),
        (WATER, {"copies": 5}, "H10O5"),
        (WATER, {"interstitials": 1}, None),
        (BENZENE, {"stretch": (1.4, 1.4)}, "C6H6"),
    ],
)
def test_what_a_variation_holds(atoms: Atoms, changes: dict[str, Any], formula: str | None) -> None:
    before = atoms.copy()
    made = varied(atoms, **changes)
    assert formula in (None, made.get_chemical_formula())
    assert atoms == before
    assert np.array_equal(made.positions, varied(atoms, **changes).positions)
    assert nearest(made) > 0.45
    assert bool(made.pbc.any()) == (bool(atoms.pbc.any()) and "cluster" not in changes)


def test_swaps_are_antisites() -> None:
    moved = varied(SALT, swaps=1)
    assert sorted(moved.numbers) == sorted(SALT.numbers)
    assert (moved.numbers != SALT.numbers).sum() == 2
    with pytest.raises(ConfigError, match="two elements"):
        varied(COPPER, swaps=1)


def test_slabs_have_vacuum_on_one_axis() -> None:
    for seed in range(4):
        slab = varied(SALT, seed, surface=1, atoms=60)
        assert 30 <= len(slab) <= 60
        height = np.sort(slab.get_scaled_positions(wrap=True)[:, 2]) * slab.cell.lengths()[2]
        gaps = np.diff(np.append(height, height[0] + slab.cell.lengths()[2]))
        assert gaps.max() > 10.0
        assert np.sort(gaps)[-2] < 4.0


def test_mixed_crystals_have_the_volume_of_their_radii() -> None:
    made = varied(COPPER, atoms=108, mix=("Cu", "Au"))
    share = (made.numbers == 79).mean()
    assert 0.3 < share < 0.7
    mean = share * covalent_radii[79] + (1 - share) * covalent_radii[29]
    assert made.get_volume() / len(made) == pytest.approx(COPPER.get_volume() / 4 * (mean / covalent_radii[29]) ** 3)


def test_strains_stay_within_their_bound() -> None:
    changes = [varied(COPPER, seed, strain=0.1).cell.array / 3.61 - np.eye(3) for seed in range(30)]
    assert max(np.abs(change).max() for change in changes) <= 0.1 + 1e-6
    alone = [np.allclose(change, np.eye(3) * change[0, 0]) for change in changes]
    assert 5 < sum(alone) < 25
    with pytest.raises(ConfigError, match="strain is for what is periodic"):
        varied(WATER, strain=0.1)


def test_boxes_have_their_density_and_no_contacts() -> None:
    box = varied(WATER, copies=27, density=1.0)
    assert box.pbc.all()
    assert 27 * 18.015 * 1.66054 / box.get_volume() == pytest.approx(1.0, rel=1e-3)
    distances = box.get_all_distances(mic=True)
    molecule = np.arange(81) // 3
    assert distances[molecule[:, None] != molecule].min() > 1.4


def test_a_bond_is_stretched_with_what_hangs_on_it() -> None:
    ethane = ase.build.molecule("C2H6")
    for seed in range(5):
        made = varied(ethane, seed, stretch=(1.5, 1.5))
        ratio = made.get_all_distances() / np.where(np.eye(8), 1, ethane.get_all_distances())
        bonded = (ethane.get_all_distances() < 1.6) & ~np.eye(8, dtype=bool)
        assert sorted(ratio[bonded].round(6))[-2:] == [1.5, 1.5]
        assert (ratio[bonded].round(6) == 1.0).sum() == bonded.sum() - 2


def test_solvated_ions_add_their_charges() -> None:
    ion = Structure("ions/0", "ion", Atoms("Cl", info={"charge": -1}))
    bases = {"ions": [ion], "water": [Structure("water/0", "water", WATER)]}
    (made,) = make_variations("w", Variation(("ions",), 1, copies=4, among=("water",)), bases, 0)
    assert made.atoms.get_chemical_formula() == "H6ClO3"
    assert made.atoms.info == {"charge": -1}
    assert made.group == "ion"


def test_a_structure_depends_on_its_number_and_seed_alone() -> None:
    bases = {"a": [Structure("a/0", "a", COPPER)], "b": [Structure("b/0", "b", SALT)]}
    few, many = (make_variations("v", Variation(("a", "b"), n, rattle=0.1, strain=0.1), bases, 5) for n in (3, 6))
    assert [one.atoms for one in few] == [one.atoms for one in many[:3]]
    assert [one.group for one in many] in (["a", "b"] * 3, ["b", "a"] * 3)
    (other, *_) = make_variations("v", Variation(("a", "b"), 3, rattle=0.1), bases, 6)
    assert other.atoms != few[0].atoms


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"prototypes": ("Z9",), "elements": ("Cu",)}, r"bases\.b: prototype 'Z9'"),
        ({"prototypes": ("A1",), "elements": ("Qq",)}, "'Qq' is no element"),
        ({"prototypes": ("B1",), "formulas": ("MgO", "TiO2")}, "none of the prototypes .* of TiO2"),
        ({"smiles": ("C(",)}, r"'C\(' is no SMILES"),
    ],
)
def test_bases_that_cannot_be_made(base: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_bases("b", Base(**base), 0)


@pytest.mark.parametrize(
    ("atoms", "changes", "message"),
    [
        (WATER, {"vacancies": 1}, "vacancies is for crystals"),
        (WATER, {"surface": 1}, "surface is for crystals"),
        (COPPER, {"copies": 2}, "copies and stretch are for molecules"),
        (COPPER, {"vacancies": 4}, "4 vacancies in a cell of 4 atoms"),
    ],
)
def test_changes_that_a_structure_cannot_have(atoms: Atoms, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        varied(atoms, **changes)
