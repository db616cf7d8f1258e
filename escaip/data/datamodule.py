"""The data of a training run: reading, splitting, statistics and loaders, with plain arguments for LightningCLI."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from escaip.data.dataset import AtomicDataset, MixedDataset, StructureSet
from escaip.data.loader import START_METHODS, BatchLoader
from escaip.data.readers import ReadReport, expand_paths, open_source
from escaip.data.sampler import OVERSIZED, BudgetBatchSampler, Quota, Sampling, estimate_edges
from escaip.data.splits import PARTS, SplitSettings, divide, nested_subset, parse_train_size
from escaip.data.statistics import Statistics, TrainingSums
from escaip.data.store import Store, is_store, label_counts
from escaip.data.structure import AtomicData
from escaip.data.validation import check_choice
from escaip.errors import ConfigError, DataError

SetSpec = dict[str, Any]
DataSpec = str | list[str] | SetSpec
WHOLE = "all"
BASE = "base"
"""Name of a set that is replayed and has none."""
_LABELS = ("file", "self")
_MAX_HELD_OUT = 0.1  # of a replayed set
_MAX_VERIFIED = 4 << 30
"""Bytes up to which a store's checksums are compared when it is opened for training."""

_log = logging.getLogger(__name__)


class AtomicDataModule(LightningDataModule):
    """Training, validation and test sets.

    Each set is a path, a list of paths, or a mapping ``{path, format, keys, units, index, ...}`` of arguments of
    ``escaip.data.readers.open_source``. A prepared store is used in place (``split`` names a part of a divided
    one; the parts ``train``, ``val`` and ``test`` are found by themselves), anything else is read into memory. Several
    sets are mixed when they are given names: ``{A: {path: ...}, B: {path: ...}}``; each then has element references
    of its own.

    Attributes:
        datasets: the sets that exist, by part, after ``setup``.
        scale: how the force scale of a mixture is chosen.
    """

    def __init__(
        self,
        train: DataSpec | None = None,
        val: DataSpec | None = None,
        test: DataSpec | None = None,
        *,
        split: dict[str, Any] | None = None,
        train_size: int | float | None = None,
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        num_neighbors: int | None = 30,
        oversized: str = "error",
        required_labels: tuple[str, ...] = ("energy", "forces"),
        fixed_atoms: str = "free_only",
        isolated_energies: dict[str, Any] | None = None,
        rotate: bool = False,
        neighbor_cutoff: float | None = None,
        num_workers: int = 0,
        start_method: str | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        sampling: dict[str, Any] | None = None,
        scale: str = "shared",
        replay: DataSpec | None = None,
        replay_labels: str = "file",
        replay_share: float | None = None,
        verify: bool | None = None,
    ) -> None:
        """Describes the data; nothing is read before ``setup``.

        Args:
            train: training set.
            val: validation set; when absent, part of ``train`` by ``split``.
            test: test set; when absent, part of ``train`` if ``split`` asks for one.
            split: ``{by: group | structure, val: fraction or number, test: ...}``, default ``{val: 0.1}`` by group.
            train_size: take part of the training set, once ``split`` has made the others: a fraction of its structures
                up to 1.0, or a number of them, at most; groups stay whole unless ``split`` is by structure. See
                ``escaip.data.splits.nested_subset``.
            batch_size: structures per batch and process; or else
            max_atoms: atoms per batch and process, and
            max_edges: edges per batch and process, estimated from
            num_neighbors: neighbors per atom of the model (``k``).
            oversized: policy for a structure larger than the budget: ``error``, ``skip`` or ``own_batch``.
            required_labels: labels that every structure of train, val and test must carry.
            fixed_atoms: ``free_only`` leaves constrained atoms out of losses, metrics and the force scale; ``all`` not.
            isolated_energies: eV of isolated atoms by symbol or atomic number, as element references; for a mixture by
                set.
            rotate: random rotations of the training structures, for direct force heads.
            neighbor_cutoff: Å, search neighbors in the loader's workers instead of on the model's device.
            num_workers: loader processes per process.
            start_method: how they start: ``fork``, ``spawn`` or ``forkserver``; default the platform's.
            seed: of split, order and rotations.
            cache_dir: where statistics are kept; default nowhere (those of a store come from its index at once).
            sampling: for a mixture, ``{weights: {SET: share}}`` or ``{temperature: T}``, and ``epoch_size``; see
                ``escaip.data.sampler.Sampling``.
            scale: for a mixture, ``shared`` or ``per_set`` force scale; see ``escaip.Potential.set_statistics``.
            replay: data of the potential that a training starts from, in the form of ``train``, mixed into each epoch
                under their own name, or ``base``. They keep the atomic energies of the potential.
            replay_labels: ``file``, or ``self`` for the potential's own predictions: of ``replay``, or without it of
                the training structures.
            replay_share: of the structures of an epoch, default 0.3; of validation at most a tenth of the replayed set.
            verify: compare the checksums of stores; default for those up to 4 GiB.

        Raises:
            ConfigError: an argument that cannot be used.
        """
        super().__init__()
        self.save_hyperparameters(logger=False)
        specs = {"train": train, "val": val, "test": test}
        self._sets = {part: named_sets(f"data.{part}", spec) for part, spec in specs.items()}
        self._split, self._sampling = SplitSettings.parse(split), Sampling.parse(sampling)
        check_choice("scale", scale, ("shared", "per_set"))
        self.scale = scale
        if sampling is not None and not self._mixed:
            raise ConfigError("sampling: needs several sets by name (data.train: {A: {path: ...}, B: {path: ...}})")
        self._sampling.check(list(self._sets["train"]))
        check_choice("replay_labels", replay_labels, _LABELS)
        self._replay, self._relabel = replayed_sets(replay, replay_labels), replay_labels == "self"
        self._ratio = self._replay_ratio(replay_share)
        self._names = [*self._sets["train"], *self._replay]
        self._train_size = parse_train_size(train_size, mixed=self._mixed)
        self._taken: list[str] = []
        if batch_size is None and max_atoms is None and max_edges is None:
            raise ConfigError("data: give max_atoms (and max_edges), or batch_size")
        check_choice("oversized", oversized, OVERSIZED)
        if start_method is not None:
            check_choice("start_method", start_method, START_METHODS)
        self._num_neighbors, self._by_edges = num_neighbors, max_edges is not None
        self._batching: dict[str, Any] = {
            "batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges, "oversized": oversized,
        }  # fmt: skip
        self._loading: dict[str, Any] = {
            "num_workers": num_workers, "start_method": start_method, "neighbor_cutoff": neighbor_cutoff,
        }  # fmt: skip
        self._opener = SetOpener(fixed_atoms, seed, tuple(required_labels), verify)
        self._isolated = isolated_energies
        if not self._mixed:
            parse_isolated_energies(isolated_energies)
        self._rotate, self._seed, self._cache_dir = rotate, seed, cache_dir
        self._statistics: Statistics | dict[str, Statistics] | None = None
        self._with_replay: set[str] = set()
        self.datasets: dict[str, StructureSet] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads what ``stage`` needs (``fit``, ``validate``, ``test``; None for all), once.

        Raises:
            DataError: unreadable data, a missing label, an impossible split, 0 structures.
            ConfigError: no path for a set that is needed.
        """
        if stage in ("fit", None) and not self._sets["train"]:
            raise ConfigError("data.train: name the training data (--data.train PATH)")
        module = getattr(self.trainer, "lightning_module", None)
        if self._replay and module is not None and getattr(module, "init_from", None) is None:
            raise ConfigError("data.replay keeps what a potential has learned: name the potential in model.init_from")
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        wanted = needed[stage] if stage is not None else PARTS
        for part in wanted:
            self._open(part)
        if self._replay and stage != "test":
            self._add_replay(wanted)
        for part in wanted:
            if part not in self.datasets and stage not in ("fit", None):
                raise ConfigError(f"data.{part}: name the data (--data.{part} PATH) or let data.split make it")
        if stage in ("fit", None):
            self._statistics = self._statistics or self._fit_statistics()

    @property
    def statistics(self) -> Statistics | dict[str, Statistics]:
        """Statistics of the training set, or of each set of a mixture by name.

        Raises:
            ConfigError: before ``setup("fit")``.
        """
        if self._statistics is None:
            raise ConfigError("data.statistics: only known after setup('fit') with data.train")
        return self._statistics

    @property
    def shares(self) -> dict[str, float] | None:
        """Structures of each set of a mixture in an epoch; None for a single set."""
        data = self.datasets.get("train")
        if not self._mixed or not isinstance(data, MixedDataset):
            return None
        sizes = {name: len(member) for name, member in data.members.items()}
        return {name: float(count) for name, count in (self._draws(sizes) or sizes).items()}

    @property
    def replayed(self) -> list[str]:
        """Names of the sets that are replayed."""
        return list(self._replay)

    def train_dataloader(self) -> BatchLoader:
        """Returns a loader that shuffles, repacks every epoch and can be resumed."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """Returns a loader in order; an empty list when there is no validation set."""
        return self._loader("val", shuffle=False) if "val" in self.datasets else []

    def test_dataloader(self) -> BatchLoader:
        """Returns a loader in order."""
        return self._loader("test", shuffle=False)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run compares: structures of the sets it reads, and the level of theory."""
        contents = {
            part: f"{len(data)} structures ({data.fingerprint[:12]})"
            for part, data in self.datasets.items() if part != "test"
        }  # fmt: skip
        return {**contents, "level_of_theory": self.level_of_theory}

    def summary(self) -> str:
        """Returns a few lines: structures and labels of each set, and structures left out."""
        lines = [
            f"{part}: {len(data)} structures, {int(data.natoms.sum())} atoms" for part, data in self.datasets.items()
        ]
        lines += self._taken
        reports = self._opener.reports.items()
        lines += [
            f"{place}: {report.summary()}"
            for place, report in reports
            if report.skipped or report.filtered or report.absent
        ]
        if self._statistics is not None:
            single = {"train": self._statistics} if isinstance(self._statistics, Statistics) else self._statistics
            for name, statistics in single.items():
                counts = ", ".join(f"{count} {label}" for label, count in statistics.label_counts.items())
                lines.append(f"labels in {name}: {counts}")
        if self._mixed and self.shares is not None:
            lines.append("an epoch takes " + ", ".join(f"{int(n)} of {name}" for name, n in self.shares.items()))
        return "\n".join(lines)

    @property
    def level_of_theory(self) -> str:
        """Level of theory that the training data state; empty where none do."""
        places = {name: _place("replay" if name in self._replay else "train", name) for name in self._names}
        stated = {name: self._opener.levels.get(place, "") for name, place in places.items()}
        if not self._mixed:
            return next(iter(stated.values()), "")
        return "; ".join(f"{name}: {level}" for name, level in stated.items() if level)

    @property
    def card(self) -> dict[str, Any]:
        """What a model trained on these data states of them: structures by part, licences and citations of stores."""
        manifests = [store.manifest for store in self._opener._opened.values()]
        licences = {str(manifest["licence"]): None for manifest in manifests if "licence" in manifest}
        citations = {str(text): None for manifest in manifests for text in manifest.get("citation", ())}
        found = {"data": {part: f"{len(data)} structures" for part, data in self.datasets.items()}}
        return {**found, **{name: [*one] for name, one in (("licence", licences), ("citation", citations)) if one}}

    @property
    def _mixed(self) -> bool:
        return "" not in self._sets["train"] and bool(self._sets["train"])

    def _open(self, part: str) -> None:
        """Opens one part, by its name or out of the training data."""
        if part in self.datasets:
            return
        named, train = self._sets[part], self._sets["train"]
        if self._mixed and set(named) - set(train):
            raise ConfigError(
                f"data.{part}: names {', '.join(named) or 'no set'}; the training sets are {', '.join(train)}: "
                f"write {{{next(iter(train))}: {{path: ...}}}}"
            )
        if not named and self._in_stores(part):
            named = train
        # Sets that have to come out of the training data.
        made = [key for key in ("val", "test") if not self._sets[key] and not self._in_stores(key)]
        sizes = {key: getattr(self._split, key) if key in made else 0 for key in ("val", "test")}
        if named and not (part == "train" and any(sizes.values())):
            rotate = self._rotate and part == "train"
            self._keep(part, {name: self._open_set(part, name, spec, rotate) for name, spec in named.items()})
        elif train and any(sizes.values()) and "train" not in self.datasets:
            self._divide(SplitSettings(self._split.by, **sizes))

    def _open_set(self, part: str, name: str, spec: SetSpec, rotate: bool = False) -> StructureSet:
        code = self._names.index(name) if self._mixed else -1
        return self._opener.open(_place(part, name), spec, part, code=code, rotate=rotate)

    def _in_stores(self, part: str) -> bool:
        """Whether the training data are stores that are divided into this part too."""
        return all(self._opener.has_split(spec, part) for spec in self._sets["train"].values())

    def _divide(self, settings: SplitSettings) -> None:
        """Makes the sets that were not named from the training data, within each set of a mixture."""
        made: dict[str, dict[str, StructureSet]] = {part: {} for part in PARTS}
        for name, spec in self._sets["train"].items():
            whole = self._open_set("train", name, spec)
            codes = divide(*whole.group_codes, settings, seed=self._seed)
            for part, sets in made.items():
                indices = np.flatnonzero(codes == PARTS.index(part))
                if len(indices):
                    sets[name] = whole.subset(indices, rotate=self._rotate and part == "train")
        for part, sets in made.items():
            if sets:
                self._keep(part, sets)

    def _keep(self, part: str, sets: dict[str, StructureSet]) -> None:
        if part == "train" and self._train_size is not None:
            sets = {name: self._take(_place(part, name), data) for name, data in sets.items()}
        self.datasets[part] = MixedDataset(sets) if self._mixed else sets[""]

    def _replay_ratio(self, share: float | None) -> float:
        """Returns how many structures are replayed for each new one."""
        train = self._sets["train"]
        if share is not None and not self._replay:
            raise ConfigError("data.replay_share: nothing is replayed: give data.replay, or data.replay_labels self")
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"data.replay_share: {share} is not between 0 and 1")
        if self._replay and "" in train:
            raise ConfigError("data.replay needs a name for the new set: write data.train: {NAME: {path: ...}}")
        if both := [name for name in self._replay if name in train]:
            raise ConfigError(f"data.replay: {both[0]} is a set of data.train: give the replayed set another name")
        share = 0.3 if share is None else share
        return share / (1.0 - share)

    def _add_replay(self, wanted: Sequence[str]) -> None:
        """Adds the replayed sets to training and validation, where their share is that of an epoch if it can be."""
        if self._with_replay.issuperset(wanted):
            return
        new = {
            part: MixedDataset({name: member for name, member in data.members.items() if name not in self._replay})
            for part, data in self.datasets.items() if part != "test" and isinstance(data, MixedDataset)
        }  # fmt: skip
        num_val = max(1, round(self._ratio * len(new["val"]))) if "val" in new else 0
        found: dict[str, dict[str, StructureSet]] = {part: {} for part in PARTS}
        if self._replay == {BASE: {}}:
            for part, data in new.items():
                count = min(num_val, len(data)) if part == "val" else len(data)
                found[part][BASE] = data.subset(np.linspace(0, len(data) - 1, count).round().astype(np.int64))
        else:
            self._open_replay(found, num_val)
        for part, data in new.items():
            if part not in wanted:
                continue
            sets = found[part]
            if self._relabel:
                rotate = self._rotate and part == "train"
                sets = {name: self._labelled_by_base(name, member, rotate) for name, member in sets.items()}
            self.datasets[part] = MixedDataset({**data.members, **sets})
        self._with_replay.update(wanted)

    def _open_replay(self, found: dict[str, dict[str, StructureSet]], num_val: int) -> None:
        """Reads the replayed sets and divides them among parts, with at most ``num_val`` structures for validation."""
        opener = replace(self._opener, required=()) if self._relabel else self._opener
        wholes = {
            name: opener.open(_place("replay", name), spec, "train", code=self._names.index(name))
            for name, spec in self._replay.items()
        }
        counts = Sampling(epoch_size=max(1, num_val)).draws({name: len(whole) for name, whole in wholes.items()}) or {}
        for name, whole in wholes.items():
            count = max(1, min(counts[name], round(_MAX_HELD_OUT * len(whole)))) if num_val else 0
            codes = divide(*whole.group_codes, SplitSettings(self._split.by, val=count), seed=self._seed)
            for part, sets in found.items():
                chosen = np.flatnonzero(codes == PARTS.index(part))
                if len(chosen):
                    sets[name] = whole.subset(chosen, rotate=self._rotate and part == "train")

    def _labelled_by_base(self, name: str, data: StructureSet, rotate: bool) -> AtomicDataset:
        """Returns structures with labels that the potential predicts that the training starts from."""
        module: Any = getattr(self.trainer, "lightning_module", None)
        if not hasattr(module, "relabel"):
            raise ConfigError("data.replay_labels self: only a PotentialModule in a trainer knows the potential")
        structures, origin = module.relabel(data, name)
        how: dict[str, Any] = {"fixed_atoms": self._opener.fixed_atoms, "rotate": rotate, "seed": self._seed}
        labelled = AtomicDataset(structures, code=self._names.index(name), **how)
        labelled.fingerprint = f"{data.fingerprint} labelled by {origin}"  # predictions differ in their last bits
        return labelled

    def _draws(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """Returns the structures of each set in an epoch; None when an epoch is simply every structure once."""
        new = {name: size for name, size in sizes.items() if name not in self._replay}
        draws = self._sampling.draws(new)
        if not self._replay:
            return draws
        draws = draws or new
        count = max(1, round(self._ratio * sum(draws.values())))
        return {**draws, **(Sampling(epoch_size=count).draws({name: sizes[name] for name in self._replay}) or {})}

    def _take(self, place: str, data: StructureSet) -> StructureSet:
        """Returns the part of a training set that ``train_size`` asks for."""
        assert self._train_size is not None
        chosen = nested_subset(data, self._train_size, by=self._split.by, seed=self._seed, place=place)
        if self._train_size > len(data):
            _log.warning("%s: train_size: %s, but there are %d structures", place, self._train_size, len(data))
        self._taken.append(f"{place}: {len(chosen)} of {len(data)} structures by train_size: {self._train_size}")
        return data.subset(chosen, rotate=self._rotate)

    def _loader(self, part: str, *, shuffle: bool) -> BatchLoader:
        if part not in self.datasets:
            raise ConfigError(f"data.{part}: name the data (--data.{part} PATH) or let data.split make it")
        data, trainer, edges = self.datasets[part], self.trainer, None
        if self._by_edges:
            edges = estimate_edges(data.natoms, data.periodic, self._num_neighbors, data.num_edges)
        sampler = BudgetBatchSampler(
            data.natoms,
            num_edges=edges,
            names=_Names(data),
            shuffle=shuffle,
            seed=self._seed,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
            quotas=self._quotas(data) if shuffle and self._mixed and isinstance(data, MixedDataset) else None,
            **self._batching,
        )
        if sampler.skipped:
            _log.warning("data.%s: %d structures larger than the budget are left out", part, len(sampler.skipped))
        return BatchLoader(data, sampler, train_size=self._train_size if part == "train" else None, **self._loading)

    def _quotas(self, data: MixedDataset) -> list[Quota] | None:
        """Returns the structures that an epoch draws of each set; None when it is every structure once."""
        draws = self._draws({name: len(member) for name, member in data.members.items()})
        if draws is None:
            return None
        return [Quota(*span, draws[name]) for name, span in zip(data.members, pairwise(data.starts), strict=True)]

    def _fit_statistics(self) -> Statistics | dict[str, Statistics]:
        data = self.datasets["train"]
        if not self._mixed or not isinstance(data, MixedDataset):
            return self._fit_set(data, parse_isolated_energies(self._isolated))
        isolated = self._isolated or {}
        unknown = set(isolated) - set(self._sets["train"])
        if unknown:
            raise ConfigError(
                f"isolated_energies: {', '.join(map(str, unknown))}: for a mixture write them by set, "
                f"{{{next(iter(data.members))}: {{H: ...}}}}"
            )
        return {
            name: self._fit_set(member, parse_isolated_energies(isolated.get(name)))
            for name, member in data.members.items()
        }

    def _fit_set(self, data: StructureSet, isolated: dict[int, float] | None) -> Statistics:
        """Fits statistics of one set, kept in ``cache_dir`` under a hash of the structures."""
        cache = None
        if self._cache_dir is not None:
            key = json.dumps([data.fingerprint, sorted((isolated or {}).items())])
            cache = Path(self._cache_dir) / f"statistics-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
            if cache.is_file():
                # Earlier versions did not write whether references were given.
                return replace(Statistics.load(cache), references_fitted=isolated is None)
        sums = TrainingSums()
        data.accumulate(sums)
        statistics = sums.statistics(isolated, require_energy=False)
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            statistics.save(cache)
        return statistics


def _place(part: str, name: str) -> str:
    return f"data.{part}.{name}" if name else f"data.{part}"


class _Names(Sequence[str]):
    """Structure names, read only when a message needs one."""

    def __init__(self, data: StructureSet) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        return self._data.structure_id(int(index))


def parse_isolated_energies(energies: Mapping[Any, float] | None) -> dict[int, float] | None:
    """Returns energies by atomic number, from keys that are symbols or numbers."""
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
