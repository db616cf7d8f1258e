"""MPTrj as published: one JSON file of 11 GB, ``{material: {frame: {structure, energies, force, stress, ...}}}``.

Deng et al., Nat. Mach. Intell. 5, 1031 (2023). The file is streamed material by material, whole or a range of bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from escaip.data.readers.policy import Part, Reader, ReadPolicy, Record
from escaip.data.readers.pymatgen import parse_structure
from escaip.data.structure import LABELS, AtomicData, floats
from escaip.errors import ConfigError, DataError
from escaip.files import one_line
from escaip.types import TARGETS
from escaip.units import KBAR, Units

ENERGIES = {"uncorrected": "uncorrected_total_energy", "corrected": "corrected_total_energy"}
UNITS = Units(stress=KBAR)
"""Å, eV, eV/Å and kbar."""

MAX_MATERIAL = 1 << 28
"""Bytes of one material beyond which the layout is another one."""

_FRAME = (
    rb'"[^"\\]*"\s*:\s*\{\s*"[^"\\]*"\s*:\s*\{\s*"(?:structure|uncorrected_total_energy|corrected_total_energy|'
    rb'energy_per_atom|ef_per_atom|e_per_atom_relaxed|ef_per_atom_relaxed|force|stress|magmom|bandgap|mp_id)"\s*:'
)
_HEAD = re.compile(rb"\s*\{\s*" + _FRAME)
_BORDER = re.compile(rb",\s*" + _FRAME)
"""Where a material begins: only there an object opens in an object in an object that begins like a frame."""

_BLOCK = 1 << 20
_PARSED = 1 << 14
_MAX_OPEN = 4000
"""Bytes that are parsed together, and brackets that may be open in them: the parser's memory is quadratic in the depth
of nesting."""


def read_mptrj(
    path: Path, name: str, policy: ReadPolicy, *, part: Part | None = None, energy: str | None = None
) -> Iterator[AtomicData]:
    """Yields the frames of every material; ids are ``name:material:frame``, groups are materials.

    Stress is turned from kbar in VASP's sign (positive in compression) into eV/Å³, positive in tension. Further targets
    (``magmom``) are read where they are registered under the name that a frame gives them.

    Options:
        energy: ``uncorrected``, as VASP computed it (MACE-MP), or ``corrected`` by the MP2020 scheme (CHGNet).

    Raises:
        DataError: truncated or damaged JSON, another layout, a frame without the chosen energy, a disordered structure.
        ConfigError: no choice of ``energy``.
    """
    if energy not in ENERGIES:
        given = "is not stated" if energy is None else f"{energy!r} is neither"
        raise ConfigError(
            f"{path}: energy {given}; state energy: uncorrected (VASP's total energy; MACE-MP is trained on it) or "
            "energy: corrected (MP2020 corrections added; CHGNet is trained on it)"
        )
    yield from policy.admit(_records(path, name, ENERGIES[energy], policy.units or UNITS, part))


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of bytes of whole materials with about ``size`` frames together, judged by the frames at the beginning."""
    total = path.stat().st_size
    with open(path, "rb") as file:
        beginning = file.read(8 * _BLOCK)
        frames = len(re.findall(rb'"structure"\s*:', beginning))
        step = max(size * len(beginning) // max(frames, 1), 1)
        borders = [0]
        while (border := _next_border(file, borders[-1] + step)) is not None:
            borders.append(border)
    return list(zip(borders, [*borders[1:], total], strict=True))


def _next_border(file: io.BufferedReader, start: int) -> int | None:
    """Offset of the comma before the first material that begins behind ``start``; None behind the last."""
    held, at = b"", start
    file.seek(start)
    while block := file.read(_BLOCK):
        held += block
        if match := _BORDER.search(held):
            return at + match.start()
        kept = min(len(held), 4096)  # a border may lie across two blocks
        at += len(held) - kept
        held = held[-kept:]
    return None


def _records(path: Path, name: str, energy_key: str, units: Units, part: Part | None) -> Iterator[Record]:
    import ijson

    material = None
    start, stop = part or (0, path.stat().st_size)
    with open(path, "rb") as file:
        stream = _Materials(file, start, stop, whole=stop == path.stat().st_size)
        try:
            # Floats are read by the C library, to the last digit.
            for material, frames in ijson.kvitems(stream, "", use_float=True, map_type=_Object, buf_size=_PARSED):
                stream.used = stream.depth = 0
                if not isinstance(frames, _Object) or not all(isinstance(frame, dict) for frame in frames.values()):
                    raise ValueError("it holds something else than frames: this is not the layout of MPTrj")
                if frames.repeated is not None:
                    raise ValueError(f"two frames of material {material} are named {frames.repeated!r}")
                for key, frame in frames.items():
                    build = partial(_structure_of, frame, f"{name}:{material}:{key}", str(material), energy_key, units)
                    yield Record(build, partial(", ".join, frame))
        except (GeneratorExit, DataError):
            raise
        except (ijson.JSONError, ValueError, RecursionError) as error:
            place = "at its beginning" if material is None else f"at or after material {material}"
            raise DataError(
                f"{path}: is damaged or truncated {place} ({one_line(error)}); download it again"
            ) from error
    if material is None:
        raise DataError(f"{path}: holds no materials")


class _Materials:
    """A range of bytes of a file as a JSON object.

    Attributes:
        used: bytes read since a material ended.
        depth: brackets open since then, those in strings included.
    """

    def __init__(self, file: io.BufferedReader, start: int, stop: int, *, whole: bool) -> None:
        file.seek(start)
        self._file, self._left, self._tail = file, stop - start, b"" if whole else b"}"
        self._opens = start > 0  # with the comma before its first material
        self.used = self.depth = 0

    def read(self, size: int) -> bytes:
        block = self._file.read(min(size, self._left))
        self._left -= len(block)
        self.used += len(block)
        opened = block.count(b"[") + block.count(b"{")
        if self.used > MAX_MATERIAL or self.depth + opened > _MAX_OPEN:
            raise ValueError(f"a material is larger than {MAX_MATERIAL >> 20} MiB, or nested too deeply")
        self.depth += opened - block.count(b"]") - block.count(b"}")
        if not block and size:
            block, self._tail = self._tail, b""
        elif self._opens and block:
            block, self._opens = b"{" + block[1:], False
        return block


class _Object(dict):
    """A JSON object that remembers a second member of the same name; the parser ignores an error here."""

    repeated: str | None = None

    def __setitem__(self, key: str, value: object) -> None:
        if key in self:
            self.repeated = key
        super().__setitem__(key, value)


def _structure_of(frame: dict[str, Any], structure_id: str, material: str, energy_key: str, units: Units) -> AtomicData:
    """One frame; its stress is positive in compression."""
    if not isinstance(frame.get("structure"), dict):
        raise DataError(f"{structure_id}: is no frame of MPTrj (needs a structure)")
    if frame.get(energy_key) is None:
        state = "is null" if energy_key in frame else "is not there"
        raise DataError(f"{structure_id}: {energy_key} {state}; choose the other energy, or set on_error: skip")
    if frame.get("mp_id", material) != material:
        raise DataError(f"{structure_id}: has the mp_id {frame['mp_id']!r}, but stands under {material!r}")
    numbers, positions, cell, periodic = parse_structure(frame["structure"], structure_id)
    stress = frame.get("stress")
    return AtomicData.from_arrays(
        numbers,
        positions,
        cell=cell,
        pbc=periodic,
        charge=frame["structure"].get("charge") or 0,
        energy=frame[energy_key],
        forces=frame.get("force"),
        stress=None if stress is None else -floats(stress, "stress", structure_id, (3, 3)),
        labels={key: frame.get(key) for key in TARGETS if key not in LABELS},
        structure_id=structure_id,
        group=material,
        units=units,
    )


def matches(path: Path, head: bytes) -> bool:
    """JSON whose first object of the third depth begins like a frame."""
    return path.suffix == ".json" and _HEAD.match(head) is not None


READER = Reader("mptrj", read_mptrj, matches, divide)
