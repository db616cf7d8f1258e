from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength, FixCartesian

from escaip.data import AtomicData, convert, open_source
from escaip.data.convert import write_aselmdb
from escaip.data.readers.aselmdb import decode_json, read_metadata
from escaip.data.readers.ocp_lmdb import open_environment
from escaip.errors import DataError

VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])


def rows_of(path: Path) -> list[dict[str, Any]]:
    with open_environment(path) as environment, environment.begin() as transaction:
        count = environment.stat()["entries"] - 2
        return [decode_json(transaction.get(b"%d" % row_id) or b"", "row") for row_id in range(1, count + 1)]


def test_written_structures_are_read_back(tmp_path: Path, structures: list[AtomicData]) -> None:
    structures[0].fixed[1] = True
    structures[0].tags[:] = 2
    structures[1].charge[:] = -1
    structures[1].spin_multiplicity[:] = 2
    path = tmp_path / "a.aselmdb"
    count = write_aselmdb(path, structures, metadata={"level_of_theory": "made up"})
    found = open_source(path, keys={"group": "group", "structure_id": "structure_id"}, check_units=False)
    assert [path.name] == [file.name for file in tmp_path.iterdir()]
    assert read_metadata(path) == {"level_of_theory": "made up"}
    assert count == len(structures)
    for one, two in zip(found, structures, strict=True):
        assert (one.structure_id, one.group) == (two.structure_id, two.group)
        for field in ("positions", "atomic_numbers", "cell", "pbc", "charge", "spin_multiplicity", "fixed", "tags"):
            assert getattr(one, field).equal(getattr(two, field)), field
        for label in ("energy", "forces", "stress"):
            assert np.array_equal(getattr(one, label), getattr(two, label), equal_nan=True), label


def test_written_atoms_are_read_back(tmp_path: Path) -> None:
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.set_tags([0, 1, 2, 0])
    atoms.set_constraint([FixAtoms([1, 2]), FixCartesian([3], mask=(True, False, True)), FixBondLength(0, 3)])
    forces = np.arange(12.0).reshape(4, 3)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.5, forces=forces, stress=np.arange(6.0) / 100)
    atoms.info = {"charge": 1, "vector": np.arange(3), "note": "x", "bad": float("nan")}
    path = tmp_path / "a.aselmdb"
    write_aselmdb(path, [atoms])
    (data,) = open_source(path, check_units=False)
    assert data.fixed.tolist() == [False, True, True, False]
    assert np.array_equal(data.forces.numpy(), forces)
    assert np.array_equal(data.stress[0].numpy()[VOIGT], np.arange(6.0) / 100)
    assert (int(data.charge), data.tags.tolist()) == (1, [0, 1, 2, 0])
    (row,) = rows_of(path)
    assert row["data"]["vector"]["__ndarray__"][2] == [0, 1, 2]


def test_batches_and_growing_maps_change_nothing(
    tmp_path: Path, frames: list[Atoms], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_aselmdb(tmp_path / "a.aselmdb", frames)
    monkeypatch.setattr(convert, "BATCH_ROWS", 7)
    monkeypatch.setattr(convert, "FIRST_MAP", 1 << 15)
    write_aselmdb(tmp_path / "b.aselmdb", iter(frames))
    one, two = (rows_of(tmp_path / f"{name}.aselmdb") for name in "ab")
    assert [row["unique_id"] for row in one] == [row["unique_id"] for row in two]
    assert len({row["unique_id"] for row in one}) == len(frames)
    write_aselmdb(tmp_path / "b.aselmdb", frames, overwrite=True)
    monkeypatch.undo()
    write_aselmdb(tmp_path / "c.aselmdb", frames)
    assert (tmp_path / "a.aselmdb").read_bytes() == (tmp_path / "c.aselmdb").read_bytes()


@pytest.mark.bad_input
def test_writing_fails_as_a_whole(tmp_path: Path, frames: list[Atoms]) -> None:
    path = tmp_path / "a.aselmdb"

    def broken() -> Iterator[Atoms]:
        yield from frames
        raise DataError("the source broke")

    for stream, message in ((broken(), "the source broke"), (iter(()), "no structures to write")):
        with pytest.raises(DataError, match=message):
            write_aselmdb(path, stream)
    frames[3].info["calculator"] = EMT()
    with pytest.raises(DataError, match=r"structure 4: holds what JSON cannot \(a EMT\)"):
        write_aselmdb(path, frames)
    with pytest.raises(DataError, match=r"cannot (be written|write)"):
        write_aselmdb(tmp_path / "no such folder" / "a.aselmdb", frames[:2])
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    with pytest.raises(DataError, match=r"exists; name another file"):
        write_aselmdb(path, frames[:2])
    assert path.read_text() == "mine"
