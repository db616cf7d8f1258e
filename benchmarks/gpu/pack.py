"""What travels to a GPU machine and back: divided real data in one folder, checkpoints within the limits of its files.

    python benchmarks/gpu/pack.py --data ../shared/data --out .gpu_data [--only SET ...]

Reads every set of ``real_data_sets`` once, divides it into prepared stores below ``--out``, with forces and stress in
float32, and prints their sizes. A folder named with a dot, which git is told to ignore (.git/info/exclude), travels
with the working tree to where ``training.py`` runs; raw data and their readers are not needed there.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import markdown_table
from real_data_sets import PARTS, SETS, SPLIT, prepare

from escaip.files import write_file

MIB = 2**20
# A tar file (USTAR; others add to it) has 512 bytes before each file, which is filled up to a multiple of 512, and at
# its end 1024 zeros and as many as are missing to a multiple of 10 240.
_END = 1024 + 10_239
# A GPU validates in no time: four times what a CPU is given, so that the best checkpoint is chosen by more.
MAX_VAL_ATOMS = 6000
# Weights are four bytes each, of which the one with the exponent repeats: 0.85 of the size, where defaults give 0.92.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 1, "lc": 2, "lp": 2, "pb": 2}]


def pack(data: Path, out: Path, names: Iterable[str]) -> list[list[str]]:
    """Divides sets into stores; a row of a table for each: name, structures and atoms of the parts, MiB."""
    rows = []
    folders = {SETS[name].folder: SETS[name] for name in names}
    for folder, chosen in folders.items():
        prepare(chosen, data, out, dtype="float32", max_val_atoms=MAX_VAL_ATOMS)
        split = json.loads((out / folder / SPLIT).read_text(encoding="utf-8"))
        counts = [" / ".join(str(split[part][what]) for part in PARTS) for what in ("structures", "atoms")]
        rows.append([folder, *counts, f"{size_of(out / folder) / MIB:.1f}"])
    return rows


def size_of(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Limits:
    """Of what comes back from a machine: bytes of a file and in all, and how many files."""

    file_bytes: int = 15 * MIB + MIB // 2
    all_bytes: int = 60 * MIB
    files: int = 5


def choose(sizes: Mapping[str, int], limits: Limits) -> list[list[str]]:
    """Which files go together into which archive: each into the first with room, a new one where none has any.

    Args:
        sizes: bytes by name, the most wanted first; what finds no room is left out.
        limits: of the archives.

    Returns:
        The names in each archive.
    """
    archives: list[list[str]] = []
    filled: list[int] = []
    for name, size in sizes.items():
        size = archived(size)
        place = next((i for i, taken in enumerate(filled) if taken + size <= limits.file_bytes), len(filled))
        new = _END if place == len(filled) else 0
        if (
            size + new > limits.file_bytes
            or sum(filled) + size + new > limits.all_bytes
            or (new and len(filled) == limits.files)
        ):
            continue
        if new:
            archives.append([])
            filled.append(new)
        archives[place].append(name)
        filled[place] += size
    return archives


def archived(size: int) -> int:
    """Bytes that a file of ``size`` bytes takes in an archive."""
    return 512 + -(-size // 512) * 512


def compress(source: Path, target: Path) -> None:
    """Writes ``source`` as an .xz file, which ``xz -d`` reads; aside, and renamed."""
    write_file(target, lzma.compress(source.read_bytes(), format=lzma.FORMAT_XZ, filters=_FILTERS))


def write_archives(files: Mapping[str, Path], out: Path, name: str, limits: Limits) -> dict[str, str]:
    """Writes ``NAME-0.tar`` and so on below ``out``, instead of those that are there.

    Args:
        files: by their name in the archive, the most wanted first.
        out: folder.
        name: of the archives.
        limits: of the archives.

    Returns:
        The archive of each file; without those that found no room.
    """
    out.mkdir(parents=True, exist_ok=True)
    archives = choose({member: path.stat().st_size for member, path in files.items()}, limits)
    found: dict[str, str] = {}
    for number, members in enumerate(archives):
        target = out / f"{name}-{number}.tar"
        aside = target.with_name(f".{target.name}.part")
        with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as archive:
            for member in members:
                archive.add(files[member], member)
                found[member] = target.name
        os.replace(aside, target)
    for stale in out.glob(f"{name}-*.tar"):
        if stale.name not in found.values():
            stale.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path(".gpu_data"), help="default: .gpu_data")
    parser.add_argument("--only", choices=sorted(SETS), action="append", help="may be repeated; default: all")
    args = parser.parse_args()
    rows = pack(args.data, args.out, args.only or SETS)
    print(markdown_table(["set", "structures (train / val / test)", "atoms", "MiB"], rows))
    print(f"\n{args.out}: {size_of(args.out) / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
