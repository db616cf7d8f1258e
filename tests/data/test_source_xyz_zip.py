"""Zips of extxyz files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from toys import assert_parts, refusal

from escaip.data import AtomicData
from escaip.data.readers import xyz_zip
from escaip.data.readers.policy import ReadPolicy
from escaip.data.readers.xyz_zip import divide, matches, read_xyz_zip
from escaip.data.structure import LabelKeys


def zipped(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def xyz(*frames: Atoms) -> str:
    buffer = io.StringIO()
    ase.io.write(buffer, frames, format="extxyz")
    return buffer.getvalue()


def read(path: Path, **options: Any) -> list[AtomicData]:
    return list(read_xyz_zip(path, path.name, ReadPolicy(), **options))


@pytest.fixture
def archive(tmp_path: Path, frames: list[Atoms]) -> Path:
    for k, atoms in enumerate(frames[50:]):
        atoms.info.update(material_id=f"mp-{k % 3}", corrected=float(-k))
    members = {f"b/mp-{k}.extxyz": xyz(*frames[50 + k :: 3]) for k in range(3)}
    noise = {"README.md": "not read", "__MACOSX/._mp-1.extxyz": "junk", "a.xyz": xyz(*frames[:4])}
    return zipped(tmp_path / "m.zip", {**members, **noise})


def test_zip_equals_ase(archive: Path, frames: list[Atoms]) -> None:
    found = read(archive)
    expected = frames[:4] + [atoms for k in range(3) for atoms in frames[50 + k :: 3]]
    ids = ["m.zip:a.xyz:3", "m.zip:b/mp-0.extxyz:0", "m.zip:b/mp-0.extxyz:1"]
    assert [data.structure_id for data in found][3:6] == ids
    assert len(found) == len(expected) == 14
    for data, atoms in zip(found, expected, strict=True):
        assert float(data.energy) == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        assert np.allclose(data.forces.numpy(), atoms.get_forces(), atol=1e-7)
        if atoms.pbc.all():
            assert np.allclose(data.stress[0].numpy(), atoms.get_stress(voigt=False), atol=1e-12)
        assert data.group == atoms.info.get("material_id", "a.xyz")
    keys = LabelKeys.parse({"energy": "corrected", "forces": "forces"})
    assert_parts(archive, divide, read, 1, 3, 100, most=lambda size: max(size, 4))
    assert [len(divide(archive, size)) for size in (1, 8, 100)] == [4, 2, 1]
    assert [float(data.energy) for data in read(archive, part=(1, 2), keys=keys)] == [-0.0, -3.0, -6.0, -9.0]
    assert matches(archive, archive.read_bytes()[:4096])
    assert not matches(Path("m.json"), b"PK\x03\x04")


@pytest.mark.bad_input
def test_bad_zips(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xyz_zip, "MAX_LINE", 1 << 12)
    monkeypatch.setattr(xyz_zip, "MAX_FRAME", 1 << 16)
    content = archive.read_bytes()

    def made(name: str, text: str) -> bytes:
        return zipped(tmp_path / "n.zip", {name: text}).read_bytes()

    cases = {
        "cut": (content[: len(content) // 2], "not a readable zip, or truncated"),
        "none": (made("README.md", "x"), r"holds no .xyz or .extxyz member; it holds README.md"),
        "short": (made("a.xyz", "3\n\nH 0 0 0\n"), "member a.xyz is damaged after 0 frames .*has 1 atoms, expected 3"),
        "words": (made("a.xyz", "1\n\nH 0 0 0\n\nand more\n"), "a blank line stands between frames"),
        "line": (made("a.xyz", "1\n" + " " * (1 << 20)), "larger than any structure needs"),
        "atoms": (made("a.xyz", "9999999\n" + "\n" * (1 << 20)), "larger than any structure needs"),
        "bytes": (content[:120] + bytes(20) + content[140:], "member .* is damaged"),
    }
    for case, (text, message) in cases.items():
        path = tmp_path / f"{case}.zip"
        path.write_bytes(text)
        with refusal(message):
            read(path)
