"""The plan of a distillation: what the YAML file of `escaip distil` holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from escaip.errors import ConfigError
from escaip.files import config_path, read_yaml


@dataclass(frozen=True)
class Teacher:
    """The calculator whose energies and forces are learned.

    Attributes:
        level_of_theory: stated in the data and in the potential.
        arguments: of the class or function that makes the calculator.
        licence: of the teacher, stated in the data and in the potential.
        citation: works to cite.
        max_force: eV/Å; a frame with a larger force on any atom is left out and counted.
        max_stress: eV/Å³ (0.6 is 96 GPa); likewise for the stress, which is all that a collapsed crystal shows.
        timeout: seconds that one job may take.
    """

    level_of_theory: str
    arguments: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    citation: tuple[str, ...] = ()
    max_force: float = 50.0
    max_stress: float = 0.6
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        if not self.level_of_theory.strip():
            raise ConfigError("teacher.level_of_theory is empty: name the method")
        _positive("teacher", self, "max_force", "max_stress", "timeout")


_SETTINGS = {
    "prototypes": ("elements", "formulas", "relax"), "smiles": ("groups", "conformers", "charges", "relax"),
    "dimers": ("points", "reach"), "file": ("relax",),
}  # fmt: skip
"""Settings of each kind of base."""


@dataclass(frozen=True)
class Base:
    """Structures to start from: prototypes of crystals, molecules, dimers, or those of a file. One kind each.

    Attributes:
        prototypes: Strukturbericht symbols of AFLOW's library, such as A1 (fcc), B1 (rocksalt), C4 (rutile).
        elements: prototypes get every choice and order of these elements.
        formulas: prototypes of this stoichiometry get these elements; instead of ``elements``.
        smiles: molecules; ``{R}`` stands for each of ``groups["R"]`` in each of its places, as in ``c1cc({R})ccc1{R}``.
        groups: pieces of SMILES, such as ``O``, ``C(=O)N`` or ``[H]``, by the name of their place.
        conformers: of each molecule (ETKDG, then MMFF94).
        charges: total charges of each molecule beside its own, with a low spin each.
        dimers: elements; every pair of them, from contact to ``reach``.
        points: distances of each dimer.
        reach: Å, the largest distance of a dimer.
        file: anything ASE reads.
        count: at most so many crystals, molecules or frames, drawn with the seed; 0 for all.
        relax: steps of the teacher that relax positions and cell first; 0 takes the structure as it is, as dimers are.
    """

    prototypes: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    formulas: tuple[str, ...] = ()
    smiles: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    conformers: int = 1
    charges: tuple[int, ...] = ()
    dimers: tuple[str, ...] = ()
    points: int = 20
    reach: float = 6.0
    file: str = ""
    count: int = 0
    relax: int = 40

    def __post_init__(self) -> None:
        kinds = [name for name in ("prototypes", "smiles", "dimers", "file") if getattr(self, name)]
        if len(kinds) != 1:
            raise ConfigError(f"give one of prototypes, smiles, dimers and file, not {' and '.join(kinds) or 'none'}")
        changed = {one.name for one in fields(self) if getattr(self, one.name) not in (one.default, {})}
        if foreign := sorted(changed - {kinds[0], "count", *_SETTINGS[kinds[0]]}):
            raise ConfigError(f"{foreign[0]} is not for {kinds[0]}: leave it out")
        if kinds == ["prototypes"] and bool(self.elements) == bool(self.formulas):
            raise ConfigError("prototypes need elements or formulas, one of both")
        _positive("", self, "conformers", "points", "reach")


@dataclass(frozen=True)
class Variation:
    """Changes of a base, made in the order of the attributes; each is off by default.

    Attributes:
        of: names of bases.
        count: structures to make; the structures of the bases take turns, in an order of the seed.
        atoms: a crystal is repeated up to so many atoms; for clusters and surfaces, about their number.
        mix: elements that replace those of a crystal at random, with the volume that their radii ask for.
        surface: largest Miller index of a slab with 12 Å of vacuum.
        cluster: cut ``atoms`` atoms out of a crystal.
        vacancies: atoms to take out.
        interstitials: atoms to put in where there is room.
        swaps: pairs of atoms of two elements that change places.
        copies: molecules, at random orientations.
        among: bases that the further molecules are drawn from; by default all are of the same kind.
        density: g/cm³ of a periodic box of these molecules; 0 for a cluster in vacuum.
        strain: largest change of a length or an angle; half of the structures change their volume alone.
        stretch: range of factors on the length of a random bond that is in no ring.
        rattle: Å, largest standard deviation of random displacements; drawn between 0 and this.
    """

    of: tuple[str, ...]
    count: int
    atoms: int = 0
    mix: tuple[str, ...] = ()
    surface: int = 0
    cluster: bool = False
    vacancies: int = 0
    interstitials: int = 0
    swaps: int = 0
    copies: int = 1
    among: tuple[str, ...] = ()
    density: float = 0.0
    strain: float = 0.0
    stretch: tuple[float, ...] = ()
    rattle: float = 0.0

    def __post_init__(self) -> None:
        if not self.of:
            raise ConfigError("of is empty: name bases")
        _positive("", self, "count", "copies")
        if not 0 <= self.strain < 0.5:
            raise ConfigError(f"strain is {self.strain}: it must be at least 0 and below 0.5")
        if self.stretch and (len(self.stretch) != 2 or not 0 < self.stretch[0] <= self.stretch[1]):
            raise ConfigError(f"stretch is {list(self.stretch)}: give the smallest and the largest factor")
        if self.cluster and (not self.atoms or self.surface):
            raise ConfigError("a cluster needs atoms, and has no surface")
        if (self.density or self.among) and self.copies < 2:
            raise ConfigError(f"{'density' if self.density else 'among'} needs copies, two or more molecules")


@dataclass(frozen=True)
class Dynamics(Variation):
    """Langevin dynamics that begin at variations; frames on the way are kept.

    Attributes:
        temperatures: K; runs take turns.
        steps: of each run.
        every: steps between frames.
        timestep: fs.
        relax: steps of relaxation before, so that no run begins with a contact.
    """

    temperatures: tuple[float, ...] = (300.0,)
    steps: int = 500
    every: int = 50
    timestep: float = 1.0
    relax: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("", self, "steps", "every", "timestep")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ConfigError(f"temperatures are {list(self.temperatures)}: give some, above 0 K")


@dataclass(frozen=True)
class HoldOut:
    """Structures kept from the training.

    Attributes:
        by: ``base`` holds out all that is made of a base (of molecules, of a scaffold), ``job`` a run or structure.
        val: fraction for validation.
        test: fraction for testing.
    """

    by: Literal["base", "job"] = "job"
    val: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        if not (self.val > 0 and self.test >= 0 and self.val + self.test < 1):
            raise ConfigError("hold_out: val must be above 0, test at least 0, and both together below 1")


@dataclass(frozen=True)
class Student:
    """The training of the potential.

    Attributes:
        config: a recipe of `escaip fit` or its file.
        options: of `escaip fit`, such as ``model.architecture.preset: 300k``.
        steps: of the optimizer.
    """

    config: str
    steps: int
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _positive("student", self, "steps")
        config_path(self.config)


@dataclass(frozen=True)
class Rounds:
    """Active rounds: train a committee, run it hot, label what it disagrees on.

    Attributes:
        count: at most so many rounds.
        steps: of each training of a member.
        members: of the committee.
        dynamics: of the student, by name.
        add: frames to label in a round, at most.
        surprise: a frame surprises where the largest spread of a force is above this multiple of what 95 % of the
            validation frames have.
        stop: share of surprising frames at which rounds end.
    """

    count: int = 0
    steps: int = 500
    members: int = 2
    dynamics: dict[str, Dynamics] = field(default_factory=dict)
    add: int = 100
    surprise: float = 1.5
    stop: float = 0.05

    def __post_init__(self) -> None:
        _positive("rounds", self, "steps", "add", "surprise")
        if self.members < 2:
            raise ConfigError(f"rounds.members is {self.members}: a committee has two or more")
        if self.count and not self.dynamics:
            raise ConfigError("rounds.dynamics is missing: name dynamics of the student")


@dataclass(frozen=True)
class DistilPlan:
    """Everything that `escaip distil` makes.

    Attributes:
        name: of the data and of the potential.
        teacher: the calculator.
        bases: structures to start from, by name.
        structures: variations to label, by name.
        dynamics: of the teacher, by name.
        student: the training.
        rounds: active rounds before it.
        hold_out: what is kept for validation and test.
        seed: of everything that is random.
    """

    name: str
    teacher: Teacher
    bases: dict[str, Base]
    student: Student
    structures: dict[str, Variation] = field(default_factory=dict)
    dynamics: dict[str, Dynamics] = field(default_factory=dict)
    rounds: Rounds = field(default_factory=Rounds)
    hold_out: HoldOut = field(default_factory=HoldOut)
    seed: int = 0

    def __post_init__(self) -> None:
        for part, named in (("structures", self.structures), ("dynamics", self.dynamics)):
            _check_bases(part, named, self.bases)
        _check_bases("rounds.dynamics", self.rounds.dynamics, self.bases)
        names = [*self.bases, *self.structures, *self.dynamics, *self.rounds.dynamics]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{twice!r} names two entries: every base, variation and dynamics has a name of its own")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> DistilPlan:
        """Reads a file, or a recipe of ``configs/distil`` by name.

        Raises:
            ConfigError: there is no such file, or an entry is unknown, missing or impossible; the message names it.
        """
        file = config_path(os.fspath(path), "distil")
        try:
            made: DistilPlan = _parse(cls, read_yaml(file), "")
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        return made


def _check_bases(part: str, named: Mapping[str, Variation], bases: Mapping[str, Base]) -> None:
    for name, variation in named.items():
        for key in ("of", "among"):
            if unknown := [base for base in getattr(variation, key) if base not in bases]:
                raise ConfigError(f"{part}.{name}.{key}: there is no base {unknown[0]!r}: bases are {', '.join(bases)}")


def _positive(place: str, settings: Any, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise ConfigError(f"{f'{place}.' if place else ''}{name} is {getattr(settings, name)}: it must be above 0")


def _parse(kind: Any, content: Any, place: str) -> Any:
    """Makes a dataclass of a mapping, with the place of an entry in every message."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{place or 'the plan'} is {content!r}: write a mapping")
    hints = get_type_hints(kind)
    prefix = f"{place}." if place else ""
    if unknown := [key for key in content if key not in hints]:
        raise ConfigError(f"{prefix}{unknown[0]} is unknown: entries are {', '.join(hints)}")
    required = [one.name for one in fields(kind) if one.default is one.default_factory]
    if missing := [name for name in required if name not in content]:
        raise ConfigError(f"{prefix}{missing[0]} is missing")
    values = {key: _value(hints[key], value, f"{prefix}{key}") for key, value in content.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}" if place and place not in str(error) else str(error)) from error


def _value(hint: Any, value: Any, place: str) -> Any:
    """Returns a value of the type that an annotation names."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        given = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(arguments[0], one, place) for one in given)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place} is {value!r}: write a mapping")
        return {str(key): _value(arguments[1], one, f"{place}.{key}") for key, one in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{place} is {value!r}: choose {' or '.join(arguments)}")
        return value
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool):
        if type(value) is not hint:
            quotes = ", in quotes, since YAML reads NO and ON as false and true" if isinstance(value, bool) else ""
            raise ConfigError(f"{place} is {value!r}: write {_WORDS[hint]}{quotes}")
        return value
    return _parse(hint, value, place)


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
