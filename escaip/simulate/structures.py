"""Structures from files, checked, and to files, written aside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms

from escaip.errors import DataError


def read_structure(path: str | os.PathLike[str], frame: int = -1) -> Atoms:
    """Reads one structure from anything ASE reads, or from a prepared store.

    Args:
        path: the file, or the folder of a store.
        frame: which structure; negative counts from the end.

    Raises:
        DataError: missing, empty or unreadable file, no such frame, or a structure that no potential can mean.
    """
    from escaip.data import AtomicData
    from escaip.files import resolve

    path = resolve(Path(path))
    if not path.exists():
        raise DataError(f"structure {path} does not exist: check the path")
    atoms = _read_store(path, frame) if path.is_dir() else _read_file(path, frame)
    bare = atoms.copy()
    bare.calc = None
    AtomicData.from_ase(bare, structure_id=path.name)  # checks it
    return bare


def write_structure(path: str | os.PathLike[str], atoms: Atoms) -> None:
    """Writes a structure in the format of the file's suffix, aside, then renames it.

    Raises:
        DataError: the suffix names no format that ASE writes, or the file cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        ase.io.write(aside, atoms)
        os.replace(aside, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}: choose another --out") from error
    except Exception as error:  # ASE's writers raise anything
        raise DataError(f"cannot write {path} ({_first_line(error)}): choose a name that ends in .extxyz") from error
    finally:
        aside.unlink(missing_ok=True)


def _read_file(path: Path, frame: int) -> Atoms:
    if path.stat().st_size == 0:
        raise DataError(f"structure {path} is empty: give a file with at least one structure")
    try:
        atoms: Any = ase.io.read(path, index=frame)
    except (IndexError, StopIteration) as error:
        raise DataError(f"structure {path} has no frame {frame}: give --frame a smaller number") from error
    except OSError as error:
        raise DataError(f"structure {path} cannot be read: {error.strerror or _first_line(error)}") from error
    except Exception as error:  # ASE's readers raise anything
        raise DataError(f"structure {path} cannot be read ({_first_line(error)}): use a file ASE reads") from error
    return atoms


def _read_store(path: Path, frame: int) -> Atoms:
    from escaip.data import Store

    store = Store(path)
    if not -len(store) <= frame < len(store):
        raise DataError(f"store {path} has {len(store)} structures, no number {frame}: give --frame a smaller number")
    return store[frame % len(store)].to_ase()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
