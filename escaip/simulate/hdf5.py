"""Trajectories in HDF5, laid out after H5MD 1.1 (docs/analysis.md), whole at every moment of a run.

The file is written in HDF5's single-writer-multiple-reader mode: metadata reach the disk in an order that never points
at what is not there yet, so that a reader beside the run, or after a kill, opens it. A frame's step is written last,
after all its other values have been flushed: a frame counts when its step is there.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

from escaip.errors import DataError, SimulationError
from escaip.simulate.hdf5_file import Room, UnmarkedFile, is_marked

if TYPE_CHECKING:
    import h5py

SUFFIXES = (".h5", ".hdf5")
LAYOUT_VERSION = 1
_STEP, _TIME = "particles/atoms/position/step", "particles/atoms/position/time"
# Values of a frame by name of their H5MD element, and the unit in the words of H5MD's units module.
_ELEMENTS = {
    "position": ("particles/atoms/position", "Ang"),
    "momentum": ("particles/atoms/momentum", f"{units.fs!r} u Ang fs-1"),
    "force": ("particles/atoms/force", "eV Ang-1"),
    "cell": ("particles/atoms/box/edges", "Ang"),
    "energy": ("observables/potential_energy", "eV"),
    "stress": ("observables/stress", "eV Ang-3"),
}
_OWN_ARRAYS = ("numbers", "positions", "momenta", "masses")
_CHUNK = 16 * 1024
_BLOCK = 8 * 1024**2
_ROOM = 1024**2
_ATTEMPTS, _PAUSE = 5, 0.05
# The oldest format with the single-writer mode: read by HDF5 1.10 and newer.
_LIBVER = ("v110", "v110")
# No piece of metadata crosses a page of the operating system: a kill comes between pages, never within one.
_PAGES = {"fs_strategy": "page", "fs_page_size": 4096}

T = TypeVar("T")


class Hdf5Trajectory:
    """Frames in HDF5; its position is a number of frames.

    Args:
        path: the file.
        position: frames to keep of an existing file; None starts anew.

    Raises:
        SimulationError: the file holds fewer frames than are to be kept, or is damaged.
    """

    def __init__(self, path: Path, position: int | None) -> None:
        self._path = path
        self._file: h5py.File | None = None
        self._room: Room | None = None
        self._datasets: dict[str, h5py.Dataset] = {}
        self._numbers = np.zeros(0, dtype=np.int64)
        self._count = position or 0
        if position is None:
            path.unlink(missing_ok=True)  # what an earlier run left there must not be taken for this one's
        else:
            _keep_frames(path, position)
            self._open()

    def write(self, frame: Atoms) -> None:
        """Appends a frame.

        Raises:
            SimulationError: other atoms than in the frames before.
            OSError: the disk is full, or the file cannot be written for another reason.
        """
        try:
            if self._file is None:
                _create(self._path, frame)
                self._open()
            assert self._file is not None
            assert self._room is not None
            if not np.array_equal(frame.numbers, self._numbers):
                raise SimulationError(f"{self._path} holds other atoms than this frame: use a file for each system")
            values = _values(frame)
            self._room.ensure(self._file.id.get_filesize(), _ROOM + 4 * sum(np.size(v) for v in values.values()) * 8)
            for name, dataset in self._datasets.items():
                if name != "step":
                    dataset.resize(self._count + 1, axis=0)
                    dataset[self._count] = values[name]
            self._file.flush()
            self._room.ensure(self._file.id.get_filesize(), _ROOM)
            step = self._datasets["step"]
            step.resize(self._count + 1, axis=0)
            step[self._count] = values["step"]
            step.flush()
        except RuntimeError as error:  # of a failed flush
            raise OSError(f"HDF5 reports: {error}") from error
        self._count += 1

    def position(self) -> int:
        """Frames that are safely on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.id.get_vfd_handle())
        return self._count

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None and self._room is not None:
            try:
                self._file.close()
                self._room.give_back()
            except RuntimeError as error:
                raise OSError(f"HDF5 reports: {error}") from error

    def _open(self) -> None:
        import h5py

        self._file = h5py.File(self._path, "r+", libver=_LIBVER)
        self._datasets = _frame_datasets(self._file)
        self._numbers = self._file["particles/atoms/species"][:]
        self._file.swmr_mode = True
        self._room = Room(self._path)


def read_hdf5(path: Path, start: int = 0, stop: int | None = None, every: int = 1) -> Iterator[Atoms]:
    """Yields frames ``start`` to ``stop`` (excluded), every so many; of a running or killed run those that are whole.

    Raises:
        DataError: not readable, or not written by escaip.
    """
    template, count = _read(path, lambda file: (_template(file, path), _count_whole(_frame_datasets(file))))
    end = count if stop is None else min(stop, count)
    block = max(1, _BLOCK // (72 * len(template))) * every
    for first in range(start, end, block):
        read = _read(path, functools.partial(_read_rows, slice(first, min(first + block, end), every)))
        for index in range(len(read["step"])):
            yield _atoms(template, {name: values[index] for name, values in read.items()})


def _create(path: Path, frame: Atoms) -> None:
    """Writes a file without frames aside, then renames it."""
    import h5py

    with h5py.File("in memory", "w", driver="core", backing_store=False, libver=_LIBVER, **_PAGES) as file:
        _write_constants(file, frame)
        _write_layout(file, frame)
        file.flush()
        content = file.id.get_file_image()
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write_constants(file: h5py.File, frame: Atoms) -> None:
    from escaip import __version__

    h5md = file.create_group("h5md")
    h5md.attrs["version"] = np.array([1, 1], dtype=np.int32)
    h5md.create_group("author").attrs["name"] = np.bytes_("unknown")
    creator = h5md.create_group("creator")
    creator.attrs.update(name=np.bytes_("escaip"), version=np.bytes_(__version__))
    module = h5md.create_group("modules/units")
    module.attrs.update(version=np.array([1, 0], dtype=np.int32), system=np.bytes_("SI"))
    atoms = file.create_group("particles/atoms")
    atoms["species"] = frame.numbers.astype(np.int32)
    atoms["mass"] = frame.get_masses()
    atoms["mass"].attrs["unit"] = np.bytes_("u")
    box = atoms.create_group("box")
    box.attrs["dimension"] = np.int32(3)
    box.attrs["boundary"] = np.array(["periodic" if p else "none" for p in frame.pbc], dtype="S8")
    own = file.create_group("parameters/escaip")
    own.attrs["layout"] = np.int32(LAYOUT_VERSION)
    info = {key: value for key, value in frame.info.items() if key not in ("step", "time_fs")}
    own["info"] = json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in info.items()})
    fixed = [constraint.index for constraint in frame.constraints if isinstance(constraint, FixAtoms)]
    own["fixed"] = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *fixed]))
    arrays = own.create_group("arrays")
    for name, values in frame.arrays.items():
        if name not in _OWN_ARRAYS and values.dtype.kind in "biuf":
            arrays[quote(name, safe="")] = values


def _write_layout(file: h5py.File, frame: Atoms) -> None:
    """Empty extendable datasets; all elements share the step and time of the positions by hard links."""
    values = _values(frame)
    file.create_dataset(_STEP, (0,), np.int64, maxshape=(None,), chunks=(_CHUNK // 8,), fillvalue=-1)
    file.create_dataset(_TIME, (0,), np.float64, maxshape=(None,), chunks=(_CHUNK // 8,), fillvalue=np.nan)
    file[_TIME].attrs["unit"] = np.bytes_("fs")
    for name, (element, unit) in _ELEMENTS.items():
        if name == "stress" and frame.cell.rank < 3:
            continue
        shape = np.shape(values[name])
        chunk = max(1, _CHUNK // (8 * max(int(np.prod(shape)), 1)))
        if 0 in shape:
            raise SimulationError("a trajectory in HDF5 needs atoms: this structure has none")
        dataset = file.create_dataset(
            f"{element}/value", (0, *shape), np.float64, maxshape=(None, *shape), chunks=(chunk, *shape),
            fillvalue=np.nan,
        )  # fmt: skip
        dataset.attrs["unit"] = np.bytes_(unit)
        for source in (_STEP, _TIME):
            target = f"{element}/{source.rsplit('/', 1)[1]}"
            if target != source:
                file[target] = file[source]


def _frame_datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Everything that grows, by name."""
    found = {name: file[f"{path}/value"] for name, (path, _) in _ELEMENTS.items() if path in file}
    return {**found, "time": file[_TIME], "step": file[_STEP]}


def _read_rows(chosen: slice, file: h5py.File) -> dict[str, Any]:
    return {name: dataset[chosen] for name, dataset in _frame_datasets(file).items()}


def _values(frame: Atoms) -> dict[str, Any]:
    results = frame.calc.results if frame.calc is not None else {}
    stress = results.get("stress")
    if stress is not None and np.shape(stress) == (6,):
        stress = voigt_6_to_full_3x3_stress(stress)
    return {
        "position": frame.positions,
        "momentum": frame.get_momenta(),
        "force": results.get("forces", np.full((len(frame), 3), np.nan)),
        "cell": frame.cell.array,
        "energy": results.get("energy", np.nan),
        "stress": np.full((3, 3), np.nan) if stress is None else stress,
        "time": frame.info.get("time_fs", np.nan),
        "step": frame.info["step"],
    }


def _template(file: h5py.File, path: Path) -> Atoms:
    """What all frames share."""
    own = file["parameters/escaip"]
    if own.attrs["layout"] > LAYOUT_VERSION:
        raise DataError(f"trajectory {path} was written by a newer escaip: install that version to read it")
    group = file["particles/atoms"]
    pbc = [value == b"periodic" for value in group["box"].attrs["boundary"]]
    atoms = Atoms(numbers=group["species"][:], pbc=pbc)
    if not np.array_equal(atoms.get_masses(), group["mass"][:]):
        atoms.set_masses(group["mass"][:])
    for name, values in own["arrays"].items():
        atoms.set_array(unquote(name), values[:])
    if len(own["fixed"]):
        atoms.set_constraint(FixAtoms(own["fixed"][:]))
    info = json.loads(own["info"].asstr()[()])
    atoms.info.update({key: np.array(value) if isinstance(value, list) else value for key, value in info.items()})
    return atoms


def _atoms(template: Atoms, values: dict[str, Any]) -> Atoms:
    atoms = template.copy()
    atoms.set_cell(values["cell"])
    atoms.set_positions(values["position"], apply_constraint=False)
    atoms.set_momenta(values["momentum"], apply_constraint=False)
    atoms.info["step"] = int(values["step"])
    if np.isfinite(values["time"]):
        atoms.info["time_fs"] = float(values["time"])
    results: dict[str, Any] = {"energy": float(values["energy"]), "forces": values["force"]}
    if "stress" in values:
        results["stress"] = full_3x3_to_voigt_6_stress(values["stress"])
    known = {name: value for name, value in results.items() if np.isfinite(value).all()}
    if known:
        atoms.calc = SinglePointCalculator(atoms, **known)
    return atoms


def _count_whole(datasets: dict[str, h5py.Dataset]) -> int:
    """Frames that are there with all their values: of a killed run the last may not be."""
    shortest = min(len(dataset) for dataset in datasets.values())
    missing = np.flatnonzero(datasets["step"][:shortest] < 0)
    return int(missing[0]) if len(missing) else shortest


def _read(path: Path, take: Callable[[h5py.File], T]) -> T:
    """What ``take`` finds in the file, also while a run writes it or after one was killed.

    Raises:
        DataError: the file is damaged, not HDF5, or not written by escaip.
    """
    import h5py

    for attempt in range(_ATTEMPTS):
        try:
            with UnmarkedFile(path) as stream, h5py.File(stream, "r") as file:
                return take(file)
        except (OSError, RuntimeError, KeyError) as error:
            if attempt == _ATTEMPTS - 1:
                reason = "it is damaged, or no trajectory of escaip: convert others to extxyz"
                raise DataError(f"trajectory {path} cannot be read ({error}): {reason}") from error
            time.sleep(_PAUSE)  # a run may have been writing just what was read
    raise AssertionError("unreachable")


def _keep_frames(path: Path, count: int) -> None:
    """Cuts a trajectory back to its first frames, aside."""
    if not path.is_file():
        raise SimulationError(f"{path} is gone but its restart file is there: start anew with --overwrite")
    try:
        lengths = _read(path, lambda file: {len(dataset) for dataset in _frame_datasets(file).values()})
        whole = _read(path, lambda file: _count_whole(_frame_datasets(file)))
        if whole < count:
            raise SimulationError(f"{path} ends before the step of the restart file: start anew with --overwrite")
        if lengths != {count} or is_marked(path):
            _read(path, lambda file: _copy_frames(path, _frame_datasets(file), count))
    except DataError as error:
        raise SimulationError(f"{error}; start anew with --overwrite") from error


def _copy_frames(path: Path, datasets: dict[str, h5py.Dataset], count: int) -> None:
    import h5py

    aside = path.with_name(f".{path.name}.kept")
    try:
        _create(aside, next(read_hdf5(path)))
        room = Room(aside)
        room.ensure(0, path.stat().st_size + _ROOM)
        with h5py.File(aside, "r+", libver=_LIBVER) as file:
            for name, target in _frame_datasets(file).items():
                source = datasets[name]
                target.resize(count, axis=0)
                block = max(1, _BLOCK // (8 * int(np.prod(source.shape[1:]))))
                for start in range(0, count, block):
                    chosen = slice(start, min(start + block, count))
                    target[chosen] = source[chosen]
            file.flush()
            os.fsync(file.id.get_vfd_handle())
        room.give_back()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
