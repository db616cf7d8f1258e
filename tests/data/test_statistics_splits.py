from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase.data import atomic_numbers
from hypothesis import given
from hypothesis import strategies as st

from escaip.data import AtomicData, AtomicDataset, Statistics, fit_statistics, open_source
from escaip.data.splits import SplitSettings, divide
from escaip.errors import ConfigError, DataError

TRUE = {1: -13.6, 6: -1030.0, 8: -2041.0}


def molecules(noise: float = 0.0) -> list[AtomicData]:
    rng = np.random.default_rng(1)
    made = []
    for name in ("H2O", "CH4", "CO2", "CH3CH2OH", "C6H6", "H2CO"):
        atoms = ase.build.molecule(name)
        energy = sum(TRUE[z] for z in atoms.numbers) + noise * len(atoms) * rng.normal()
        made.append(
            AtomicData.from_arrays(
                atoms.numbers, atoms.positions, energy=energy, forces=rng.normal(size=(len(atoms), 3))
            )
        )
    return made


def test_references_are_recovered() -> None:
    statistics = fit_statistics(molecules())
    assert statistics.references_unique
    assert statistics.elements == (1, 6, 8)
    for number, energy in TRUE.items():
        assert statistics.element_references[number] == pytest.approx(energy, abs=1e-9)
    assert statistics.energy_residual_rms_per_atom < 1e-9


def test_references_minimise_the_error_per_atom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an independent dense solution, with blocks of a QR smaller than the set."""
    monkeypatch.setattr("escaip.data.statistics._BLOCK", 2)
    data = molecules(noise=0.3)
    counts = np.array([[np.sum(d.atomic_numbers.numpy() == z) for z in (1, 6, 8)] for d in data]) / 1.0
    n = counts.sum(axis=1)
    energy = np.array([float(d.energy) for d in data])
    solution, *_ = np.linalg.lstsq(counts / n[:, None], energy / n, rcond=None)
    statistics = fit_statistics(data)
    assert np.allclose([statistics.element_references[z] for z in (1, 6, 8)], solution, rtol=1e-11)
    residual = np.sqrt(np.mean(((energy - counts @ solution) / n) ** 2))
    assert statistics.energy_residual_rms_per_atom == pytest.approx(residual, rel=1e-9)


def test_one_composition_gets_the_least_norm_solution(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("molecular/3bpa_train_300K.xyz")
    data = list(open_source(path, index=":100"))
    statistics = fit_statistics(data)
    assert not statistics.references_unique
    frames = ase.io.read(path, ":100")
    mean = np.mean([atoms.calc.results["energy"] for atoms in frames])
    total = sum(statistics.element_references[z] for z in frames[0].numbers)
    assert total == pytest.approx(mean, rel=1e-12)
    rms = np.sqrt(np.mean([atoms.calc.results["forces"] ** 2 for atoms in frames]))
    assert statistics.force_rms == pytest.approx(rms, rel=1e-12)
    counts = np.bincount(frames[0].numbers)
    references = np.array([statistics.element_references[z] for z in statistics.elements])
    assert np.allclose(references / counts[list(statistics.elements)], references[0] / counts[statistics.elements[0]])


def test_isolated_energies_are_used_as_given(shared_data: Callable[[str], Path]) -> None:
    atoms = open_source(shared_data("molecular/3bpa_iso_atoms.xyz"))
    isolated = {int(data.atomic_numbers): float(data.energy) for data in atoms}
    data = list(open_source(shared_data("molecular/3bpa_train_300K.xyz"), index=":50"))
    statistics = fit_statistics(data, isolated)
    assert statistics.element_references == {z: isolated[z] for z in (1, 6, 7, 8)}
    residual = [(float(d.energy) - sum(isolated[z] for z in d.atomic_numbers.tolist())) / d.num_nodes for d in data]
    assert statistics.energy_residual_rms_per_atom == pytest.approx(np.sqrt(np.mean(np.square(residual))), rel=1e-8)
    assert -8 < residual[0] < -4  # atomisation energy per atom of an organic molecule


def test_fixed_atoms_and_missing_labels_do_not_count() -> None:
    data = molecules()
    data[0].fixed[0] = True
    data[0].forces[0] = 1e6
    data[1].forces[:] = torch.nan
    data[2].energy[:] = torch.nan
    statistics = fit_statistics(data)
    kept = [data[0].forces[1:], *[d.forces for d in data[2:]]]
    assert statistics.force_rms == pytest.approx(float(torch.cat(kept).pow(2).mean().sqrt()), rel=1e-12)
    assert statistics.label_counts == {"energy": 5, "forces": 5, "stress": 0}
    all_atoms = fit_statistics(AtomicDataset(data, fixed_atoms="all"))
    assert all_atoms.force_rms > 1e4


def test_json_round_trip(tmp_path: Path) -> None:
    statistics = fit_statistics(molecules(0.1))
    assert Statistics.from_dict(json.loads(json.dumps(statistics.to_dict()))) == statistics
    statistics.save(tmp_path / "s.json")
    assert Statistics.load(tmp_path / "s.json") == statistics
    without = fit_statistics([AtomicData.from_arrays([1], [[0, 0, 0]], energy=-1.0)])
    assert np.isnan(Statistics.from_dict(without.to_dict()).force_rms)
    json.dumps(without.to_dict(), allow_nan=False)


@pytest.mark.bad_input
def test_bad_statistics(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 structures"):
        fit_statistics([])
    with pytest.raises(DataError, match="no structure has an energy"):
        fit_statistics([AtomicData.from_arrays([1], [[0, 0, 0]])])
    with pytest.raises(DataError, match="isolated_energies: no energy for C, O"):
        fit_statistics(molecules(), {1: -13.6})
    (tmp_path / "s.json").write_text('{"elements": [1]}')
    with pytest.raises(DataError, match="fit them again"):
        Statistics.load(tmp_path / "s.json")


groups = st.lists(st.sampled_from([f"g{k}" for k in range(20)]), min_size=30, max_size=200)


def split(names: list[str], settings: SplitSettings, seed: int = 0) -> list[list[int]]:
    """Positions of the structures of the training, validation and test set."""
    held, codes = np.unique(np.array(names, dtype=object), return_inverse=True)
    assigned = divide(held.tolist(), codes, settings, seed=seed)
    order = np.random.default_rng(0).permutation(len(held))  # in whatever order groups are listed
    again = divide(held[order].tolist(), np.argsort(order)[codes], settings, seed=seed)
    assert np.array_equal(assigned, again)
    return [np.flatnonzero(assigned == code).tolist() for code in range(3)]


@given(names=groups, seed=st.integers(0, 3), val=st.sampled_from([0.1, 0.25, 7]), test=st.sampled_from([0, 0.2, 5]))
def test_groups_stay_whole(names: list[str], seed: int, val: float, test: float) -> None:
    names = ["a", "b", "c", *names]
    parts = split(names, SplitSettings(val=val, test=test), seed)
    assert sorted(itertools.chain(*parts)) == list(range(len(names)))
    of_part = [{names[k] for k in part} for part in parts]
    assert len(set.union(*of_part)) == sum(len(part) for part in of_part)
    assert [len(part) > 0 for part in parts[1:]] == [True, test > 0]


def test_sizes_and_seeds() -> None:
    names = [f"m{k // 4}" for k in range(4000)]
    _, val, test = split(names, SplitSettings(val=0.1, test=200))
    assert (len(val), len(test)) == (400, 200)
    assert val != split(names, SplitSettings(val=0.1, test=200), 1)[1]
    assert len(split(["one"] * 50, SplitSettings(by="structure", val=7))[1]) == 7


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["a"] * 50, SplitSettings(val=0.1), "1 groups .a. cannot make 2 sets; .*by: structure"),
        (["a", "b"], SplitSettings(val=0.2, test=0.2), "2 groups"),
        ([], SplitSettings(), "0 structures"),
        (["a", "b", "c"], SplitSettings(val=3), "3 structures asked"),
    ],
)
def test_impossible_splits(names: list[str], settings: SplitSettings, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(names, settings)


@pytest.mark.bad_input
@pytest.mark.parametrize("spec", [{"by": "luck"}, {"val": -0.1}, {"val": 1.5}, {"validation": 0.1}])
def test_bad_settings(spec: dict) -> None:
    with pytest.raises(ConfigError, match="split: "):
        SplitSettings.parse(spec)


def test_elements_of_a_real_mixture(shared_data: Callable[[str], Path]) -> None:
    """The trivial baseline of issue 2: references alone explain MPtrj-like energies to about an eV per atom."""
    statistics = fit_statistics(open_source(shared_data("materials/mptrj_random.extxyz")))
    assert 0.05 < statistics.energy_residual_rms_per_atom < 1.5
    assert atomic_numbers["O"] in statistics.elements
