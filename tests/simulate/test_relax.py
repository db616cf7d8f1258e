"""Relaxation, reading and writing structures, energy drift."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from tiny import rattled

from escaip import EScAIPCalculator
from escaip.calculators import CommitteeCalculator
from escaip.errors import ConfigError, DataError, SimulationError, UnsupportedElementError
from escaip.potential import Potential
from escaip.simulate import energy_drift, read_structure, relax, relax_all, relaxation, write_structure

Make = Callable[..., Atoms]


@pytest.mark.parametrize("optimizer", ["bfgs", "fire"])
def test_relaxing_finds_the_crystal(argon: Make, optimizer: str) -> None:
    atoms = argon()
    before = atoms.copy()
    seen: list[float] = []
    result = relax(atoms, fmax=1e-4, optimizer=optimizer, report=lambda step, energy, force: seen.append(force))
    assert result.converged
    assert result.largest_force <= 1e-4
    assert result.energy < result.initial_energy
    assert len(seen) == result.steps + 1
    perfect = ase.build.bulk("Ar", "fcc", a=5.4, cubic=True).repeat((2, 2, 2))
    distance = np.sort(result.atoms.get_all_distances(mic=True)[0])
    np.testing.assert_allclose(distance, np.sort(perfect.get_all_distances(mic=True)[0]), atol=1e-2)
    assert atoms == before  # the caller's structure has not moved


def test_relaxing_the_cell_under_pressure() -> None:
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell.array * 1.03, scale_atoms=True)
    atoms.calc = EMT()
    free = relax(atoms, cell=True, fmax=1e-3)
    pressed = relax(atoms, cell=True, fmax=1e-3, pressure=5.0)
    assert free.pressure == pytest.approx(0.0, abs=0.02)
    assert pressed.pressure == pytest.approx(5.0, abs=0.02)
    assert pressed.volume < free.volume
    assert free.volume == pytest.approx(4 * 11.565, rel=0.01)  # EMT copper: a = 3.59 Å


def test_constraints_hold_and_what_is_not_converged_says_so(argon: Make) -> None:
    atoms = argon()
    atoms.set_constraint(FixAtoms([0, 1]))
    result = relax(atoms, fmax=1e-9, steps=2)
    assert np.array_equal(result.atoms.positions[:2], atoms.positions[:2])
    assert (result.converged, result.steps) == (False, 2)
    assert "NOT converged after 2 steps" in result.summary()


def molecules() -> list[Atoms]:
    found = rattled(*(ase.build.molecule(name) for name in ("CH3OH", "H2O", "CH4", "NH3", "H2O")), Atoms("O"))
    found[2].set_constraint(FixAtoms([0, 1]))
    return found


def crystals() -> list[Atoms]:
    return rattled(*(ase.build.bulk("Cu", cubic=True) for _ in range(2)), ase.build.bulk("Cu"))


@pytest.mark.parametrize(
    ("structures", "members", "options"),
    [
        (molecules, 1, {"fmax": 0.2}),
        (molecules, 2, {"optimizer": "fire", "fmax": 0.2}),
        (crystals, 1, {"cell": True, "pressure": 1.0, "fmax": 0.2}),
    ],
)
def test_many_at_once_take_the_steps_that_each_takes_alone(
    structures: Callable[[], list[Atoms]], members: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaxation, "_ATOMS_AT_ONCE", 9)  # some enter when others are done
    monkeypatch.setattr(relaxation, "_MOST_DONE", 2)
    potentials = [tiny.make_potential(seed) for seed in range(members)]
    calculator: Any = CommitteeCalculator(potentials) if members > 1 else EScAIPCalculator(potentials[0])
    given = structures()
    for found, atoms in zip(relax_all(potentials, iter(given), **options), structures(), strict=True):
        atoms.calc = calculator
        alone = relax(atoms, **options)
        assert found.converged
        assert alone.converged
        assert found.steps == alone.steps
        for name in ("energy", "initial_energy", "largest_force", "volume", "pressure"):
            assert getattr(found, name) == pytest.approx(getattr(alone, name), abs=1e-6, nan_ok=True), name
        np.testing.assert_allclose(found.atoms.positions, alone.atoms.positions, atol=1e-5)
        np.testing.assert_allclose(found.atoms.cell, alone.atoms.cell, atol=1e-5)
        np.testing.assert_allclose(found.atoms.get_forces(), alone.atoms.get_forces(), atol=1e-5)
        assert ("stress" in found.atoms.calc.results) == bool(atoms.pbc.any())
    assert given == structures()


class Breaking(Potential):
    """Energies of water become NaN where it is evaluated for the third time."""

    def forward(self, batch: Any, **options: Any) -> Any:
        """As any potential's."""
        found = super().forward(batch, **options)
        water = batch.ptr.diff() == 3
        self.__dict__["seen"] = self.__dict__.get("seen", 0) + int(water.any())
        if self.__dict__["seen"] < 3:
            return found
        return replace(found, energy=torch.where(water, torch.nan, found.energy))


def test_a_structure_that_breaks_ends_where_it_last_was_sound() -> None:
    water, methane = given = rattled(ase.build.molecule("H2O"), ase.build.molecule("CH4"))
    broken, sound = relax_all([tiny.make_potential(kind=Breaking)], given, fmax=0.02)
    assert (broken.converged, broken.steps, sound.converged) == (False, 2, True)
    assert broken.largest_force > 0.02
    water.calc = methane.calc = EScAIPCalculator(tiny.make_potential())
    once = relax(water, fmax=0.02, steps=1)
    np.testing.assert_allclose(broken.atoms.positions, once.atoms.positions, atol=1e-8)
    assert broken.energy == pytest.approx(once.energy, abs=1e-8)
    assert sound.energy == pytest.approx(relax(methane, fmax=0.02).energy, abs=1e-6)


def test_structures_are_read_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxation, "_ATOMS_AT_ONCE", 9)
    monkeypatch.setattr(relaxation, "_MOST_DONE", 20)
    taken = itertools.count()

    def many() -> Iterator[Atoms]:
        for atoms in [*rattled(ase.build.molecule("CH3OH")), *[Atoms("O")] * 200]:
            next(taken)
            yield atoms

    results = relax_all([tiny.make_potential()], many(), fmax=0.02)
    assert next(results).steps > 10
    assert next(taken) in range(20, 30)  # none beside those that wait and those in work
    assert len([*results]) == 200


@pytest.mark.bad_input
def test_one_of_many_that_cannot_be_relaxed_is_named() -> None:
    potential, waters = tiny.make_potential(elements=(1, 8)), [ase.build.molecule("H2O")] * 3
    with pytest.raises(UnsupportedElementError, match=r"^structure 7 .*not trained on C"):
        list(relax_all([potential], [*waters, ase.build.molecule("CH4")], first=4))
    with pytest.raises(ConfigError, match=r"^structure 0: relaxing the cell needs three periodic axes"):
        list(relax_all([potential], waters, cell=True))
    with pytest.raises(ConfigError, match="a direct-force model has none"):
        list(relax_all([tiny.make_potential(forces="direct")], crystals(), cell=True))
    broken = tiny.make_potential(kind=Breaking)
    broken.__dict__["seen"] = 3
    with pytest.raises(SimulationError, match="structure 5: forces are NaN: check the starting structure"):
        list(relax_all([broken], [ase.build.molecule("CH4"), *waters], first=4))


@pytest.mark.bad_input
def test_relaxations_that_cannot_be(argon: Make) -> None:
    for change, message in (
        ({"fmax": -1.0}, "fmax is -1.0"),
        ({"steps": 0}, "steps is 0"),
        ({"optimizer": "newton"}, "choose bfgs or fire"),
        ({"pressure": 1.0}, "pressure acts on the cell"),
    ):
        with pytest.raises(ConfigError, match=message):
            relax(argon(), **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="three periodic axes"):
        relax(argon(periodic=False), cell=True)
    stressless = argon()
    stressless.calc.implemented_properties = ["energy", "forces"]
    with pytest.raises(ConfigError, match="needs stress"):
        relax(stressless, cell=True)
    with pytest.raises(SimulationError, match="forces are NaN"):
        relax(argon(nan_after=2), fmax=1e-6)


def test_drift_of_a_line_with_noise() -> None:
    time = np.linspace(0.0, 2000.0, 101)
    noise = np.random.default_rng(0).normal(scale=1e-3, size=101)
    drift = energy_drift(time, -100.0 + 0.02 * time * 1e-3 + noise, num_atoms=10)
    assert drift.slope == pytest.approx(2.0, abs=3 * drift.error)  # 0.02 eV/ps over 10 atoms
    assert drift.error == pytest.approx(0.1 / (101**0.5 * 0.583), rel=0.2)
    assert drift.fluctuation == pytest.approx(0.1, rel=0.2)
    assert energy_drift(time, np.full(101, np.nan), 10) is None
    assert energy_drift(time[:2], time[:2], 10) is None


def test_structures_come_back_as_written(tmp_path: Path) -> None:
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    for name in ("a@300K.extxyz", "a.cif", "a.traj", "POSCAR.vasp"):
        write_structure(tmp_path / name, atoms)
        again = read_structure(tmp_path / name)
        assert sorted(again.symbols) == sorted(atoms.symbols)
        assert again.get_volume() == pytest.approx(atoms.get_volume(), rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["POSCAR.vasp", "a.cif", "a.traj", "a@300K.extxyz"]
    ase.io.write(tmp_path / "two.xyz", [ase.build.molecule("H2O"), ase.build.molecule("NH3")])
    assert len(read_structure(tmp_path / "two.xyz")) == 4
    assert len(read_structure(tmp_path / "two.xyz", frame=0)) == 3


@pytest.mark.bad_input
def test_structure_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty.xyz").write_text("")
    (tmp_path / "noise.xyz").write_text("these are\nno coordinates\nat all\n")
    (tmp_path / "short.xyz").write_text("3\n\nH 0 0 0\n")
    (tmp_path / "nan.xyz").write_text("2\n\nH 0 0 0\nH 0 0 nan\n")
    (tmp_path / "same.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.01\n")
    (tmp_path / "unknown.what").write_text("?")
    cases = {
        "none.xyz": "does not exist", "empty.xyz": "is empty", "noise.xyz": "cannot be read",
        "short.xyz": "cannot be read",
        "nan.xyz": "atom 1 are NaN", "same.xyz": "0.01 Å apart", "unknown.what": "cannot be read", "folder": "manifest",
    }  # fmt: skip
    (tmp_path / "folder").mkdir()
    for name, message in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            read_structure(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    write_structure(tmp_path / "one.xyz", ase.build.molecule("H2O"))
    with pytest.raises(DataError, match="no frame 7"):
        read_structure(tmp_path / "one.xyz", frame=7)


@pytest.mark.bad_input
def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    atoms = ase.build.molecule("H2O")
    with pytest.raises(DataError, match="cannot write"):
        write_structure(tmp_path / "none" / "a.xyz", atoms)
    with pytest.raises(DataError, match=r"cannot write .*a\.nothing"):
        write_structure(tmp_path / "a.nothing", atoms)
    assert not list(tmp_path.iterdir())
