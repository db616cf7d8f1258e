"""Fine-tuning: a training that starts from a potential instead of random weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escaip.data import AtomicData, Statistics
from escaip.data.dataset import MixedDataset, evenly
from escaip.data.structure import missing_label
from escaip.errors import ConfigError
from escaip.files import resolve, sha256
from escaip.models import MAX_ATOMIC_NUMBER, Model, ModelConfig, build_config, kind_of, settings_of
from escaip.potential import Potential, PotentialMetadata
from escaip.potential.atomic_energies import Composition, fit_compositions
from escaip.potential.loading import read_potential
from escaip.potential.potential import ENERGY_BUFFERS
from escaip.types import MAX_CHARGE, TARGETS

FREE_SETTINGS = (
    "attention_backend", "dropout", "attention_dropout", "node_dropout", "edge_dropout", "scalar_dropout",
    "vector_dropout", "stochastic_depth",
)  # fmt: skip
"""Settings that may differ between weights and the run that trains them: they do not change the function."""
HEADS = "num_energy_heads"
SWITCHES = ("charge", "spin", HEADS)
"""Settings that may be switched on, since their embeddings start at zero, and the number of heads, which are copied."""

_MAX_STRUCTURES = 10_000  # of each set, for the refit


def contradictions(config: ModelConfig, given: Mapping[str, Any], switches: Sequence[str] = SWITCHES) -> list[str]:
    """Returns the names of given settings that the weights of a model do not allow."""
    have = _settings(config)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    changed = [name for name, value in plain.items() if value != have.get(name) and name not in FREE_SETTINGS]
    return [name for name in changed if not (name in switches and (plain[name] is True or name == HEADS))]


def kept_architecture(
    config: ModelConfig,
    place: str,
    options: Mapping[str, Any],
    recipe: Mapping[str, Any],
    switches: Sequence[str] = SWITCHES,
) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings of the model for a training of given weights.

    Args:
        config: of the weights.
        place: their file, for messages.
        options: settings given on the command line.
        recipe: settings of the configuration file; they apply if the weights allow all of them.
        switches: settings that may be switched on, or change.

    Returns:
        All settings, and the names of those of the recipe that the weights do not allow.

    Raises:
        ConfigError: an option that does not exist, or that the weights do not allow.
    """
    have, options, recipe = _settings(config), _expanded(config, options), _expanded(config, recipe)
    unknown = {name: value for name, value in options.items() if name not in have}
    build_config({**settings_of(config), **unknown})  # refuses them
    for name in contradictions(config, options, switches):
        raise _contradiction(name, options[name], config, place)
    other = contradictions(config, recipe, switches)
    return settings_of(build_config({**settings_of(config), **({} if other else recipe), **options})), other


def freeze(model: Model, names: Sequence[str]) -> None:
    """Keeps parts of a model from learning.

    Args:
        model: whose ``parts`` are named.
        names: of parts; ``blocks`` stands for ``blocks.0``, ``blocks.1``, ...

    Raises:
        ConfigError: no such part, or nothing is left to learn.
    """
    parts = model.parts()
    for name in names:
        chosen = [key for key in parts if key == name or key.startswith(f"{name}.")]
        if not chosen:
            raise ConfigError(f"model.freeze: the model has no part {name!r}: choose among {', '.join(parts)}")
        for module in (module for key in chosen for module in parts[key]):
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.freeze names all parts ({', '.join(parts)}): leave out what should learn")


@torch.no_grad()
def start_from(
    potential: Potential,
    path: str,
    statistics: Statistics | Mapping[str, Statistics],
    structures: Any,
    keep: bool,
    device: torch.device,
    init_dataset: str | None = None,
    replayed: Sequence[str] = (),
) -> str:
    """Gives a potential the weights, scale and pair terms of a file, and atomic energies for a training set.

    Its forces are then those of the file to the last bit, and its energies differ by atomic energies and energies of
    charges alone. These are fitted (``fit_compositions``) to the labels less the energy of interaction that the file
    predicts. Elements that the file lacks start from the mean of those that it has. Each set takes energies, scale and
    head of the set of the same name in the file, or of ``init_dataset``.

    Args:
        potential: with the architecture of the file, charge and spin switched on or not, and any number of heads.
        path: a model file or ``example:NAME``.
        statistics: of the training set, or of each set of a mixture by name.
        structures: the training set; of a larger one 10 000, evenly spread.
        keep: keep atomic energies of the file, and fit those that it lacks. Sets without energies keep them too.
        device: where the file predicts.
        init_dataset: the set of the file for sets whose name the file does not know.
        replayed: sets of a mixture that keep atomic energies of the file in any case.

    Returns:
        A line that says what was done.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: another architecture, several sets of energies or heads in the file and no choice among them,
            elements that cannot be added, or energies of isolated atoms beside ``keep``.
    """
    base, given = read_potential(path), settings_of(potential.config)
    for name in contradictions(base.config, given):
        raise _contradiction(name, given.get(name), base.config, path)
    sets = {"": statistics} if isinstance(statistics, Statistics) else dict(statistics)
    if keep and not all(item.references_fitted for item in sets.values()):
        raise ConfigError("data.isolated_energies contradicts model.init_energies keep: leave one of them out")
    potential.check_sets(list(sets))
    known = base.metadata.elements or tuple(range(1, MAX_ATOMIC_NUMBER + 1))
    new = sorted({z for item in sets.values() for z in item.elements}.difference(known))
    kept = [
        keep or name in replayed or (item.references_fitted and not item.label_counts.get("energy", 0))
        for name, item in sets.items()
    ]
    rows = _rows_of(base, path, list(sets), init_dataset, any(kept))
    tables = [getattr(base, name) for name in ENERGY_BUFFERS]
    has_rows = base.element_references.dim() == 2
    tables = [table[rows] if has_rows else table.expand(len(rows), *table.shape).clone() for table in tables]
    heads = _take_heads(base, potential, path, dict(zip(sets, rows, strict=True)))
    _copy_weights(base, potential, new, known, path)

    origin = {"file": Path(path).name, "sha256": sha256(resolve(path)), **base.metadata.to_dict()}
    base.set_metadata(PotentialMetadata())  # accepts elements that were added
    base, elements, said = base.to(device), set[int](), dict[str, list[str]]()
    for (name, item), is_kept, *own in zip(sets.items(), kept, *tables, strict=True):
        members = structures.members[name] if isinstance(structures, MixedDataset) else structures
        had = {z for z in known if not bool(own[0][z].isnan())} if is_kept else set[int]()
        elements |= had.union(item.elements)
        count = _fit_set(base, own, item, had, is_kept, members, potential.config.charge)
        what = "kept" if is_kept else f"refitted to {count} structures" if item.references_fitted else "as given"
        said.setdefault(what, []).append(name)
    single = isinstance(statistics, Statistics)
    for name, table in zip(ENERGY_BUFFERS, tables, strict=True):
        setattr(potential, name, (table[0].nan_to_num(0.0) if single else table).to(potential.device))
    names = potential.metadata.datasets if single else tuple(sets)
    metadata = replace(potential.metadata, elements=tuple(sorted(elements)), datasets=names)
    potential.set_metadata(replace(metadata, provenance={"init_from": origin}))
    line = "; ".join(f"atomic energies {what}{'' if single else ' for ' + ', '.join(of)}" for what, of in said.items())
    return f"start: {path}; {heads}{line}" + (
        f"; new elements {_symbols(new)}, as the mean of the others" if new else ""
    )


def relabel(
    path: str,
    structures: Iterable[AtomicData],
    name: str,
    init_dataset: str | None,
    stress: bool,
    device: torch.device,
) -> tuple[list[AtomicData], str]:
    """Returns copies of structures whose labels are what a file predicts, and the hash of the file.

    Args:
        path: a model file or ``example:NAME``.
        structures: of any set.
        name: of the set in the file whose energies they get; see ``start_from`` for names that the file lacks.
        init_dataset: as in ``start_from``.
        stress: whether conservative potentials predict stress.
        device: where the file predicts.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: several sets in the file and no choice among them.
        UnsupportedElementError: the potential was not trained on an element.
    """
    base = read_potential(path).to(device)
    (row,) = _rows_of(base, path, [name], init_dataset, True)
    base.choose_dataset(base.datasets[row] if base.datasets else None)
    copies = [data.clone() for data in structures]
    for data in copies:
        data.dataset.fill_(-1)
    stress, progress = stress and base.config.is_conservative, sys.stderr.isatty()
    for data, found in zip(copies, base.predict(copies, compute_stress=stress, progress=progress), strict=True):
        for key, target in TARGETS.items():
            label, value = missing_label(target, len(data[key])), found.of_target(key)
            data[key] = label if value is None else torch.as_tensor(value, dtype=torch.float64).view_as(label)
    return copies, sha256(resolve(path))


def _copy_weights(base: Potential, potential: Potential, new: Sequence[int], known: Sequence[int], path: str) -> None:
    """Copies weights and pair terms; new elements start from the mean of known ones, other embeddings at zero."""
    if new and getattr(base.model, "density", None) is not None:
        raise ConfigError(
            f"{path} has a linear energy (density_radial), which takes no new elements, and the training set has "
            f"{_symbols(new)}: leave these structures out, or start from another potential"
        )
    base.model.add_elements(new, known)
    weights = {name: value for name, value in base.state_dict().items() if name not in ENERGY_BUFFERS}
    missing = potential.load_state_dict(weights, strict=False).missing_keys
    for name in set(missing).difference(ENERGY_BUFFERS):  # of charge or spin, switched on
        potential.get_parameter(name).zero_()


def _rows_of(base: Potential, path: str, names: Sequence[str], init_dataset: str | None, needs_one: bool) -> list[int]:
    """Returns for each named set the position of that of the same name in the file, or else of ``init_dataset``.

    A set that has neither takes the first, if only the scale counts and all have the same.
    """
    base.choose_dataset(init_dataset)  # refuses other names
    base.choose_dataset(None)
    known = base.datasets
    if len(known) < 2:
        return [0] * len(names)
    chosen = [name if name in known else init_dataset for name in names]
    differ = needs_one or len(base.scale.unique()) > 1 or base.config.num_energy_heads > 1
    if None in chosen and differ:
        what = "a head" if base.config.num_energy_heads > 1 else "energies"
        raise ConfigError(
            f"{path} has {what} for each of {', '.join(known)}: name the one to start from in model.init_dataset, or "
            f"name the sets of data.train and data.replay likewise ({{{known[0]}: {{path: ...}}}})"
        )
    return [0 if name is None else known.index(name) for name in chosen]


def _take_heads(base: Potential, potential: Potential, path: str, rows: Mapping[str, int]) -> str:
    """Gives the potential of the file the heads that the training wants, and returns what was done in words."""
    had, wanted = base.config.num_energy_heads, potential.config.num_energy_heads
    if had == wanted == 1:
        return ""
    names = base.datasets if had > 1 else ("the file",)
    chosen = [row if had > 1 else 0 for row in rows.values()]
    if wanted == 1 and len(set(chosen)) > 1:
        raise ConfigError(
            f"{path} has another head for each of {', '.join(rows)}, and model.architecture.{HEADS} is 1: set it to "
            f"{len(rows)}"
        )
    base.model.take_heads(chosen if wanted > 1 else chosen[:1])
    base.config = base.model.config
    said = [f"{name} from {names[row]}".lstrip() for name, row in zip(rows, chosen, strict=True)]
    return f"energy heads {', '.join(said)}; "


def _fit_set(
    base: Potential,
    own: Sequence[Tensor],
    item: Statistics,
    had: set[int],
    keep: bool,
    structures: Any,
    charge: bool,
) -> int:
    """Fits energies of one set in place and returns the number of structures read.

    Args:
        base: the potential of the file.
        own: references, shifts, energies of charges and scale of the set.
        item: its statistics.
        had: elements whose energies are kept.
        keep: whether energies of charges are kept, where there are some.
        structures: the set.
        charge: whether there are energies of charges.
    """
    references, shifts, charges, scale = own
    wanted = sorted(set(item.elements) - had)
    if wanted and not item.element_references:
        raise ConfigError(f"no training structure has an energy, and that of {_symbols(wanted)} is not known: add some")
    if not keep:
        references.fill_(torch.nan)
        charges.zero_()
    references[wanted] = torch.tensor([item.element_references[z] for z in wanted], dtype=torch.float64)
    shifts[wanted if keep else slice(None)] = 0.0
    labelled = [data for data in evenly(structures, _MAX_STRUCTURES) if data.has_label("energy")]
    compositions = [Composition.of(data, charge) for data in labelled]
    free = sorted({one.charge for one in compositions if not charges[one.charge + MAX_CHARGE]} - {0})
    if not (wanted and item.references_fitted) and not free:
        return 0
    base.set_references(torch.zeros_like(references), scale)
    predicted = base.predict(labelled, compute_forces=False)
    left = [one._replace(energy=one.energy - p.energy) for one, p in zip(compositions, predicted, strict=True)]
    # References are those without interaction, the baseline of validations; shifts take what interaction changes.
    for rows, table in ((compositions, references), (left, shifts)):
        change, added = fit_compositions(rows, references + shifts, charges, wanted, free)
        charges += added
        if item.references_fitted:
            table += change
    return len(left)


def _settings(config: ModelConfig) -> dict[str, Any]:
    return {"heads": [], "name": kind_of(config).name, **config.to_dict()}


def _expanded(config: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with a preset replaced by what it stands for."""
    preset = config.PRESETS.get(given.get("preset", ""))
    return dict(given) if preset is None else {**preset, **{k: v for k, v in given.items() if k != "preset"}}


def _contradiction(name: str, value: Any, config: ModelConfig, place: str) -> ConfigError:
    return ConfigError(
        f"model.architecture.{name} is {value!r}, {place} has {_settings(config).get(name)!r}: leave it out, since a "
        "training that starts from weights keeps their architecture"
    )


def _symbols(elements: Sequence[int]) -> str:
    from ase.data import chemical_symbols

    return ", ".join(chemical_symbols[z] for z in elements)
