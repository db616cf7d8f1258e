"""The committed SPICE sample: layout, labels, and what its manifest says of it. Read with plain h5py."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
import pytest
from ase.data import chemical_symbols, covalent_radii
from ase.units import Bohr, Hartree

from escaip.files import dataset_card

LAYOUT = {
    "subset", "smiles", "atomic_numbers", "conformations", "formation_energy", "dft_total_energy", "dft_total_gradient"
}  # fmt: skip
UNITS = {
    "conformations": "bohr",
    "formation_energy": "hartree",
    "dft_total_energy": "hartree",
    "dft_total_gradient": "hartree/bohr",
}
CHARGED = {"ammonium": 1, "methylammonium": 1, "formate": -1, "acetate": -1}


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return dataset_card("spice").manifest["sample"]


@pytest.fixture(scope="module")
def sample(manifest: dict[str, Any]) -> Iterator[h5py.File]:
    with h5py.File(dataset_card("spice").path / manifest["file"], "r") as file:
        yield file


def formal_charge(group: h5py.Group) -> int:
    brackets = "".join(re.findall(r"\[([^\]]*)\]", group["smiles"][0].decode()))
    return brackets.count("+") - brackets.count("-")


def test_file_is_that_of_the_manifest(manifest: dict[str, Any]) -> None:
    content = (dataset_card("spice").path / manifest["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == manifest["sha256"]
    assert len(content) == manifest["size"] < 4_000_000


def test_file_says_that_it_is_not_spice(sample: h5py.File) -> None:
    assert "GFN2-xTB" in sample.attrs["level_of_theory"]
    assert "NOT" in sample.attrs["level_of_theory"]


def test_counts_and_elements(sample: h5py.File, manifest: dict[str, Any]) -> None:
    sizes = [len(group["atomic_numbers"]) for group in sample.values()]
    numbers = {int(z) for group in sample.values() for z in group["atomic_numbers"]}
    assert sum(len(group["conformations"]) for group in sample.values()) == manifest["num_structures"] >= 1400
    assert len(sample) == manifest["num_groups"] >= 60
    assert [chemical_symbols[z] for z in sorted(numbers)] == manifest["elements"]
    assert {"H", "C", "N", "O", "F", "S", "Cl"} <= set(manifest["elements"])
    assert max(sizes) <= 14
    assert np.median(sizes) <= 10


def test_layout_of_every_molecule(sample: h5py.File) -> None:
    for name, group in sample.items():
        assert set(group) == LAYOUT, name
        count, size = group["dft_total_energy"].shape[0], group["atomic_numbers"].shape[0]
        assert group["subset"].shape == group["smiles"].shape == (1,)
        assert group["conformations"].shape == group["dft_total_gradient"].shape == (count, size, 3), name
        assert group["formation_energy"].shape == (count,)
        assert group["conformations"].dtype == group["dft_total_gradient"].dtype == np.float32
        assert group["dft_total_energy"].dtype == group["formation_energy"].dtype == np.float64
        for dataset, unit in UNITS.items():
            assert group[dataset].attrs["units"] == unit
            assert np.isfinite(group[dataset][()]).all(), (name, dataset)


def test_forces_balance(sample: h5py.File) -> None:
    for name, group in sample.items():
        total = group["dft_total_gradient"][()].astype(np.float64).sum(axis=1)
        assert np.abs(total).max() < 1e-6, name


def test_torques_balance(sample: h5py.File) -> None:
    for name, group in sample.items():
        positions, gradient = (group[key][()].astype(np.float64) for key in ("conformations", "dft_total_gradient"))
        assert np.abs(np.cross(positions, gradient).sum(axis=1)).max() < 1e-5, name


def test_molecules_are_whole_and_displaced(sample: h5py.File) -> None:
    for name, group in sample.items():
        numbers = group["atomic_numbers"][()]
        upper = np.triu_indices(len(numbers), 1)
        radii = (covalent_radii[numbers][:, None] + covalent_radii[numbers])[upper]
        for positions in group["conformations"][()] * Bohr:
            distance = np.linalg.norm(positions[:, None] - positions, axis=-1)[upper]
            assert (distance > 0.6 * radii).all(), name
            bonded = np.zeros((len(numbers), len(numbers)))
            bonded[upper] = distance < 1.6 * radii
            reach = np.linalg.matrix_power(np.eye(len(numbers)) + bonded + bonded.T, len(numbers))
            assert (reach > 0).all(), f"{name} fell apart"
        force_rms = np.sqrt((group["dft_total_gradient"][()].astype(np.float64) ** 2).mean()) * Hartree / Bohr
        assert 0.2 < force_rms < 3.0, name


def test_smiles_name_the_atoms_in_order_and_the_charge(sample: h5py.File) -> None:
    for name, group in sample.items():
        smiles = group["smiles"][0].decode()
        atoms = {int(i): symbol for symbol, i in re.findall(r"\[([A-Za-z][a-z]?)[^\]]*?:(\d+)\]", smiles)}
        listed = [atoms[i + 1].capitalize() for i in range(len(group["atomic_numbers"]))]
        assert listed == [chemical_symbols[z] for z in group["atomic_numbers"]], name
        assert formal_charge(group) == CHARGED.get(name, 0), name
        assert group["subset"][0].decode().endswith("charged" if name in CHARGED else "neutral")
        electrons = group["atomic_numbers"][()].sum() - formal_charge(group)
        assert electrons % 2 == 0, f"{name} has an unpaired electron"


def test_formation_energy_is_total_less_free_atoms(sample: h5py.File) -> None:
    import json

    reference = json.loads(sample.attrs["formation_energy_reference_hartree"])
    for name, group in sample.items():
        atoms = sum(reference[chemical_symbols[z]] for z in group["atomic_numbers"])
        difference = group["dft_total_energy"][()] - group["formation_energy"][()] - atoms
        assert np.abs(difference).max() < 1e-10, name
        assert (group["formation_energy"][()] < 0).all(), name


@pytest.mark.parametrize("name", ["ethanol", "acetate"])
def test_labels_are_those_of_gfn2_xtb(sample: h5py.File, name: str) -> None:
    interface = pytest.importorskip("tblite.interface")
    group = sample[name]
    positions = group["conformations"][-1].astype(np.float64)
    calculator = interface.Calculator("GFN2-xTB", group["atomic_numbers"][()], positions, charge=formal_charge(group))
    calculator.set("verbosity", 0)
    calculator.set("accuracy", 0.01)
    result = calculator.singlepoint()
    assert abs(result.get("energy") - group["dft_total_energy"][-1]) < 1e-5
    assert np.abs(result.get("gradient") - group["dft_total_gradient"][-1]).max() < 1e-5
