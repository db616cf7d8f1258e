"""The sets of a training run, as a configuration names them: files, prepared stores, several of them, or mixtures."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from escaip.data.dataset import AtomicDataset
from escaip.data.mixing import MixedDataset, StructureSet, check_poolable
from escaip.data.readers import ReadReport, expand_paths, open_source
from escaip.data.splits import SplitSettings, make_split
from escaip.data.store import Store
from escaip.data.store_writer import MANIFEST
from escaip.errors import ConfigError, DataError

DataSpec = str | list[str] | dict[str, Any]
WHOLE = "all"
_MAX_VERIFIED = 4 << 30
"""Bytes up to which a store's checksums are compared when it is opened for training."""

_log = logging.getLogger(__name__)


@dataclass
class SetOpener:
    """Opens sets, with what holds for all of them.

    Attributes:
        fixed_atoms: see :class:`AtomicDataset`.
        seed: of rotations and splits.
        required: labels that every structure must carry.
        verify: compare the checksums of stores; None for those up to 4 GiB.
        reports: what was read and skipped, by place in the configuration, for sets read from files.
        levels: level of theory that a store states, by place.
    """

    fixed_atoms: str = "free_only"
    seed: int = 0
    required: tuple[str, ...] = ()
    verify: bool | None = None
    reports: dict[str, ReadReport] = field(default_factory=dict)
    levels: dict[str, str] = field(default_factory=dict)
    _verified: set[str] = field(default_factory=set)
    _opened: dict[str, Store] = field(default_factory=dict)

    def open(self, place: str, spec: DataSpec, part: str, *, code: int = -1, rotate: bool = False) -> StructureSet:
        """The structures of one set.

        Args:
            place: where it stands in the configuration, for messages: ``data.train.oc20``.
            spec: a path, a list of paths, or a mapping ``{path, split, format, keys, ...}``.
            part: ``train``, ``val``, ``test`` or ``predict``; of a divided store, the split of that name.
            code: which set of a mixture it is.
            rotate: see :class:`AtomicDataset`.

        Raises:
            DataError: unreadable data, a missing label, 0 structures.
            ConfigError: no path, or a split that the store does not have.
        """
        options: dict[str, Any] = {"path": spec} if isinstance(spec, str | list) else dict(spec)
        if "path" not in options:
            raise ConfigError(f"{place}: has no path; write {{path: FILE, ...}}")
        required = () if part == "predict" else self.required
        stores = self._stores(place, options)
        if stores is None:
            structures = self._read(place, options, required)
            return AtomicDataset(structures, fixed_atoms=self.fixed_atoms, rotate=rotate, seed=self.seed, code=code)
        members: dict[str, StructureSet] = {}
        for name, store in stores.items():
            chosen = store_split(place, store, options.get("split"), part)
            _require(place, store, chosen, required)
            members[name] = AtomicDataset(
                store, chosen, fixed_atoms=self.fixed_atoms, rotate=rotate, seed=self.seed, code=code
            )
        levels = {name: str(store.manifest.get("level_of_theory", "")) for name, store in stores.items()}
        check_poolable(levels)
        self.levels[place] = max(levels.values())
        return next(iter(members.values())) if len(members) == 1 else MixedDataset(members)

    def has_split(self, spec: DataSpec, part: str) -> bool:
        """Whether a set is a divided store that has a split of this name, so that nothing else need be named."""
        options: dict[str, Any] = {"path": spec} if isinstance(spec, str | list) else dict(spec)
        if "path" not in options or set(options) - {"path", "format"}:
            return False
        files = expand_paths(options["path"])
        return all(_is_store(file) and part in self._store(file).splits for file in files)

    def _store(self, path: Path) -> Store:
        """A store, opened once: training, validation and test sets share its maps."""
        if str(path) not in self._opened:
            self._opened[str(path)] = Store(path)
        return self._opened[str(path)]

    def divide(self, place: str, spec: DataSpec, settings: SplitSettings, **how: Any) -> dict[str, StructureSet]:
        """Training, validation and test sets out of one; those of size 0 are left out."""
        rotate = how.pop("rotate", False)
        whole = self.open(place, spec, "train", **how)
        split = make_split(whole.groups, settings, seed=self.seed)
        parts: dict[str, StructureSet] = {"train": whole.subset(split.train, rotate=rotate)}
        for part in ("val", "test"):
            indices = getattr(split, part)
            if len(indices):
                parts[part] = whole.subset(indices)
        return parts

    def _stores(self, place: str, options: Mapping[str, Any]) -> dict[str, Store] | None:
        """The prepared stores that the paths are, by name; None when they are files to read."""
        files = expand_paths(options["path"])
        prepared = [_is_store(file) for file in files]
        others = set(options) - {"path", "format", "split"}
        if not any(prepared) or others or options.get("format") not in (None, "store"):
            if "split" in options:
                raise ConfigError(f"{place}: split: only a prepared store has splits; use data.split to divide files")
            return None
        if not all(prepared):
            raise ConfigError(f"{place}: mixes prepared stores with other files; prepare those as well")
        stores = {str(file): self._store(file) for file in files}
        for name, store in stores.items():
            wanted = store.nbytes <= _MAX_VERIFIED if self.verify is None else self.verify
            if wanted and name not in self._verified:
                store.verify()
                self._verified.add(name)
        return stores

    def _read(self, place: str, options: Mapping[str, Any], required: tuple[str, ...]) -> list[Any]:
        report = self.reports[place] = ReadReport()
        structures = list(open_source(report=report, required_labels=required, **options))
        if not structures:
            raise DataError(
                f"{place}: 0 structures in {options['path']} ({report.summary()}); check index, subset and on_error"
            )
        _log.info("%s: %s", place, report.summary())
        return structures


def _is_store(path: Path) -> bool:
    return path.is_dir() and (path / MANIFEST).is_file()


def store_split(place: str, store: Store, split: str | None, part: str) -> np.ndarray | None:
    """Positions in a store of the split asked for; None for all of it.

    Args:
        place: for messages.
        store: the store.
        split: its name, or ``all``; None for the split named like the part.
        part: the part.

    Raises:
        ConfigError: the store has no such split.
    """
    if split == WHOLE or (split is None and store.splits == [WHOLE]):
        return None
    name = split or part
    if name not in store.splits:
        raise ConfigError(
            f"{place}: {store.path} has no split {name!r}; it has {', '.join(store.splits)}: write "
            f"{{path: {store.path}, split: NAME}}, or split: all for everything"
        )
    return store.split_indices(name)


def named_sets(place: str, spec: DataSpec | None) -> dict[str, DataSpec]:
    """Sets by name; a single one has the name ``""``.

    Raises:
        ConfigError: a mapping that is neither a set nor sets by name.
    """
    if spec is None:
        return {}
    if not isinstance(spec, Mapping) or "path" in spec:
        return {"": spec}
    named = [
        isinstance(value, str | list) or (isinstance(value, Mapping) and "path" in value) for value in spec.values()
    ]
    if not spec or not all(named):
        raise ConfigError(f"{place}: has no path; write {{path: FILE, ...}}, or sets by name: {{A: {{path: ...}}}}")
    return dict(spec)


def _require(place: str, store: Store, chosen: np.ndarray | None, required: Iterable[str]) -> None:
    bits = {"energy": 1, "forces": 2, "stress": 4}
    labels = store.index["labels"] if chosen is None else store.index["labels"][chosen]
    for label in required:
        lacking = int(np.count_nonzero(labels & bits[label] == 0))
        if lacking:
            raise DataError(
                f"{place}: {lacking} of {len(labels)} structures in {store.path} have no {label}, which "
                "required_labels asks for; drop it from required_labels to train on the others"
            )
