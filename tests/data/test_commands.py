from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import atomic_numbers

from escaip.data import AtomicData
from escaip.data.convert import convert
from escaip.data.inspect import inspect, inspect_structures
from escaip.data.readers import open_source
from escaip.data.structure import TENSOR_FIELDS
from escaip.errors import DataError
from escaip.units import Units


def test_inspection_counts_what_ase_reads(
    shared_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = shared_data("materials/mptrj_random.extxyz")
    found = inspect(path, out=tmp_path, limit=200)
    frames = ase.io.read(path, ":200")
    assert found.num_structures == found.num_periodic == 200
    assert found.elements["O"] == sum("O" in atoms.symbols for atoms in frames)
    natoms = np.array([len(atoms) for atoms in frames])
    assert (found.natoms.minimum, found.natoms.maximum) == (natoms.min(), natoms.max())
    assert found.natoms.mean == pytest.approx(natoms.mean())
    energy = np.array([atoms.calc.results["energy"] for atoms in frames]) / natoms
    assert found.energy is not None
    assert found.energy.median == pytest.approx(np.median(energy))
    forces = np.concatenate([atoms.calc.results["forces"] for atoms in frames])
    assert found.force_rms == pytest.approx(np.sqrt((forces**2).mean()))
    assert found.stress is not None
    largest = max(np.abs(atoms.calc.results["stress"]).max() for atoms in frames)
    assert found.stress.maximum == pytest.approx(largest)
    assert found.problems == []
    printed = capsys.readouterr().out
    assert "structures   200" in printed
    assert "largest force (eV/Å)" in printed
    assert json.loads((tmp_path / "inspect.json").read_text())["num_structures"] == 200
    assert (tmp_path / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_inspection_flags_units_and_outliers_by_name(
    shared_data: Callable[[str], Path], frames: list[Atoms], tmp_path: Path
) -> None:
    found = inspect(shared_data("molecular/md17_ethanol_UNITS_kcal.xyz"), limit=100, show=False)
    assert any("looks like kcal/mol" in problem for problem in found.problems)
    frames[13].calc.results["forces"] = frames[13].calc.results["forces"] + 400.0
    frames[31].calc.results["energy"] += 90.0
    ase.io.write(tmp_path / "a.extxyz", frames)
    found = inspect(tmp_path / "a.extxyz", show=False)
    assert any("a.extxyz:31: energy +" in line for line in found.outliers)
    assert any("a.extxyz:13: a force of" in line for line in found.outliers)
    assert len(found.outliers) == 2


def test_bad_structures_are_reported_not_fatal(write_xyz: Callable[[str, str], Path]) -> None:
    frame = "2\nProperties=species:S:1:pos:R:3 energy=-1.0\nC 0 0 0\nO 0 0 {z}\n"
    path = write_xyz("a.xyz", frame.format(z=1.1) + 30 * frame.format(z=0.01))
    found = inspect(path, show=False)
    assert (found.num_structures, found.num_skipped) == (1, 30)
    assert "a.xyz:1: atoms 0 and 1" in found.problems[0]
    assert found.force is None


def test_forces_against_energies_of_oc20(shared_data: Callable[[str], Path]) -> None:
    found = inspect(shared_data("catalysts/oc20_dft_traj/random1000102.traj"), show=False)
    assert found.force_work == pytest.approx(1.0, abs=0.05)
    assert found.problems == []


@pytest.mark.parametrize(("sign", "wrong"), [(1, True), (-1, False)])
def test_gradients_in_place_of_forces_are_found(shared_data: Callable[[str], Path], sign: int, wrong: bool) -> None:
    """COMP6 s66x8 as published holds +dE/dx under the name forces."""

    def structures() -> Iterator[AtomicData]:
        with h5py.File(shared_data("molecular/s66x8_wb97x_631gd.h5")) as file:
            for name, group in file["s66x8"].items():
                numbers = [atomic_numbers[symbol.decode()] for symbol in group["species"]]
                for k, energy in enumerate(group["energies"]):
                    yield AtomicData.from_arrays(
                        numbers, group["coordinates"][k], energy=energy, forces=sign * group["forces"][k],
                        units=Units.parse({"energy": "hartree"}), structure_id=f"{name}:{k}", group=name,
                    )  # fmt: skip

    found, _ = inspect_structures(structures())
    assert found.force_work == pytest.approx(-sign, abs=0.1)
    assert any("uphill" in problem for problem in found.problems) == wrong


@pytest.mark.parametrize("name", ["out.extxyz", "out.extxyz.gz", "out.xyz.xz", "out", "out.store"])
def test_convert_keeps_everything(xyz_file: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "to" / name
    report = convert(xyz_file, target)
    assert (report.read, report.skipped) == (60, 0)
    keys = None if target.is_dir() else {"group": "group", "structure_id": "structure_id"}
    again = list(open_source(target, keys=keys))
    for a, b in zip(again, open_source(xyz_file), strict=True):
        assert (a.structure_id, a.group) == (b.structure_id, b.group)
        for key in TENSOR_FIELDS:
            assert torch.allclose(a[key].double(), b[key].double(), rtol=0, atol=1e-7, equal_nan=True), key
    assert [path.name for path in target.parent.iterdir()] == [name]


@pytest.mark.bad_input
def test_nothing_to_inspect_convert_or_prepare(xyz_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 structures"):
        inspect(xyz_file, index="99:", show=False)
    for target in ("a.extxyz", "store"):
        with pytest.raises(DataError, match="0 structures to write"):
            convert(xyz_file, tmp_path / target, index="99:")
    with pytest.raises(DataError, match="cannot write this format"):
        convert(xyz_file, tmp_path / "a.cif")
    (tmp_path / "a.extxyz").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        convert(xyz_file, tmp_path / "a.extxyz")
    assert (tmp_path / "a.extxyz").read_text() == "mine"


@pytest.mark.bad_input
@pytest.mark.parametrize("target", ["a.extxyz", "store"])
def test_a_source_that_breaks_in_the_middle_leaves_nothing(xyz_file: Path, tmp_path: Path, target: str) -> None:
    cut = tmp_path / "cut.extxyz"
    cut.write_text("\n".join(xyz_file.read_text().split("\n")[:-4]) + "\n")
    with pytest.raises(DataError, match=r"cut.extxyz: damaged or truncated after 59"):
        convert(cut, tmp_path / "to" / target)
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.bad_input
def test_a_full_disk_while_writing_extxyz(xyz_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ase.io, "write", full)
    with pytest.raises(DataError, match=r"a.extxyz: No space left"):
        convert(xyz_file, tmp_path / "to" / "a.extxyz")
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.bad_input
def test_inspect_says_why_nothing_could_be_read(frames: list[Atoms], tmp_path: Path) -> None:
    frames[0].positions[0] = np.nan
    ase.io.write(tmp_path / "bad.extxyz", frames[:1])
    with pytest.raises(DataError, match=r"1 were skipped, the first: bad.extxyz:0: coordinates of atom"):
        inspect(tmp_path / "bad.extxyz", show=False)
