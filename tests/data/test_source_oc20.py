"""OC20 as published: frames, sidecar, both energies, and what is refused."""

from __future__ import annotations

import io
import lzma
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from toys import assert_bad, refusal

from escaip.data import AtomicData
from escaip.data.inspect import ForceWork
from escaip.data.readers import check_magnitudes
from escaip.data.readers.oc20 import READER, list_files, matches, read_oc20
from escaip.data.readers.policy import ReadPolicy
from escaip.errors import ConfigError, DataError
from escaip.files import dataset_card
from escaip.units import Units

SAMPLE = dataset_card("oc20").path / "sample" / "0.extxyz.xz"
HEADER = 'Lattice="4 0 0 0 4 0 0 0 15" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3'
LABELS = 'energy=-7.5 free_energy=-7.4 pbc="T T T"'
ATOMS = """Cu  0.00000000  0.00000000  0.00000000  F  0   0.10000000  -0.20000000   0.30000000
Cu  2.00000000  2.00000000  0.00000000  T  1   0.00000000   0.00000000   0.50000000
O   0.00000000  0.00000000  1.80000000  T  2  -0.10000000   0.20000000  -0.80000000
"""
FRAME = f"3\n{HEADER} {LABELS}\n{ATOMS}"
LINE = "random12,frame{},-6.25\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes frames and their sidecar."""

    def make(text: str, lines: str | None = None, name: str = "3.extxyz", sidecar: str = "3.txt") -> Path:
        if lines is None:
            lines = "".join(LINE.format(k) for k in range(text.count("Properties=")))
        for file, content in ((name, text), (sidecar, lines)):
            data = content.encode()
            (tmp_path / file).write_bytes(lzma.compress(data) if file.endswith(".xz") else data)
        return tmp_path / name

    return make


def read(path: Path, energy: str | None = "total", **options: object) -> list[AtomicData]:
    return list(read_oc20(path, path.name, ReadPolicy(), energy=energy, **options))  # type: ignore[arg-type]


def by_ase(path: Path) -> list[Atoms]:
    """All frames, decompressed first: ASE seeks back in compressed files."""
    return ase.io.read(io.StringIO(lzma.decompress(path.read_bytes()).decode()), ":", format="extxyz")  # type: ignore[return-value]


def check_against_ase(structures: list[AtomicData], frames: list[Atoms]) -> None:
    assert len(structures) == len(frames)
    for data, atoms in zip(structures, frames, strict=True):
        assert np.array_equal(data.atomic_numbers.numpy(), atoms.numbers)
        assert np.array_equal(data.positions.numpy(), atoms.positions)
        assert np.array_equal(data.cell.numpy()[0], atoms.cell.array)
        assert float(data.energy) == atoms.calc.results["energy"]
        assert np.array_equal(data.forces.numpy(), atoms.get_forces(apply_constraint=False))
        assert np.array_equal(data.tags.numpy(), atoms.get_tags())
        assert np.flatnonzero(data.fixed.numpy()).tolist() == atoms.constraints[0].index.tolist()
        assert data.pbc.all()


def test_sample_is_what_ase_reads() -> None:
    structures = read(SAMPLE)
    check_against_ase(structures, by_ase(SAMPLE))  # every digit of every frame
    assert structures[0].structure_id == "0.extxyz.xz:random1:0"
    assert structures[0].group == "random1"


def test_adsorption_energy_is_total_less_reference() -> None:
    text = lzma.decompress(SAMPLE.with_name("0.txt.xz").read_bytes()).decode()
    references = [float(line.split(",")[2]) for line in text.splitlines()]
    for total, adsorption, reference in zip(read(SAMPLE), read(SAMPLE, "adsorption"), references, strict=True):
        assert float(adsorption.energy) == float(total.energy) - reference
        assert torch.equal(adsorption.forces, total.forces)
    assert float(adsorption.energy) == pytest.approx(-1.766, abs=1e-3)


def test_energy_not_free_energy_and_forces_of_fixed_atoms(write: Callable[..., Path]) -> None:
    (data,) = read(write(FRAME))
    assert float(data.energy) == -7.5
    assert data.forces[0].tolist() == [0.1, -0.2, 0.3]
    assert data.fixed.tolist() == [True, False, False]
    assert (data.structure_id, data.group) == ("3.extxyz:random12:0", "random12")
    assert float(read(write(FRAME), "adsorption")[0].energy) == -1.25


def test_compressed_and_not_and_a_door_with_units(write: Callable[..., Path]) -> None:
    plain, packed = write(FRAME * 3), write(FRAME * 3, name="3.extxyz.xz", sidecar="3.txt.xz")
    for first, second in zip(read(plain), read(packed), strict=True):
        assert torch.equal(first.forces, second.forces)
    (data, *_) = list(read_oc20(plain, plain.name, ReadPolicy(Units.parse({"energy": "meV"})), energy="adsorption"))
    assert float(data.energy) == pytest.approx(-1.25e-3)
    assert data.forces[1].tolist() == pytest.approx([0.0, 0.0, 5e-4])


def test_same_frame_twice_has_two_ids(write: Callable[..., Path]) -> None:
    names = [data.structure_id for data in read(write(FRAME * 3, LINE.format(1) * 2 + LINE.format(2)))]
    assert names == ["3.extxyz:random12:1", "3.extxyz:random12:1:1", "3.extxyz:random12:2"]


def test_folders(write: Callable[..., Path], tmp_path: Path) -> None:
    for number in (10, 2):
        write(FRAME, name=f"{number}.extxyz.xz", sidecar=f"{number}.txt.xz")
    assert [path.name for path in list_files(tmp_path)] == ["2.extxyz.xz", "10.extxyz.xz"]
    assert matches(tmp_path, b"")
    assert READER.expand is list_files
    outer = tmp_path / "outer"
    outer.mkdir()
    assert not matches(outer, b"")
    (outer / "s2ef").mkdir()
    for path in list(tmp_path.glob("*.xz")):
        path.rename(outer / "s2ef" / path.name)
    assert matches(outer, b"")
    assert [path.parent.name for path in list_files(outer)] == ["s2ef", "s2ef"]


def test_only_files_with_a_sidecar_of_this_kind_match(write: Callable[..., Path]) -> None:
    assert matches(SAMPLE, SAMPLE.read_bytes()[:4096])
    assert matches(write(FRAME), b"")
    assert not matches(write(FRAME, "notes on these frames\n"), b"")
    path = write(FRAME, name="random5.extxyz", sidecar="elsewhere.txt")
    assert not matches(path, b"")
    assert not matches(path.with_name("elsewhere.txt"), b"")


@pytest.mark.bad_input
def test_energy_must_be_stated_and_plausible(write: Callable[..., Path]) -> None:
    path = write(FRAME, LINE.format(0).replace("-6.25", "0.0"))
    with pytest.raises(ConfigError, match=r"3\.extxyz: energy is not stated; state energy: total .* or energy: adsorp"):
        read(path, None)
    with pytest.raises(ConfigError, match=r"energy: 'free' is not one of adsorption, total"):
        read(path, "free")
    with pytest.raises(DataError, match=r"stated as adsorption energies are -2\.5 eV per atom"):
        read(path, "adsorption")
    with pytest.raises(DataError, match=r"stated as total are -0\.025 eV per atom"):
        read(write(FRAME.replace("energy=-7.5", "energy=-0.075")))


@pytest.mark.bad_input
def test_sidecar_must_belong_to_the_file(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3\.extxyz: has more frames than the 2 lines of its \.txt file"):
        read(write(FRAME * 3, LINE.format(0) + LINE.format(1)))
    with pytest.raises(DataError, match=r"has 1 frames, but its \.txt file has 2 lines"):
        read(write(FRAME, LINE.format(0) + LINE.format(1)))
    for line in ("random1,frame2\n", "random1,2,3.0\n", ",frame1,1.0\n", "random1,frame1,x\n", "random1,frame1,1-e\n",
                 "random1,frame1,nan\n", "\n", "a,b,frame1,1.0\n"):  # fmt: skip
        with pytest.raises(DataError, match=r"3\.txt: line 2 is .*expected SYSTEM,frameNUMBER,REFERENCE_ENERGY"):
            read(write(FRAME * 2, LINE.format(0) + line))
    (tmp_path / "3.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"3\.txt: damaged, or not a text"):
        read(tmp_path / "3.extxyz")
    (tmp_path / "3.txt").unlink()
    with pytest.raises(DataError, match=r"has no 3\.txt\.xz or 3\.txt beside it.*format: ase, group_by: file"):
        read(tmp_path / "3.extxyz")
    path = write(FRAME, name="4.extxyz.xz", sidecar="4.txt.xz")
    packed = path.with_name("4.txt.xz").read_bytes()
    path.with_name("4.txt.xz").write_bytes(packed[:40])
    with pytest.raises(DataError, match=r"4\.txt\.xz: damaged"):
        read(path)


@pytest.mark.bad_input
def test_every_truncation_is_found(write: Callable[..., Path]) -> None:
    path = write(FRAME * 2)
    whole = path.read_bytes()
    start = len(whole) // 2
    for length in range(start + 1, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"3\.extxyz: "):
            read(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"frame 1: has 2 of 3 whole lines of atoms; the file is truncated or damaged"):
        read(path)


@pytest.mark.bad_input
def test_damaged_compression(tmp_path: Path) -> None:
    whole = SAMPLE.read_bytes()
    path = tmp_path / "0.extxyz.xz"
    path.with_name("0.txt.xz").write_bytes(SAMPLE.with_name("0.txt.xz").read_bytes())
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:-1000], whole[: len(whole) // 2], bytes(flipped), b"", b"no xz at all", whole[:20]):
        path.write_bytes(content)
        with refusal(r"0\.extxyz\.xz: "):
            read(path)


BAD_FRAMES = {
    "count": (FRAME.replace("3\n", "three\n", 1), "frame 0: begins with 'three', expected a number of atoms"),
    "no atoms": (FRAME.replace("3\n", "0\n", 1), "begins with '0', expected"),
    "far too many": (FRAME.replace("3\n", "99999999999999\n", 1), "expected a number of atoms"),
    "more than there are": (FRAME.replace("3\n", "9\n", 1), "frame 0: has 3 of 9 whole lines of atoms"),
    "fewer than there are": (FRAME.replace("3\n", "2\n", 1), "frame 1: begins with 'O "),
    "empty line": (FRAME + "\n" + FRAME, "frame 1: an empty line where the number of atoms should be"),
    "empty": ("", "holds no frames"),
    "element": (FRAME.replace("\nO ", "\nXy "), "random12:0: 'Xy' is no element"),
    "flag": (FRAME.replace("  F  ", "  Q  "), "'Q' is no element, no T or F"),
    "number": (FRAME.replace("1.80000000", "1.8000x000"), "random12:0: holds something else than numbers"),
    "nan": (FRAME.replace("0.50000000", "nan"), "random12:0: forces holds NaN or Inf"),
    "column": (FRAME.replace(" 0.50000000", ""), "do not have the 9 columns"),
    "other columns": (FRAME.replace("tags:I:1", "tags:I:2"), "do not have the 9 columns .* format: ase"),
    "another key": (FRAME.replace("energy=-7.5", "energy=-7.5 charge=1"), "has 'charge', which .* format: ase"),
    "lattice": (FRAME.replace("4 0 0 0 4 0", "4 0 0 0 4"), "Lattice has 8 numbers"),
    "cell": (FRAME.replace("4 0 0 0 4 0", "0 0 0 0 4 0"), "span no volume"),
    "energy": (FRAME.replace("energy=-7.5", "energy=low"), "holds something else than numbers"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames_give_one_line(name: str, write: Callable[..., Path]) -> None:
    text, expected = BAD_FRAMES[name]
    with refusal(expected):
        read(write(text))


@pytest.mark.bad_input
def test_bad_frames_are_counted_and_the_rest_keeps_its_lines(write: Callable[..., Path]) -> None:
    path = write(FRAME.replace("0.50000000", "nan") + FRAME)
    assert_bad(lambda policy: list(read_oc20(path, path.name, policy, energy="total")), "random12:0: forces holds NaN")
    (data,) = read_oc20(path, path.name, ReadPolicy(on_error="skip"), energy="total")
    assert data.structure_id == "3.extxyz:random12:1"


@pytest.mark.bad_input
def test_frames_without_labels(write: Callable[..., Path]) -> None:
    path = write(FRAME.replace("energy=-7.5 free_energy=-7.4 ", ""))
    (data,) = read(path)
    assert not data.has_label("energy")
    with pytest.raises(DataError, match=r"random12:0: has no energy, which required_labels asks for"):
        list(read_oc20(path, path.name, ReadPolicy(required=("energy",)), energy="total"))


@pytest.mark.bad_input
def test_both_forms_of_a_file(write: Callable[..., Path], tmp_path: Path) -> None:
    write(FRAME)
    write(FRAME, name="3.extxyz.xz", sidecar="3.txt.xz")
    with pytest.raises(DataError, match=r"holds both 3\.extxyz"):
        list_files(tmp_path)


def test_real_frames(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("native_formats/oc20_s2ef_extxyz_derived/0.extxyz.xz")
    structures = read(path)
    assert len(structures) == len({data.structure_id for data in structures}) == 264
    check_against_ase(structures, by_ase(path))
    check_magnitudes(structures)
    work = ForceWork()
    for data in structures:
        work.add(data)
    assert np.median(work.ratios) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(DataError, match="stated as adsorption energies are"):
        read(path, "adsorption")
