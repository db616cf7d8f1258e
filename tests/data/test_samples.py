"""The samples in the repository: files of their manifests, read by name, with labels that belong together."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.data import chemical_symbols

from escaip.data import AtomicData, open_source
from escaip.data.inspect import ForceWork
from escaip.data.readers import check_magnitudes
from escaip.files import dataset_card, list_datasets

SAMPLES = [card.name for card in list_datasets() if "sample" in card.manifest]
KEYS = {"omat24": {"group": "parent_id"}, "omol25": {"group": "source"}}
OPTIONS = {"oc20": {"energy": "total"}}


def structures(name: str) -> list[AtomicData]:
    manifest = dataset_card(name).manifest
    about = manifest["dataset"]
    how: dict[str, Any] = {**about.get("options", {}), **OPTIONS.get(name, {}), "format": about["format"]}
    keys = about.get("keys") or KEYS.get(name)
    file = manifest["sample"]["file"]
    return list(open_source(f"dataset:{name}/{file}", keys=keys, required_labels=("energy", "forces"), **how))


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_those_of_their_manifests(name: str) -> None:
    card = dataset_card(name)
    sample = card.manifest["sample"]
    entries = [sample, *sample.get("files", [])]
    for entry in entries:
        content = (card.path / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], entry["file"]
        assert len(content) == entry["size"] < 4_000_000
    held = {path for pattern in ("sample*", "sample*/*") for path in card.path.glob(pattern) if path.is_file()}
    assert held == {card.path / entry["file"] for entry in entries}
    assert "not" in sample["level_of_theory"].lower()
    read = structures(name)
    check_magnitudes(read)
    assert len(read) == len({data.structure_id for data in read}) == sample["num_structures"]
    assert len({data.group for data in read}) == sample["num_groups"]
    numbers = sorted({int(z) for data in read for z in data.atomic_numbers})
    assert [chemical_symbols[z] for z in numbers] == sample["elements"]


@pytest.mark.parametrize("name", ["mptrj", "omat24"])
def test_forces_and_stress_are_derivatives_of_the_energy(name: str) -> None:
    for data in structures(name)[::20]:
        atoms = data.to_ase()
        expected, cell = data.stress[0].numpy(), atoms.cell.array.copy()
        atoms.calc = EMT()
        assert np.allclose(atoms.get_potential_energy(), float(data.energy), atol=1e-10)
        assert np.allclose(atoms.get_forces(), data.forces.numpy(), atol=1e-7)
        assert np.allclose(atoms.get_stress(voigt=False), expected, atol=1e-6)
        for direction in np.eye(3):
            energies = []
            for size in (1e-4, -1e-4):
                atoms.set_cell(cell @ (np.eye(3) + size * np.outer(direction, direction)), scale_atoms=True)
                energies.append(atoms.get_potential_energy())
            slope = (energies[0] - energies[1]) / (2e-4 * abs(np.linalg.det(cell)))
            assert slope == pytest.approx(direction @ expected @ direction, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("name", "pairs"), [("oc20", 100), ("oc22", 20)])
def test_trajectories_of_surfaces(name: str, pairs: int) -> None:
    work = ForceWork()
    for data in structures(name):
        work.add(data)
        assert bool(data.fixed.any())
    assert len(work.ratios) >= pairs
    assert np.median(work.ratios) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["mace_off", "omol25"])
def test_other_layouts_of_the_spice_sample_say_the_same(name: str) -> None:
    spice = {round(float(data.energy), 6): data for data in structures("spice")}
    found = structures(name)
    for data in found:
        origin = spice[round(float(data.energy), 6)]
        assert np.allclose(data.positions.numpy(), origin.positions.numpy(), atol=1e-7)
        assert np.allclose(data.forces.numpy(), origin.forces.numpy(), atol=1e-7)
        assert (int(data.charge), int(data.spin_multiplicity)) == (int(origin.charge), 1)
    assert {int(data.charge) for data in found} == ({0} if name == "mace_off" else {-1, 0, 1})
