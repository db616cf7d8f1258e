"""OC20 S2EF as published: ``N.extxyz.xz`` with total energies, beside ``N.txt.xz`` with systems and references.

A line of the second file belongs to a frame of the first: ``random<sid>,frame<fid>,reference_energy``. Chanussot et
al., ACS Catal. 11, 6059 (2021), doi:10.1021/acscatal.0c04525.
"""

from __future__ import annotations

import io
import lzma
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import IO

import numpy as np

from escaip.data.readers.ocp_lmdb import numbered
from escaip.data.readers.ocp_records import EnergyCheck, check_energy_option
from escaip.data.readers.policy import Reader, ReadPolicy, Record
from escaip.data.structure import AtomicData
from escaip.errors import DataError
from escaip.units import Units

STRUCTURES = (".extxyz.xz", ".extxyz")
SIDECARS = (".txt.xz", ".txt")
PROPERTIES = b"species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3"
COLUMNS = 9

MAX_ATOMS = 1_000_000
MAX_LINE = 1 << 16
MAX_SIDECAR = 1 << 26
"""Bytes; a file of 5 000 frames has 0.2 MB."""

_KEYS = {b"Lattice", b"Properties", b"energy", b"free_energy", b"pbc"}
_PAIR = re.compile(rb'\s*([A-Za-z_]\w*)=(?:"([^"]*)"|([^\s"]+))')
_LINE = re.compile(r"([^,\s][^,]*),frame(\d{1,15}),([-+.\deE]+)")
_FLAGS = {b"T": True, b"F": False}


def read_oc20(path: Path, name: str, policy: ReadPolicy, *, energy: str | None = None) -> Iterator[AtomicData]:
    """Yields the frames of ``N.extxyz.xz`` or ``N.extxyz``, with the sidecar ``N.txt.xz`` or ``N.txt`` beside it.

    Ids are ``name:system:frame``, groups are systems (``random<sid>``). Energies are those of the key ``energy``, never
    of ``free_energy``; atoms that ``move_mask`` holds are fixed, and their forces are kept. Trajectories of
    relaxations, one file for each system and without sidecar, are read by the ``ase`` reader with ``group_by: file``.

    Options:
        energy: ``total``, as in the file, or ``adsorption``, the total less the reference of the sidecar.

    Raises:
        DataError: a missing sidecar, or one with another number of lines than there are frames; a damaged file, a bad
            frame, implausible energies.
        ConfigError: ``energy`` is not stated, or unknown.
    """
    check_energy_option(path, energy)
    check = EnergyCheck(path, energy)
    yield from check.windows(policy.admit(_records(path, name, policy.units or Units(), check)))


def list_files(path: Path) -> list[Path]:
    """Lists the files of frames in a folder, ``2.extxyz.xz`` before ``10.extxyz.xz``."""
    files = [file for file in _inside(path) if file.name.endswith(STRUCTURES) and file.is_file()]
    stems: dict[str, Path] = {}
    for file in files:
        other = stems.setdefault(_stem(file), file)
        if other != file:
            raise DataError(f"{path}: holds both {other.name} and {file.name}; remove one, or name the files")
    return numbered(files)


def matches(path: Path, head: bytes) -> bool:
    """Files with a sidecar of this layout, and folders that hold one."""
    if path.is_dir():
        return any(matches(file, b"") for file in _inside(path) if not file.is_dir())
    sidecar = _sidecar(path) if path.name.endswith(STRUCTURES) else None
    if sidecar is None:
        return False
    try:
        with _open(sidecar) as file:
            return _LINE.fullmatch(file.readline(MAX_LINE).decode("ascii", "replace").strip()) is not None
    except (OSError, EOFError, lzma.LZMAError):
        return True  # so that reading it names the fault


def _inside(path: Path) -> list[Path]:
    """What is in a folder, or in the only folder in it: the archives unpack into a folder within a folder."""
    inside = list(path.iterdir())
    return _inside(inside[0]) if len(inside) == 1 and inside[0].is_dir() else inside


def _records(path: Path, name: str, units: Units, check: EnergyCheck) -> Iterator[Record]:
    lines = _read_sidecar(path)
    seen: set[tuple[str, int]] = set()
    count = 0
    for comment, atoms in _frames(path):
        if count == len(lines):
            raise DataError(f"{path}: has more frames than the {len(lines)} lines of its .txt file; unpack both again")
        system, frame, reference = lines[count]
        structure_id = f"{name}:{system}:{frame}"
        if (system, frame) in seen:
            structure_id += f":{count}"
        seen.add((system, frame))
        build = partial(_structure_of, comment, atoms, system, reference, structure_id, units, check)
        yield Record(build, partial(str, comment.decode("utf-8", "replace").strip()))
        count += 1
    if count != len(lines):
        raise DataError(f"{path}: has {count} frames, but its .txt file has {len(lines)} lines; unpack both again")


def _structure_of(
    comment: bytes,
    atoms: list[bytes],
    system: str,
    reference: float,
    structure_id: str,
    units: Units,
    check: EnergyCheck,
) -> AtomicData:
    """A frame by its columns, several times as fast as ASE; ``reference`` is in the unit of the file."""
    pairs = {key: quoted or bare for key, quoted, bare in _PAIR.findall(comment)}
    tokens = b"".join(atoms).split()
    if not pairs.keys() <= _KEYS:
        others = ", ".join(map(_text, sorted(pairs.keys() - _KEYS)))
        raise DataError(f"{structure_id}: has {others}, which files of OC20 do not have; read it with format: ase")
    if pairs.get(b"Properties") != PROPERTIES or len(tokens) != COLUMNS * len(atoms):
        raise DataError(
            f"{structure_id}: atoms do not have the {COLUMNS} columns {PROPERTIES.decode()}; read other files with "
            "format: ase"
        )
    try:
        numbers = [_atomic_numbers()[symbol] for symbol in tokens[0::COLUMNS]]
        moves = [_FLAGS[flag] for flag in tokens[4::COLUMNS]]
        columns = [list(map(float, tokens[column::COLUMNS])) for column in (1, 2, 3, 6, 7, 8)]
        tags = list(map(int, tokens[5::COLUMNS]))
        energy = float(pairs[b"energy"]) if b"energy" in pairs else None
        lattice = list(map(float, pairs[b"Lattice"].split()))
        pbc = [_FLAGS[flag] for flag in pairs[b"pbc"].split()]
    except KeyError as error:
        raise DataError(f"{structure_id}: {_text(error.args[0])} is no element, no T or F, or not given") from error
    except ValueError as error:
        raise DataError(f"{structure_id}: holds something else than numbers ({error})") from error
    if len(lattice) != 9 or len(pbc) != 3:
        raise DataError(
            f"{structure_id}: Lattice has {len(lattice)} numbers and pbc {len(pbc)} flags, expected 9 and 3"
        )
    array = np.array(columns).T
    data = AtomicData.from_arrays(
        numbers,
        array[:, :3],
        cell=np.reshape(lattice, (3, 3)),
        pbc=pbc,
        energy=energy,
        forces=array[:, 3:],
        fixed=~np.array(moves),
        tags=tags,
        structure_id=structure_id,
        group=system,
        units=units,
    )
    if energy is not None:
        if check.kind == "adsorption":
            data.energy -= reference * units.energy
        check.seen.append((float(data.energy), data.num_nodes))
    return data


def _frames(path: Path) -> Iterator[tuple[bytes, list[bytes]]]:
    """Comment and lines of atoms of each frame; a damaged file gives one line."""
    number = 0
    try:
        with _open(path) as file:
            while (line := file.readline(MAX_LINE)).strip():
                yield _frame(file, line, f"{path}: frame {number}")
                number += 1
            if line and file.read(MAX_LINE).strip():
                raise DataError(f"{path}: frame {number}: an empty line where the number of atoms should be")
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: damaged or truncated after {number} frames ({error})") from error
    if number == 0:
        raise DataError(f"{path}: holds no frames")


def _frame(file: IO[bytes], line: bytes, place: str) -> tuple[bytes, list[bytes]]:
    digits = line.strip()
    if not digits.isdigit() or not 0 < len(digits) < 10 or not 0 < int(digits) <= MAX_ATOMS:
        raise DataError(f"{place}: begins with {_text(digits)}, expected a number of atoms; the file is damaged")
    comment = file.readline(MAX_LINE)
    atoms = [file.readline(MAX_LINE) for _ in range(int(digits))]
    # Without its line end the last number may be cut, and still be a number.
    if not atoms[-1].strip() or not atoms[-1].endswith(b"\n"):
        held = sum(1 for atom in atoms if atom.strip() and atom.endswith(b"\n"))
        raise DataError(f"{place}: has {held} of {int(digits)} whole lines of atoms; the file is truncated or damaged")
    return comment, atoms


def _read_sidecar(path: Path) -> list[tuple[str, int, float]]:
    """System, frame and reference energy of each frame."""
    sidecar = _sidecar(path)
    if sidecar is None:
        raise DataError(
            f"{path}: has no {_stem(path)}.txt.xz or {_stem(path)}.txt beside it, with the system and reference of "
            "each frame; put it there, or read a trajectory of a relaxation with format: ase, group_by: file"
        )
    try:
        with _open(sidecar) as file:
            text = file.read(MAX_SIDECAR + 1).decode("ascii")
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{sidecar}: damaged, or not a text of systems and references ({error})") from error
    if len(text) > MAX_SIDECAR:
        raise DataError(f"{sidecar}: is larger than {MAX_SIDECAR} bytes, no text of systems and references")
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line.strip())
        try:
            lines.append((match[1], int(match[2]), float(match[3])))  # type: ignore[index]
        except (TypeError, ValueError):
            raise DataError(
                f"{sidecar}: line {number} is {_text(line)}, expected SYSTEM,frameNUMBER,REFERENCE_ENERGY"
            ) from None
    return lines


def _sidecar(path: Path) -> Path | None:
    order = SIDECARS if path.suffix == ".xz" else SIDECARS[::-1]
    found = (path.with_name(_stem(path) + suffix) for suffix in order)
    return next((file for file in found if file.is_file()), None)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".xz").removesuffix(".extxyz")


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed, buffered so that lines are found by compiled code."""
    return io.BufferedReader(lzma.open(path), 1 << 18) if path.suffix == ".xz" else open(path, "rb")


def _text(value: bytes | str) -> str:
    shown = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    return repr(shown if len(shown) <= 60 else shown[:57] + "...")


@cache
def _atomic_numbers() -> dict[bytes, int]:
    from ase.data import chemical_symbols

    return {symbol.encode(): number for number, symbol in enumerate(chemical_symbols) if number > 0}


READER = Reader("oc20", read_oc20, matches, None, list_files)
