"""The data of a training run: reading, splitting, statistics and loaders, with plain arguments for LightningCLI."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from escaip.data.dataset import AtomicDataset
from escaip.data.loader import START_METHODS, BatchLoader
from escaip.data.sampler import OVERSIZED, BudgetBatchSampler, estimate_edges
from escaip.data.sources import ReadReport, expand_paths, open_source
from escaip.data.splits import SplitSettings, make_split
from escaip.data.statistics import Statistics, fit_statistics
from escaip.data.store import Store
from escaip.errors import ConfigError, DataError

DataSpec = str | list[str] | dict[str, Any]
PARTS = ("train", "val", "test", "predict")

_log = logging.getLogger(__name__)


class AtomicDataModule(LightningDataModule):
    """Training, validation, test and prediction sets.

    Each set is a path, a list of paths, or a mapping ``{path, format, keys, units, index, ...}`` of arguments of
    :func:`escaip.data.sources.open_source`. A prepared store is used in place, anything else is read into memory.

    Attributes:
        datasets: the sets that exist, by name, after :meth:`setup`.
        reports: what was read and skipped, by name, for the sets read from files.
    """

    def __init__(
        self,
        train: DataSpec | None = None,
        val: DataSpec | None = None,
        test: DataSpec | None = None,
        predict: DataSpec | None = None,
        *,
        split: dict[str, Any] | None = None,
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        num_neighbors: int | None = 30,
        oversized: str = "error",
        required_labels: tuple[str, ...] = ("energy", "forces"),
        fixed_atoms: str = "free_only",
        isolated_energies: dict[str, float] | None = None,
        rotate: bool = False,
        neighbor_cutoff: float | None = None,
        num_workers: int = 0,
        start_method: str | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        """Describes the data; nothing is read before :meth:`setup`.

        Args:
            train: training set.
            val: validation set; when absent, part of ``train`` by ``split``.
            test: test set; when absent, part of ``train`` if ``split`` asks for one.
            predict: structures to predict, labels not needed; default the test set.
            split: ``{by: group | structure, val: fraction or number, test: ...}``, default ``{val: 0.1}`` by group.
            batch_size: structures per batch and process; or else
            max_atoms: atoms per batch and process, and
            max_edges: edges per batch and process, estimated from
            num_neighbors: neighbors per atom of the model (``k``).
            oversized: what to do with a structure larger than the budget: ``error``, ``skip`` or ``own_batch``.
            required_labels: labels that every structure of train, val and test must carry.
            fixed_atoms: ``free_only`` leaves constrained atoms out of losses, metrics and the force scale; ``all`` not.
            isolated_energies: eV of isolated atoms by symbol or atomic number, as element references.
            rotate: random rotations of the training structures, for direct force heads.
            neighbor_cutoff: Å, search neighbors in the loader's workers instead of on the model's device.
            num_workers: loader processes per process.
            start_method: how they start: ``fork``, ``spawn`` or ``forkserver``; default the platform's.
            seed: of split, order and rotations.
            cache_dir: where statistics are kept; default inside a prepared store, else they are not kept.

        Raises:
            ConfigError: an argument that cannot be used.
        """
        super().__init__()
        self._specs: dict[str, DataSpec | None] = {"train": train, "val": val, "test": test, "predict": predict}
        self._split = SplitSettings.parse(split)
        if batch_size is None and max_atoms is None and max_edges is None:
            raise ConfigError("data: give max_atoms (and max_edges), or batch_size")
        if oversized not in OVERSIZED:
            raise ConfigError(f"oversized: {oversized!r} is not one of {', '.join(OVERSIZED)}")
        if start_method is not None and start_method not in START_METHODS:
            raise ConfigError(f"start_method: {start_method!r} is not one of {', '.join(START_METHODS)}")
        self._budget: dict[str, Any] = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
        self._num_neighbors, self._oversized = num_neighbors, oversized
        self._required, self._fixed_atoms = tuple(required_labels), fixed_atoms
        self._isolated = parse_isolated_energies(isolated_energies)
        self._rotate, self._neighbor_cutoff = rotate, neighbor_cutoff
        self._num_workers, self._start_method = num_workers, start_method
        self._seed, self._cache_dir = seed, cache_dir
        self._statistics: Statistics | None = None
        self._divided = False
        self.datasets: dict[str, AtomicDataset] = {}
        self.reports: dict[str, ReadReport] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads what ``stage`` needs (``fit``, ``validate``, ``test``, ``predict``; None for all), once.

        Raises:
            DataError: unreadable data, a missing label, an impossible split, 0 structures.
            ConfigError: no path for a set that is needed.
        """
        if stage in ("fit", None) and self._specs["train"] is None:
            raise ConfigError("data.train: name the training data (--data.train PATH)")
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        wanted = needed[stage] if stage is not None else PARTS
        for part in wanted:
            if self._specs[part] is not None and part not in self.datasets:
                self.datasets[part] = self._open(part)
        if any(part not in self.datasets for part in wanted) and self._specs["train"] is not None:
            self._divide()
        if "predict" in wanted and "predict" not in self.datasets and stage == "predict":
            if "test" not in self.datasets and self._specs["test"] is not None:
                self.datasets["test"] = self._open("test")
            if "test" in self.datasets:
                self.datasets["predict"] = self.datasets["test"]
        for part in wanted:
            if part not in self.datasets and stage not in ("fit", None):
                raise ConfigError(f"data.{part}: name the data (--data.{part} PATH) or let data.split make it")
        if stage in ("fit", None):
            self._statistics = self._statistics or self._fit_statistics()

    @property
    def statistics(self) -> Statistics:
        """Statistics of the training set.

        Raises:
            ConfigError: before ``setup("fit")``.
        """
        if self._statistics is None:
            raise ConfigError("data.statistics: only known after setup('fit') with data.train")
        return self._statistics

    def train_dataloader(self) -> BatchLoader:
        """Shuffled, repacked every epoch, resumable."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """In order; an empty list when there is no validation set."""
        return self._loader("val", shuffle=False) if "val" in self.datasets else []

    def test_dataloader(self) -> BatchLoader:
        """In order."""
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> BatchLoader:
        """In order."""
        return self._loader("predict", shuffle=False)

    def summary(self) -> str:
        """A few lines: structures and labels of each set, what was skipped."""
        lines = [
            f"{part}: {len(data)} structures, {int(data.natoms.sum())} atoms" for part, data in self.datasets.items()
        ]
        left_out = {part: report for part, report in self.reports.items() if report.skipped or report.filtered}
        lines += [f"{part}: {report.summary()}" for part, report in left_out.items()]
        if self._statistics is not None:
            counts = ", ".join(f"{count} {label}" for label, count in self._statistics.label_counts.items())
            lines.append(f"labels in train: {counts}")
        return "\n".join(lines)

    def _open(self, part: str) -> AtomicDataset:
        spec = self._specs[part]
        options = {"path": spec} if isinstance(spec, str | list) else dict(spec or {})
        if "path" not in options:
            raise ConfigError(f"data.{part}: has no path; write {{path: FILE, ...}}")
        structures = self._read(part, options)
        return AtomicDataset(
            structures, fixed_atoms=self._fixed_atoms, rotate=self._rotate and part == "train", seed=self._seed
        )

    def _read(self, part: str, options: dict[str, Any]) -> Any:
        path = options["path"]
        required = () if part == "predict" else self._required
        files = expand_paths(path)
        plain = set(options) <= {"path", "format"} and options.get("format") in (None, "store")
        if plain and len(files) == 1 and files[0].is_dir():
            store = Store(files[0])
            for label in required:
                if store.manifest["labels"][label] < len(store):
                    raise DataError(
                        f"{path}: {len(store) - store.manifest['labels'][label]} of {len(store)} structures have no "
                        f"{label}, which required_labels asks for; drop it from required_labels to train on the others"
                    )
            return store
        report = self.reports[part] = ReadReport()
        structures = list(open_source(report=report, required_labels=required, **options))
        if not structures:
            raise DataError(
                f"data.{part}: 0 structures in {path} ({report.summary()}); check index, subset and on_error"
            )
        _log.info("data.%s: %s", part, report.summary())
        return structures

    def _divide(self) -> None:
        """Makes the sets that were not named from the training data."""
        settings = SplitSettings(
            by=self._split.by,
            val=0 if self._specs["val"] is not None else self._split.val,
            test=0 if self._specs["test"] is not None else self._split.test,
        )
        if (settings.val == 0 and settings.test == 0) or self._divided:
            return
        self._divided = True
        whole = self.datasets.pop("train", None) or self._open("train")
        split = make_split(whole.groups, settings, seed=self._seed)
        self.datasets["train"] = whole.subset(split.train, rotate=self._rotate)
        for part in ("val", "test"):
            indices = getattr(split, part)
            if len(indices):
                self.datasets[part] = whole.subset(indices)

    def _loader(self, part: str, *, shuffle: bool) -> BatchLoader:
        if part not in self.datasets:
            raise ConfigError(f"data.{part}: name the data (--data.{part} PATH) or let data.split make it")
        data = self.datasets[part]
        trainer = self.trainer
        edges = None
        if self._budget["max_edges"] is not None:
            edges = estimate_edges(data.natoms, data.periodic, self._num_neighbors, data.num_edges)
        sampler = BudgetBatchSampler(
            data.natoms,
            num_edges=edges,
            names=_Names(data),
            shuffle=shuffle,
            seed=self._seed,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
            oversized=self._oversized,
            **self._budget,
        )
        if sampler.skipped:
            _log.warning("data.%s: %d structures larger than the budget are left out", part, len(sampler.skipped))
        return BatchLoader(
            data,
            sampler,
            num_workers=self._num_workers,
            start_method=self._start_method,
            neighbor_cutoff=self._neighbor_cutoff,
        )

    def _fit_statistics(self) -> Statistics:
        plain = self.datasets["train"].subset(range(len(self.datasets["train"])))
        cache = self._cache_file(plain)
        if cache is not None and cache.is_file():
            return Statistics.load(cache)
        statistics = fit_statistics(plain, self._isolated)
        if cache is not None and os.access(cache.parent, os.W_OK):
            statistics.save(cache)
        return statistics

    def _cache_file(self, data: AtomicDataset) -> Path | None:
        folder = Path(self._cache_dir) if self._cache_dir is not None else data.store_path
        if folder is None:
            return None
        if self._cache_dir is not None:
            folder.mkdir(parents=True, exist_ok=True)
        key = json.dumps([data.fingerprint, sorted((self._isolated or {}).items())])
        return folder / f"statistics-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


class _Names(Sequence[str]):
    """Structure names, read only when a message needs one."""

    def __init__(self, data: AtomicDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        return self._data.structure_id(int(index))


def parse_isolated_energies(energies: Mapping[Any, float] | None) -> dict[int, float] | None:
    """Energies by atomic number, from keys that are symbols or numbers.

    Raises:
        ConfigError: a key that is neither.
    """
    if energies is None:
        return None
    from ase.data import atomic_numbers

    parsed: dict[int, float] = {}
    for key, value in energies.items():
        number = atomic_numbers.get(str(key)) or (int(key) if str(key).isdigit() else 0)
        if not 1 <= number <= 118:
            raise ConfigError(f"isolated_energies: {key!r} is no element symbol or atomic number")
        parsed[number] = float(value)
    return parsed
