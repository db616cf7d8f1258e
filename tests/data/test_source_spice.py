from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.data
import ase.units
import h5py
import numpy as np
import pytest
from toys import assert_bad, assert_parts, refusal

from escaip.data import AtomicData
from escaip.data.readers import ReadReport, open_source
from escaip.data.readers.policy import ReadPolicy
from escaip.data.readers.spice import READER, divide, read_spice, smiles_charge
from escaip.errors import ConfigError, DataError

WATER = "[O:1]([H:2])[H:3]"


def write_spice(path: Path, counts: dict[str, int] | None = None, **changes: object) -> Path:
    """Waters with this many conformations each; ``changes`` replace or (None) remove datasets of the first."""
    rng = np.random.default_rng(0)
    geometry = np.array([[0, 0, 0], [1.8, 0, 0], [-0.5, 1.75, 0]])
    with h5py.File(path, "w") as file:
        for number, (name, count) in enumerate((counts or {"water": 3, "water two": 3}).items()):
            datasets: dict = {
                "subset": [f"Subset {name}"],
                "smiles": [WATER],
                "atomic_numbers": np.array([8, 1, 1], dtype="i2"),
                "conformations": (geometry + rng.normal(scale=0.02, size=(count, 3, 3))).astype("f4"),
                "dft_total_energy": -76.4 + rng.normal(scale=1e-3, size=count),
                "formation_energy": -0.35 + rng.normal(scale=1e-3, size=count),
                "dft_total_gradient": rng.normal(scale=0.02, size=(count, 3, 3)).astype("f4"),
                **({} if number else changes),
            }
            group = file.create_group(name)
            for key, value in datasets.items():
                if value is not None:
                    group.create_dataset(key, data=value)
    return path


def read_all(path: Path, **options: Any) -> list[AtomicData]:
    return list(read_spice(path, path.name, ReadPolicy(), **options))


def test_numbers_and_units(tmp_path: Path) -> None:
    path = write_spice(tmp_path / "s.hdf5")
    read = list(open_source(path))
    assert [data.structure_id for data in read] == [f"s.hdf5:{m}:{k}" for m in ("water", "water two") for k in range(3)]
    with h5py.File(path) as file:
        group = file["water two"]
        data = read[4]
        assert data.group == "water two"
        assert np.array_equal(data.positions.numpy(), group["conformations"][1].astype("f8") * ase.units.Bohr)
        assert float(data.energy) == group["dft_total_energy"][1] * ase.units.Hartree
        expected = -group["dft_total_gradient"][1].astype("f8") * (ase.units.Hartree / ase.units.Bohr)
        assert np.allclose(data.forces.numpy(), expected, rtol=1e-14, atol=0)


def test_formation_energy_and_subset(tmp_path: Path) -> None:
    path = write_spice(tmp_path / "s.hdf5")
    read = list(open_source(path, energy="formation_energy", subset="Subset water two"))
    assert len(read) == 3
    assert float(read[0].energy) == pytest.approx(-0.35 * ase.units.Hartree, rel=0.02)
    assert len(list(open_source(path, subset=["Subset water", "Subset water two"]))) == 6


def test_declared_units_count(tmp_path: Path) -> None:
    path = write_spice(tmp_path / "s.hdf5")
    with h5py.File(path, "a") as file:
        dataset = file["water/conformations"]
        dataset[...] = dataset[...] * ase.units.Bohr / 10
        dataset.attrs["units"] = "nanometers"
    read = list(open_source(path))
    assert float(read[0].positions.norm(dim=1).max()) == pytest.approx(1.8 * ase.units.Bohr, rel=0.05)


@pytest.mark.parametrize("name", ["spice_des_monomers_GFN2.hdf5", "spice_amino_acid_ligand_GFN2.hdf5"])
def test_real_layout_equals_h5py(shared_data: Callable[[str], Path], name: str) -> None:
    path = shared_data(f"molecular/{name}")
    read = list(open_source(path, required_labels=("energy", "forces"), limit=600))
    with h5py.File(path) as file:
        position = 0
        for molecule in file:
            if position == len(read):
                break
            group = file[molecule]
            charge = int(group.attrs["total_charge"])
            for k in range(len(group["conformations"])):
                data = read[position]
                position += 1
                assert (data.group, int(data.charge)) == (molecule, charge)
                assert float(data.energy) == group["dft_total_energy"][k] * ase.units.Hartree
            expected = -group["dft_total_gradient"][k] * (ase.units.Hartree / ase.units.Bohr)
            assert np.allclose(data.forces.numpy(), expected, rtol=1e-6)
    assert position == len(read) == 600


def test_malformed_conformations_are_skipped_and_counted(tmp_path: Path) -> None:
    report = ReadReport()
    path = write_spice(tmp_path / "s.hdf5", dft_total_energy=np.array([-76.4, np.nan, -76.4]))
    read = list(open_source(path, report=report))
    assert len(read) == report.read == 5
    assert report.skipped == 1
    assert "s.hdf5:water:1" in report.messages[0]
    report = ReadReport()
    path = write_spice(tmp_path / "t.hdf5", dft_total_energy=np.array([-76.4, -76.4]))
    assert len(list(open_source(path, report=report))) == 3
    assert report.skipped == 3


@pytest.mark.parametrize(
    ("smiles", "charge"),
    [
        (WATER, 0),
        ("[N+:1]([H:2])([H:3])([H:4])[H:5]", 1),
        ("[O-:1][C:2](=[O:3])[H:4]", -1),
        ("[Ca+2:1].[Cl-:2].[Cl-:3]", 0),
        ("[Ca++:1]", 2),
        ("[Fe---]", -3),
        ("[O-2:1]", -2),
        ("[C@@H:1]([F:2])([Cl:3])Br", 0),
        ("[13CH3+]", 1),
        ("[nH:1]1cccc1", 0),
        ("C[N+](C)(C)C.[O-]C(=O)C%12CC%12", 0),
        ("[C@TH1-:1]#N", -1),
        ("[#6]", None),
        ("[Xx+]", None),
        ("[N+", None),
        ("C1CC1 junk!", None),
    ],
)
def test_charges_of_smiles(smiles: str, charge: int | None) -> None:
    if charge is None:
        with pytest.raises(DataError, match="SMILES"):
            smiles_charge(smiles)
    else:
        assert smiles_charge(smiles) == charge


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message", "skipped"),
    [
        ({"dft_total_energy": None}, "has no dataset 'dft_total_energy'; found", 3),
        ({"atomic_numbers": None}, "no dataset 'atomic_numbers'", 3),
        ({"smiles": None}, "no dataset 'smiles'", 3),
        ({"smiles": ["[O:1]([H:2])[F:3]"]}, "does not have the same atoms", 3),
        ({"smiles": ["[O:1"]}, "SMILES", 3),
        ({"smiles": np.zeros(0)}, "molecule 'water' has no readable 'smiles'", 3),
        ({"conformations": np.zeros((3, 3, 3))}, "atoms 0 and 1 are 0 Å apart", 3),
        ({"conformations": "none"}, "'conformations' cannot be read, is no array of numbers", 1),
        ({"atomic_numbers": 8}, "'atomic_numbers' cannot be read, is no array of numbers", 3),
    ],
)
def test_bad_molecules(tmp_path: Path, changes: dict, message: str, skipped: int) -> None:
    path = write_spice(tmp_path / "s.hdf5", **changes)
    text = assert_bad(lambda policy: list(read_spice(path, path.name, policy)), message, kept=3, skipped=skipped)
    assert "s.hdf5:water:0: " in text


@pytest.mark.bad_input
def test_missing_gradient_is_a_missing_label(tmp_path: Path) -> None:
    path = write_spice(tmp_path / "s.hdf5", dft_total_gradient=None)
    assert sum(data.has_label("forces") for data in open_source(path)) == 3
    with pytest.raises(DataError, match=r"s.hdf5:water:0: has no forces.*found datasets atomic_numbers"):
        list(open_source(path, required_labels=["forces"]))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subset": "None such"}, DataError, "no molecule of subset .*found .'Subset water'"),
        ({"subset": ["Subset water", "Typo"]}, DataError, r"no molecule of subset .'Typo'.; found .'Subset water'"),
        ({"energy": "mp2_energy"}, ConfigError, "energy: 'mp2_energy' is not one of"),
    ],
)
def test_bad_choices(tmp_path: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(open_source(write_spice(tmp_path / "s.hdf5"), **options))


def test_parts_are_the_whole(tmp_path: Path) -> None:
    path = write_spice(tmp_path / "s.hdf5", {f"m{k}": count for k, count in enumerate([3, 1, 7, 2, 2, 5, 1])})
    assert len(read_all(path)) == 21
    assert_parts(path, divide, read_all, 1, 4, 8, 100, most=lambda size: max(size, 7))
    assert READER.parts is divide
    late = [len(read_all(path, part=part, subset="Subset m6")) for part in divide(path, 4)]
    assert sum(late) == late[-1] == 1
    with pytest.raises(DataError, match="no molecule of subset"):
        read_all(path, part=(0, 2), subset="None such")


def test_reading_is_linear_in_the_molecules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object of a file is looked up a fixed number of times, and names are listed once."""
    counts = {}
    look = h5py.Group.__getitem__
    walk = h5py.Group.__iter__
    for number in (20, 40):
        path = write_spice(tmp_path / f"{number}.hdf5", {f"m{k:02d}": 1 for k in range(number)})
        calls = {"get": 0, "iter": 0}
        monkeypatch.setattr(
            h5py.Group, "__getitem__", lambda self, key, c=calls: (c.update(get=c["get"] + 1), look(self, key))[1]
        )
        monkeypatch.setattr(h5py.Group, "__iter__", lambda self, c=calls: (c.update(iter=c["iter"] + 1), walk(self))[1])
        assert len(read_all(path)) == number
        monkeypatch.undo()
        counts[number] = calls
    assert counts[40]["get"] == 2 * counts[20]["get"] == 40 * 6
    assert counts[40]["iter"] == counts[20]["iter"] + 20


@pytest.mark.bad_input
def test_a_shape_without_numbers_and_damaged_numbers(tmp_path: Path) -> None:
    path = write_spice(tmp_path / "s.hdf5")
    with h5py.File(path, "a") as file:
        del file["water/conformations"]
        file["water"].create_dataset("conformations", shape=(1 << 40, 3, 3), dtype="f4", chunks=(1, 3, 3))
    with pytest.raises(DataError, match="more than any molecule needs"):
        list(open_source(path))
    values = np.random.default_rng(0).normal(size=(50, 3, 3)).astype("f4")
    with h5py.File(path, "w") as file:
        group = file.create_group("water")
        group.create_dataset("conformations", data=values, compression="gzip", chunks=(50, 3, 3))
        offset = group["conformations"].id.get_chunk_info(0).byte_offset
        group["atomic_numbers"], group["smiles"] = np.array([8, 1, 1]), [WATER]
        group["dft_total_energy"] = np.zeros(50)
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
    with refusal("water:0: 'conformations' cannot be read"):
        list(open_source(path))


@pytest.mark.bad_input
def test_truncated_file(tmp_path: Path) -> None:
    path = write_spice(tmp_path / "s.hdf5")
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match="not a readable HDF5 file, or truncated"):
        list(open_source(path))


@pytest.mark.bad_input
def test_input_files_without_labels(shared_data: Callable[[str], Path]) -> None:
    with pytest.raises(DataError, match="'atomic_numbers'; found conformations, smiles"):
        list(open_source(shared_data("native_formats/spice_inputs_genuine/ions.hdf5")))
