"""Sets of structures as a configuration names them: paths, files and prepared stores."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.dataset import AtomicDataset, MixedDataset, StructureSet
from escaip.data.readers import ReadReport, expand_paths, open_source
from escaip.data.store import Store, is_store, label_counts
from escaip.data.structure import AtomicData
from escaip.errors import ConfigError, DataError
from escaip.files import sample_levels

SetSpec = dict[str, Any]
DataSpec = str | list[str] | SetSpec
WHOLE = "all"
BASE = "base"
"""Name of a set that is replayed and has none."""
_MAX_VERIFIED = 4 << 30
"""Bytes up to which a store's checksums are compared when it is opened for training."""

_log = logging.getLogger(__name__)


@dataclass
class SetOpener:
    """Opens sets; its settings hold for all of them.

    Attributes:
        fixed_atoms: see ``AtomicDataset``.
        seed: of rotations.
        required: labels that every structure must carry.
        verify: compare the checksums of stores; None for those up to 4 GiB.
        reports: counts of structures read and skipped, by place in the configuration, for sets read from files.
        levels: level of theory that a store, or the structures of files, state, by place.
    """

    fixed_atoms: str = "free_only"
    seed: int = 0
    required: tuple[str, ...] = ()
    verify: bool | None = None
    reports: dict[str, ReadReport] = field(default_factory=dict)
    levels: dict[str, str] = field(default_factory=dict)
    _verified: set[Path] = field(default_factory=set)
    _opened: dict[Path, Store] = field(default_factory=dict)

    def open(self, place: str, spec: SetSpec, part: str, *, code: int = -1, rotate: bool = False) -> StructureSet:
        """Returns the structures of one set; of a divided store, those of the split that is named like ``part``.

        ``place`` is that in the configuration, for messages: ``data.train.oc20``. ``code`` and ``rotate`` are those of
        ``AtomicDataset``.
        """
        stores = self._stores(place, spec)
        how: dict[str, Any] = {"fixed_atoms": self.fixed_atoms, "rotate": rotate, "seed": self.seed, "code": code}
        if not stores:
            return AtomicDataset(self._read(place, spec), **how)
        levels = {str(store.path): str(store.manifest.get("level_of_theory", "")) for store in stores}
        if len(known := {level for level in levels.values() if level}) > 1:
            text = ", ".join(f"{name} ({level})" for name, level in levels.items() if level)
            raise DataError(
                f"{text}: energies of different levels of theory need references of their own; name the sets "
                "(data.train: {A: {path: ...}, B: {path: ...}}) instead of listing them"
            )
        self.levels[place] = next(iter(known), "")
        members: dict[str, StructureSet] = {}
        for store in stores:
            chosen = _split_indices(place, store, spec.get("split"), part)
            _require(place, store, chosen, self.required)
            members[str(store.path)] = AtomicDataset(store, chosen, **how)
        return next(iter(members.values())) if len(members) == 1 else MixedDataset(members)

    def has_split(self, spec: SetSpec, part: str) -> bool:
        """Whether a set is a divided store that has a split of this name."""
        if set(spec) - {"path", "format"}:
            return False
        return all(is_store(file) and part in self._store(file).splits for file in expand_paths(spec["path"]))

    def _store(self, path: Path) -> Store:
        """Returns a store, opened once: training, validation and test sets share its maps."""
        if path not in self._opened:
            self._opened[path] = Store(path)
        return self._opened[path]

    def _stores(self, place: str, spec: SetSpec) -> list[Store]:
        """Returns the prepared stores that the paths are; none when they are files to read."""
        files = expand_paths(spec["path"])
        prepared = [is_store(file) for file in files]
        others = set(spec) - {"path", "format", "split"}
        if not any(prepared) or others or spec.get("format") not in (None, "store"):
            if "split" in spec:
                raise ConfigError(f"{place}: split: only a prepared store has splits; use data.split to divide files")
            return []
        if not all(prepared):
            raise ConfigError(f"{place}: mixes prepared stores with other files; prepare those as well")
        stores = [self._store(file) for file in files]
        for store in stores:
            wanted = store.nbytes <= _MAX_VERIFIED if self.verify is None else self.verify
            if wanted and store.path not in self._verified:
                store.verify()
                self._verified.add(store.path)
        return stores

    def _read(self, place: str, spec: SetSpec) -> list[AtomicData]:
        report = self.reports[place] = ReadReport()
        structures = list(open_source(report=report, required_labels=self.required, **spec))
        if not structures:
            raise DataError(
                f"{place}: 0 structures in {spec['path']} ({report.summary()}); check index, subset and on_error"
            )
        _log.info("%s: %s", place, report.summary())
        given = spec["path"]
        report.levels |= sample_levels(map(os.fspath, given if isinstance(given, list | tuple) else [given]))
        self.levels[place] = report.level_of_theory(place)
        return structures


def _split_indices(place: str, store: Store, split: str | None, part: str) -> NDArray[np.int64] | None:
    """Returns the positions of the split named, else of the one named like the part; None for the whole store."""
    if split == WHOLE or (split is None and store.splits == [WHOLE]):
        return None
    if (split or part) not in store.splits:
        raise ConfigError(
            f"{place}: {store.path} has no split {split or part!r}; it has {', '.join(store.splits)}: write "
            f"{{path: {store.path}, split: NAME}}, or split: all for everything"
        )
    return store.split_indices(split or part)


def _require(place: str, store: Store, chosen: NDArray[np.int64] | None, required: Sequence[str]) -> None:
    labels = store.index["labels"] if chosen is None else store.index["labels"][chosen]
    counts = label_counts(labels, store.labels)
    for label in required:
        if lacking := len(labels) - counts.get(label, 0):
            raise DataError(
                f"{place}: {lacking} of {len(labels)} structures in {store.path} have no {label}, which "
                "required_labels asks for; drop it from required_labels to train on the others"
            )


def replayed_sets(replay: DataSpec | None, labels: str) -> dict[str, SetSpec]:
    """Returns sets that are replayed by name; empty options stand for the structures of the training set."""
    if replay is None:
        return {BASE: {}} if labels == "self" else {}
    return {name or BASE: spec for name, spec in named_sets("data.replay", replay).items()}


def named_sets(place: str, spec: DataSpec | None) -> dict[str, SetSpec]:
    """Returns sets by name, each with its ``path``; a single one has the name ``""``."""
    if spec is None:
        return {}
    named = spec if isinstance(spec, Mapping) and "path" not in spec else {"": spec}
    sets = {name: {"path": value} if isinstance(value, str | list) else value for name, value in named.items()}
    if not sets or not all(isinstance(value, Mapping) and "path" in value for value in sets.values()):
        raise ConfigError(f"{place}: has no path; write {{path: FILE, ...}}, or sets by name: {{A: {{path: ...}}}}")
    return {name: dict(value) for name, value in sets.items()}
