"""How fast structures come out of a prepared store, beside ASE db, ASE-LMDB and PyG, and what a large store costs.

    python benchmarks/data_loading.py [--structures 4000] [--frames 10000000] [--out results.json]

Reading: random order, every structure once, batches of about 4 000 atoms joined on the CPU, one process and one thread.
``store`` is ``BatchLoader`` over a store; ``ase db`` reads sqlite rows and ``aselmdb`` zlib-compressed JSON rows of an
LMDB, each into ``AtomicData`` and ``collate``; ``pyg`` is an ``InMemoryDataset`` with PyG's ``DataLoader``, whose data
are in memory from the start. Each is run several times in turn; the table gives medians.

Size: a store of small frames is generated; a fresh process opens it, reads a thousand frames at random, plans an epoch
of batches, and reports seconds and memory. A store of slabs in very many shards is read at random, four times in turn:
the first times meet most shards for the first time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.build
import ase.db
import lmdb
import numpy as np
import orjson
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from common import markdown_table, provenance, write_json
from torch_geometric.data import InMemoryDataset
from torch_geometric.loader import DataLoader

from escaip.data import AtomicData, AtomicDataset, BudgetBatchSampler, Store, StoreWriter, collate
from escaip.data.loader import BatchLoader
from escaip.data.store import COLUMNS, MANIFEST, composition_key
from escaip.data.store_writer import Stream, pack_compositions, pack_text, save_arrays

ATOMS_PER_BATCH = 4_000
REPEATS = 5
BLOCK = 100_000


def slabs(count: int) -> list[Atoms]:
    """Labelled copper slabs of 75 atoms, periodic in the plane."""
    rng = np.random.default_rng(0)
    slab = ase.build.fcc111("Cu", (5, 5, 3), vacuum=8.0)
    made = []
    for _ in range(count):
        atoms = slab.copy()
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=atoms.positions.shape))
        made.append(atoms)
    return made


def molecules(count: int) -> list[Atoms]:
    """Labelled molecules of 9 to 13 atoms in vacuum."""
    rng = np.random.default_rng(0)
    kinds = [ase.build.molecule(name) for name in ("CH3CH2OH", "C6H6", "isobutane", "C5H5N")]
    made = []
    for index in range(count):
        atoms = kinds[index % len(kinds)].copy()
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=atoms.positions.shape))
        made.append(atoms)
    return made


def write_store(path: Path, structures: list[Atoms]) -> Store:
    with StoreWriter(path) as writer:
        for index, atoms in enumerate(structures):
            writer.write(AtomicData.from_ase(atoms, structure_id=str(index)))
    return Store(path)


def write_database(path: Path, structures: list[Atoms]) -> None:
    with ase.db.connect(path, type="db") as database:
        for atoms in structures:
            database.write(atoms)


def write_lmdb(path: Path, structures: list[Atoms]) -> None:
    """Rows as ASE-LMDB keeps them, under the row's number."""
    environment = lmdb.open(str(path), map_size=1 << 32, subdir=False, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for index, atoms in enumerate(structures):
            row = {
                "numbers": atoms.numbers.tolist(),
                "positions": atoms.positions.tolist(),
                "cell": atoms.cell.tolist(),
                "pbc": atoms.pbc.tolist(),
                "energy": atoms.calc.results["energy"],
                "forces": atoms.calc.results["forces"].tolist(),
            }
            transaction.put(str(index + 1).encode(), zlib.compress(orjson.dumps(row)))


class Whole(InMemoryDataset):
    """All structures collated in memory, as PyG keeps small sets."""

    def __init__(self, structures: list[AtomicData]) -> None:
        super().__init__()
        self.data, self.slices = self.collate(structures)


def readers(folder: Path, structures: list[Atoms]) -> dict[str, Callable[[], int]]:
    """By name: reads everything once in random order, in batches, and returns the atoms seen."""
    store = AtomicDataset(write_store(folder / "store", structures))
    write_database(folder / "ase.db", structures)
    write_lmdb(folder / "rows.aselmdb", structures)
    sampler = BudgetBatchSampler(store.natoms, max_atoms=ATOMS_PER_BATCH)
    loader = BatchLoader(store, sampler)
    database = ase.db.connect(folder / "ase.db", type="db")
    environment = lmdb.open(str(folder / "rows.aselmdb"), subdir=False, readonly=True, lock=False)
    whole = Whole([store[index] for index in range(len(store))])
    per_batch = max(1, round(ATOMS_PER_BATCH / float(store.natoms.mean())))
    pyg = DataLoader(whole, batch_size=per_batch, shuffle=True)

    def from_database(index: int) -> AtomicData:
        return AtomicData.from_ase(database.get(id=index + 1).toatoms())

    def from_lmdb(index: int) -> AtomicData:
        with environment.begin() as transaction:
            row = orjson.loads(zlib.decompress(transaction.get(str(index + 1).encode())))
        labels = {key: row[key] for key in ("cell", "pbc", "energy", "forces")}
        return AtomicData.from_arrays(row["numbers"], row["positions"], **labels)

    def batches(read: Callable[[int], AtomicData]) -> int:
        return sum(collate([read(k) for k in batch.tolist()]).num_nodes for batch in sampler.batches(0))

    return {
        "store": lambda: sum(batch.num_nodes for batch in loader),
        "pyg InMemoryDataset": lambda: sum(batch.positions.shape[0] for batch in pyg),
        "aselmdb": lambda: batches(from_lmdb),
        "ase db": lambda: batches(from_database),
    }


def measure_reading(count: int) -> list[dict[str, Any]]:
    """Atoms per second of each reader, in turn, on slabs and on molecules."""
    results = []
    for name, structures in (("slabs of 75 atoms", slabs(count)), ("molecules of 12 atoms", molecules(count))):
        with tempfile.TemporaryDirectory() as folder:
            functions = readers(Path(folder), structures)
            rates: dict[str, list[float]] = {key: [] for key in functions}
            for _ in range(REPEATS):
                for key, function in functions.items():
                    start = time.perf_counter()
                    atoms = function()
                    rates[key].append(atoms / (time.perf_counter() - start))
        medians = {key: statistics.median(values) for key, values in rates.items()}
        ratios = {
            key: statistics.median(a / b for a, b in zip(rates["store"], values, strict=True))
            for key, values in rates.items()
        }
        results.append({"structures": name, "count": count, "atoms_per_second": medians, "store_is_faster_by": ratios})
    return results


def write_large_store(path: Path, structures: list[AtomicData], copies: int) -> None:
    """Shards that share one content of so many structures, and an index of full length."""
    path.mkdir()
    with StoreWriter(path / "seed", shard_atoms=10**9) as writer:
        for data in structures:
            writer.write(data)
    seed = Store(path / "seed")
    entry, frames = seed.manifest["shards"][0], copies * len(structures)
    shards = []
    for number in range(copies):
        name = f"shard-{number:05d}.safetensors"
        (path / name).hardlink_to(path / "seed" / entry["file"])
        shards.append({**entry, "file": name})
    columns = {
        key: Stream(np.dtype(dtype), frames, lambda key=key: (seed.index[key] for _ in shards))
        for key, dtype in COLUMNS.items()
    }
    numbers = structures[0].atomic_numbers.numpy()
    tables = {**pack_text("group", ["one"]), **pack_compositions([composition_key(numbers)])}
    index = save_arrays(path / "index.safetensors", {**columns, **tables})
    manifest = {**seed.manifest, "num_structures": frames, "num_atoms": frames * len(numbers)}
    manifest.update(splits={"all": frames}, shards=shards, index=index)
    (path / MANIFEST).write_text(json.dumps(manifest))


def measure_shards(shards: int) -> dict[str, Any]:
    """Atoms per second at random over very many shards of slabs, four times 10 600 of them in one process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many"
        write_large_store(path, [AtomicData.from_ase(atoms) for atoms in slabs(200)], shards)
        dataset, rng, rates = AtomicDataset(Store(path)), np.random.default_rng(0), []
        for _ in range(4):
            start = time.perf_counter()
            atoms = sum(dataset.batch(rng.integers(0, len(dataset), 53)).num_nodes for _ in range(200))
            rates.append(atoms / (time.perf_counter() - start))
    return {"shards": shards, "atoms_per_second_in_turn": rates}


def memory() -> dict[str, float]:
    """MB of this process now: its own, and with the mapped files that happen to be in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(fields[key].split()[0]) / 1024 for key in ("RssAnon", "VmRSS"))
    return {"own": own, "with_files": mapped}


def probe(path: str) -> None:
    """In a process of its own: opens, reads at random, plans an epoch; prints seconds and memory as JSON."""
    used = {"before": memory()}
    start = time.perf_counter()
    store = Store(path)
    opened = time.perf_counter() - start
    used["open"] = memory()
    dataset = AtomicDataset(store)
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    atoms = sum(dataset.batch(rng.integers(0, len(store), 1000)).num_nodes for _ in range(10))
    reading = time.perf_counter() - start
    used["after_reading"] = memory()
    start = time.perf_counter()
    sampler = BudgetBatchSampler(dataset.natoms, max_atoms=ATOMS_PER_BATCH)
    planned = time.perf_counter() - start
    start = time.perf_counter()
    batches = len(sampler.batches(1))
    epoch = time.perf_counter() - start
    used["epoch_planned"] = memory()
    report = {
        "frames": len(store),
        "open_seconds": opened,
        "atoms_per_second_over_10000_frames": atoms / reading,
        "plan_seconds": planned,
        "epoch_seconds": epoch,
        "batches": batches,
        "memory_MB": used,
    }
    print(json.dumps(report))


def measure_size(frames: int) -> list[dict[str, Any]]:
    """The probe on a small store and on one of ``frames``."""
    results = []
    for count in (BLOCK, frames):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "large"
            water = [AtomicData.from_ase(ase.build.molecule("H2O")) for _ in range(BLOCK)]
            write_large_store(path, water, count // BLOCK)
            done = subprocess.run(
                [sys.executable, __file__, "--probe", str(path)], capture_output=True, text=True, check=True
            )
            results.append(json.loads(done.stdout))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=int, default=4_000, help="for reading (default: 4000)")
    parser.add_argument("--frames", type=int, default=10_000_000, help="of the large store (default: ten million)")
    parser.add_argument("--shards", type=int, default=20_000, help="of the store of many shards (default: 20 000)")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.probe:
        probe(options.probe)
        return
    reading, size = measure_reading(options.structures), measure_size(options.frames)
    shards = measure_shards(options.shards)
    for result in reading:
        rates, ratios = result["atoms_per_second"], result["store_is_faster_by"]
        rows = [[key, f"{rates[key]:,.0f}", f"{ratios[key]:.1f}"] for key in rates]
        print(markdown_table([result["structures"], "atoms/s", "store is faster by"], rows))
    for result in (*size, shards):
        print(json.dumps(result))
    if options.out:
        write_json(options.out, {"provenance": provenance(), "reading": reading, "size": size, "shards": shards})


if __name__ == "__main__":
    main()
