"""The check passes for what is a potential, and fails, by name, for what is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from escaip import EScAIPCalculator
from escaip.calculators import CommitteeCalculator
from escaip.errors import SimulationError, UsageError
from escaip.potential import Potential
from escaip.simulate import CheckReport, check_calculator
from escaip.simulate.check import check_pairs, pair_elements

Make = Callable[..., Potential]
Argon = Callable[..., Atoms]


def crystal() -> Atoms:
    return ase.build.bulk("NaCl", "rocksalt", a=5.6)


def slab() -> Atoms:
    """Without a cell vector along its open axis."""
    atoms = ase.build.fcc111("Cu", (1, 1, 2), periodic=False)
    atoms.set_constraint(FixAtoms([0]))
    return atoms


def verdicts(report: CheckReport) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in report.findings}


@pytest.mark.parametrize("name", ["molecule", "crystal", "slab", "molecule in float32"])
def test_a_conservative_model_passes(make_potential: Make, name: str) -> None:
    atoms = {"molecule": lambda: ase.build.molecule("H2O"), "crystal": crystal, "slab": slab}[name.split()[0]]()
    dtype = torch.float32 if "float32" in name else torch.float64
    before = atoms.copy()
    report = check_calculator(EScAIPCalculator(make_potential(1, dtype)), atoms)
    assert report.failed == ()
    report.raise_failed()
    assert atoms == before
    found = verdicts(report)
    assert ("stress: finite strain" in found) == (atoms.cell.rank == 3)
    assert ("energy under re-wrapping" in found) == bool(atoms.pbc.any())
    assert found["energy where neighbors come and go"] == "pass"
    assert found["energy error, order of the timestep below 2"] == "pass"
    for line in ("comparison", "pass  forces: F = -dE/dr, some atoms", "conservative forces"):
        assert line in report.table()


def test_what_a_direct_model_does_not_promise_is_information(make_potential: Make) -> None:
    report = check_calculator(EScAIPCalculator(make_potential(forces="direct")), ase.build.molecule("H2O"))
    assert report.failed == ()
    found = verdicts(report)
    curl = next(f for f in report.findings if f.name == "forces: antisymmetric share of dF/dr")
    assert curl.verdict == "info"
    assert curl.value > 0.05
    assert found["forces: F = -dE/dr, some atoms"] == found["forces under rotation"] == "info"
    assert found["energy under rotation"] == "pass"


@pytest.mark.parametrize("options", [{"boo_weighting": "uniform"}, {"soft": False, "num_neighbors": 2}])
def test_neighbors_that_enter_with_a_jump_are_found(make_potential: Make, options: dict[str, Any]) -> None:
    report = check_calculator(EScAIPCalculator(make_potential(1, **options)), ase.build.molecule("NH3"))
    assert "energy where neighbors come and go" in {finding.name for finding in report.failed}
    with pytest.raises(SimulationError, match=r"comparisons failed: .*neighbors come and go"):
        report.raise_failed()


def test_a_committee_passes_as_one(make_potential: Make) -> None:
    calculator = CommitteeCalculator([make_potential(1), make_potential(2, cutoff=3.5)])
    assert check_calculator(calculator, ase.build.molecule("H2O")).failed == ()


SPOILERS: dict[str, tuple[Callable[[Atoms, dict[str, Any]], dict[str, Any]], list[str]]] = {
    "forces": (
        lambda atoms, found: {"forces": 1.02 * found["forces"]},
        ["forces: F = -dE/dr, some atoms", "forces: F = -dE/dr, random directions"],
    ),
    "stress": (lambda atoms, found: {"stress": -found["stress"]}, ["stress: finite strain"]),
    "order": (
        lambda atoms, found: {"forces": found["forces"] + 1e-3 * np.arange(len(atoms))[:, None]},
        ["energy and forces under permutation"],
    ),
    "place": (
        lambda atoms, found: {"energy": found["energy"] + 1e-4 * atoms.positions[:, 0].sum()},
        ["energy under translation", "energy under rotation", "energy under re-wrapping"],
    ),
    "size": (
        lambda atoms, found: {"energy": found["energy"] + 0.1},
        ["energy of a doubled cell"],
    ),
    "images": (
        lambda atoms, found: {"energy": found["energy"] + 1e-4 * float(atoms.pbc.all())},
        ["energy and forces: open axis, vacuum"],
    ),
    "leak": (
        lambda atoms, found: {"forces": found["forces"] + 1e-2 * np.cross([0.0, 0.0, 1.0], atoms.positions)},
        ["energy error, order of the timestep below 2"],
    ),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_what_is_spoilt_is_found(argon: Argon, name: str) -> None:
    spoil, names = SPOILERS[name]

    class Spoilt(type(argon().calc)):  # type: ignore[misc]
        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            self.results |= spoil(self.atoms, self.results)

    atoms = argon(periodic=name in ("stress", "place", "size"))
    report = check_calculator(Spoilt(), atoms, temperature=30.0)
    assert set(names) <= {finding.name for finding in report.failed}


def test_threads_that_disturb_each_other_are_found(make_potential: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calculator = EScAIPCalculator(make_potential(1))
    water = ase.build.molecule("H2O")
    assert verdicts(check_calculator(calculator, water))["energy in 4 threads"] == "pass"
    calculate = type(calculator).calculate
    seen = threading.Semaphore(2)

    def disturbed(self: EScAIPCalculator, *args: Any, **kwargs: Any) -> None:
        calculate(self, *args, **kwargs)
        if threading.current_thread() is not threading.main_thread() and seen.acquire(blocking=False):
            self.results["energy"] += 1e-3

    monkeypatch.setattr(type(calculator), "calculate", disturbed)
    assert "energy in 4 threads" in {one.name for one in check_calculator(calculator, water).failed}


class Pair(Calculator):
    """Two atoms: a Morse curve, with a hole at short distance and a second minimum where ``spoilt``."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012
    spoilt = False

    def calculate(self, atoms: Any = None, properties: Any = (), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        x = float(atoms.get_distance(0, 1))
        wells = [(1.0, 1.5), *([(0.1, 4.0), (30.0, 0.8)] if self.spoilt else [])]
        energy = (1 - np.exp(-2 * (x - 1.5))) ** 2 - 1
        energy -= sum(depth * np.exp(-(((x - place) / 0.2) ** 2)) for depth, place in wells[1:])
        self.results = {"energy": energy, "forces": np.zeros((2, 3))}


def test_holes_and_further_minima_of_pairs_are_found() -> None:
    report = check_pairs(Pair(), ["C", "O"], demanded=True)
    assert report.failed == ()
    assert "3 pairs of C, O" in report.subject
    assert [finding.value for finding in report.findings[:3]] == [0.0, 0.0, 0.0]
    spoilt = Pair()
    spoilt.spoilt = True
    fall, falls, minima, _ = check_pairs(spoilt, ["C"], demanded=True).findings
    assert fall.verdict == "FAIL"
    assert fall.value > 1.0
    assert (falls.value, minima.value) == (1, 1)
    assert check_pairs(spoilt, ["C"]).failed == ()
    assert pair_elements(spoilt, [ase.build.molecule("H2O")]) == ["H", "O"]
    with pytest.raises(UsageError, match=r"no pair of Xe .*give --elements"):
        check_pairs(EMT(), ["Xe"])


def test_the_pairs_of_a_potential_are_scanned_in_batches(make_potential: Make) -> None:
    calculator = EScAIPCalculator(make_potential(1, elements=(1, 8)))
    assert pair_elements(calculator, []) == ["H", "O"]
    one = check_pairs(calculator, ["H", "O"])
    other = check_pairs(CommitteeCalculator([calculator.potential] * 2), ["O", "H"])
    assert [f.value for f in one.findings] == pytest.approx([f.value for f in other.findings], abs=1e-9)


def test_a_list_kept_too_long_is_found(make_potential: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calculator = EScAIPCalculator(make_potential(1, num_neighbors=None), skin=0.02)
    monkeypatch.setattr(type(calculator._neighbors), "_holds", lambda *_: True)
    dense = ase.build.bulk("NaCl", "rocksalt", a=4.8)  # its third shell comes within the cutoff of 4 Å
    report = check_calculator(calculator, dense)
    assert "kept neighbors beside fresh ones" in {finding.name for finding in report.failed}


def test_calculators_of_other_programs(argon: Argon) -> None:
    report = check_calculator(argon().calc, argon(periodic=False), temperature=30.0)
    assert report.failed == ()
    assert "kept neighbors beside fresh ones" not in verdicts(report)
