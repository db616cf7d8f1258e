"""The data of a training run: reading, splitting, statistics and loaders, with plain arguments for LightningCLI."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from escaip.data.dataset import AtomicDataset, MixedDataset, StructureSet
from escaip.data.loader import START_METHODS, BatchLoader
from escaip.data.sampler import OVERSIZED, BudgetBatchSampler, Quota, Sampling, estimate_edges
from escaip.data.sets import BASE, DataSpec, SetOpener, SetSpec, named_sets, replayed_sets
from escaip.data.splits import PARTS, SplitSettings, divide, nested_subset, parse_train_size
from escaip.data.statistics import Statistics, TrainingSums
from escaip.data.validation import check_choice
from escaip.errors import ConfigError

_CHOICES = {
    "scale": ("shared", "per_set"), "oversized": OVERSIZED, "start_method": START_METHODS,
    "replay_labels": ("file", "self"),
}  # fmt: skip
_MAX_HELD_OUT = 0.1  # of a replayed set
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
        _check_choices(self.hparams)
        specs = {"train": train, "val": val, "test": test}
        self._sets = {part: named_sets(f"data.{part}", spec) for part, spec in specs.items()}
        self._split, self._sampling = SplitSettings.parse(split), Sampling.parse(sampling)
        self.scale = scale
        if sampling is not None and not self._mixed:
            raise ConfigError("sampling: needs several sets by name (data.train: {A: {path: ...}, B: {path: ...}})")
        self._sampling.check(list(self._sets["train"]))
        self._replay, self._relabel = replayed_sets(replay, replay_labels), replay_labels == "self"
        self._ratio = self._replay_ratio(replay_share)
        self._names = [*self._sets["train"], *self._replay]
        self._train_size = parse_train_size(train_size, mixed=self._mixed)
        self._taken: list[str] = []
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


def _check_choices(settings: Mapping[str, Any]) -> None:
    if all(settings[name] is None for name in ("batch_size", "max_atoms", "max_edges")):
        raise ConfigError("data: give max_atoms (and max_edges), or batch_size")
    for name, allowed in _CHOICES.items():
        if settings[name] is not None:
            check_choice(name, settings[name], allowed)


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
