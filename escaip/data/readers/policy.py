"""How files are read: what a reader is, which structures are admitted, and whether their numbers are eV and Å."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from escaip.data.structure import AtomicData
from escaip.data.validation import check_choice
from escaip.errors import ConfigError, DataError
from escaip.types import TARGETS
from escaip.units import Units

MAX_MESSAGES = 20

WINDOW = 256
"""Structures whose magnitudes are judged together."""

MAX_FORCE_RMS = 15.0
"""eV/Å, median over a window of the root mean square force per atom; thermal molecules have about 2."""

MAX_STRESS = 6.0
"""eV/Å³ (about 1000 GPa), median over a window of the largest component."""

MAX_ENERGY_SPREAD = 30.0
"""eV per atom between structures of one composition in a window."""

ORGANIC = (1, 6, 7, 8, 9, 15, 16, 17)
X_H_DISTANCE = (0.4, 1.6)
"""Å, bounds of the median distance from hydrogen to its nearest atom in organic molecules."""

Part = tuple[int, int]
"""Records ``start <= k < stop`` of one file, in the reader's own order: frames, keys, molecules, bytes."""


@dataclass(frozen=True)
class Reader:
    """A layout of files as published.

    Attributes:
        name: what ``--format`` calls it.
        read: ``read(path, name, policy, **options)`` yields the structures of one file in order, with ids that begin
            with ``name``; structures go through ``ReadPolicy.admit``. Its further parameters are the options of the
            layout. It has ``keys`` (``LabelKeys``) where labels may have any name, and ``part`` where ``parts`` divides
            files: then only these records are read, under the same ids.
        matches: ``matches(path, head)`` says from the name and the first 4096 bytes (none of a directory) whether a
            file, or a directory, has this layout. Nothing is decoded.
        parts: ``parts(path, size)`` divides a file into ranges of about ``size`` structures, in order, without decoding
            structures: reading one after the other is reading the whole. None where a file can only be read whole.
        expand: files of a directory that ``matches``; None where directories mean nothing.
    """

    name: str
    read: Callable[..., Iterator[AtomicData]]
    matches: Callable[[Path, bytes], bool]
    parts: Callable[[Path, int], list[Part]] | None = None
    expand: Callable[[Path], list[Path]] | None = None


def ranges(count: int, size: int) -> list[Part]:
    """Divides ``count`` records into ranges of ``size``."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def ranges_by_weight(weights: Iterable[float], limit: float) -> list[Part]:
    """Divides records into ranges whose weights together stay below ``limit``, or that hold a single record."""
    parts: list[Part] = []
    start, place, held = 0, -1, 0.0
    for place, weight in enumerate(weights):
        if place > start and held + weight > limit:
            parts.append((start, place))
            start, held = place, 0.0
        held += weight
    return [*parts, (start, place + 1)]


class MalformedError(DataError):
    """A structure that is skipped and counted under every policy, since releases of its layout hold a few."""


@dataclass(frozen=True)
class Record:
    """A structure of a file before it is built.

    Attributes:
        build: makes the structure, raising ``DataError`` for a bad one.
        found: names the labels that the file holds, for the message about a missing one.
    """

    build: Callable[[], AtomicData]
    found: Callable[[], str] | None = None


@dataclass
class ReadReport:
    """Counts of a reading.

    Attributes:
        read: structures yielded.
        skipped: structures refused under ``on_error: skip``, and malformed ones that a layout is known for.
        filtered: structures left out by a filter that was asked for (``max_force``).
        messages: why, for the first of them.
        log: called with every message, where all of them are wanted.
        absent: structures that are taken without a label whose key was named, by target.
        first_absent: message about the first of them, by target.
        levels: levels of theory that structures state (``info["level_of_theory"]``).
    """

    read: int = 0
    skipped: int = 0
    filtered: int = 0
    messages: list[str] = field(default_factory=list)
    log: Callable[[str], object] | None = None
    absent: dict[str, int] = field(default_factory=dict)
    first_absent: dict[str, str] = field(default_factory=dict)
    levels: set[str] = field(default_factory=set)

    def level_of_theory(self, where: str, card: str = "") -> str:
        """Returns the level that structures state, else that of the ``card``; raises DataError where they differ."""
        if len(self.levels) > 1:
            raise DataError(
                f"{where}: its structures state levels of theory {' and '.join(sorted(self.levels))}: read them as "
                "sets of their own"
            )
        stated = next(iter(self.levels), card)
        if card and stated != card:
            raise DataError(
                f"{where}: its structures state the level of theory {stated}, its card {card}: name their layout "
                "instead of the data set, or correct info['level_of_theory']"
            )
        return stated

    def miss(self, target: str, message: str) -> None:
        """Counts one structure without a label whose key was named."""
        self.absent[target] = self.absent.get(target, 0) + 1
        self.first_absent.setdefault(target, message)

    def check_absent(self) -> None:
        """Raises DataError for a label whose key was named and that no structure has."""
        for target, count in self.absent.items():
            if count >= self.read + self.filtered:
                raise DataError(self.first_absent[target])

    def skip(self, message: str) -> None:
        """Counts one structure that is left out because it is bad."""
        self.skipped += 1
        self._note(message)

    def filter(self, message: str) -> None:
        """Counts one structure that is left out because a filter says so."""
        self.filtered += 1
        self._note(message)

    def summary(self) -> str:
        """One line for a log."""
        text = f"{self.read} structures read, {self.skipped} skipped"
        if self.filtered:
            text += f", {self.filtered} filtered out"
        text += "".join(f", {count} without {target}" for target, count in self.absent.items())
        return f"{text} (first: {self.messages[0]})" if self.messages else text

    def _note(self, message: str) -> None:
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)
        if self.log is not None:
            self.log(message)


@dataclass(frozen=True)
class ReadPolicy:
    """Which structures of a file are taken, and in which units they are read.

    Attributes:
        units: units the user states for the file; None for the layout's own.
        on_error: ``"raise"`` stops at the first bad structure, ``"skip"`` counts it and goes on.
        report: receives the counts.
        required: labels each structure must carry.
        max_force: eV/Å; structures with a larger force on any free atom are left out and counted. None keeps all.
    """

    units: Units | None = None
    on_error: str = "raise"
    report: ReadReport = field(default_factory=ReadReport)
    required: tuple[str, ...] = ()
    max_force: float | None = None

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ("raise", "skip"))
        for name in self.required:
            check_choice("required_labels", name, TARGETS)
        if self.max_force is not None and not self.max_force > 0:
            raise ConfigError(f"max_force: {self.max_force} is not a positive number of eV/Å")

    def admit(self, records: Iterable[Record]) -> Iterator[AtomicData]:
        """Builds structures and yields those that are taken; the others are counted.

        Raises:
            DataError: a bad structure under ``on_error: raise``.
        """
        try:
            for record in records:
                data = self._built(record)
                if data is not None:
                    self.report.read += 1
                    yield data
        finally:
            if isinstance(records, Generator):
                records.close()  # the file, also while the traceback of an error is kept

    def _built(self, record: Record) -> AtomicData | None:
        try:
            data = record.build()
            for name in self.required:
                if not data.has_label(name):
                    found = f"; found {record.found()}" if record.found is not None else ""
                    raise DataError(
                        f"{data.structure_id}: has no {name}, which required_labels asks for{found}; "
                        f"name it (keys: {{{name}: KEY}}) or drop it from required_labels"
                    )
        except DataError as error:
            if self.on_error == "raise" and not isinstance(error, MalformedError):
                raise
            self.report.skip(str(error))
            return None
        force = largest_force(data) if self.max_force is not None and data.has_label("forces") else 0.0
        if self.max_force is not None and force > self.max_force:
            self.report.filter(f"{data.structure_id}: force of {force:.4g} eV/Å, above max_force {self.max_force}")
            return None
        return data


def largest_force(data: AtomicData) -> float:
    """Returns the largest force on a free atom in eV/Å; 0 where all are fixed."""
    free = data.forces[~data.fixed]
    return float(free.norm(dim=1).max()) if len(free) else 0.0


def checked(stream: Iterator[AtomicData]) -> Iterator[AtomicData]:
    """Yields the same structures after a look at windows of them; nothing of a refused window gets through."""
    while window := list(itertools.islice(stream, WINDOW)):
        check_magnitudes(window)
        yield from window


def energy_bound(numbers: NDArray[np.int64]) -> float:
    """Upper bound in eV of a total energy's magnitude: 1.5 times Thomas–Fermi, ``0.7687 Z^(7/3)`` hartree an atom.

    All-electron energies reach about 0.75 of Thomas–Fermi for light and 1.0 for heavy atoms (relativity
    included), pseudopotential energies far less.
    """
    return 1.5 * float((0.7687 * 27.211386 * numbers.astype(np.float64) ** (7.0 / 3.0)).sum())


def check_magnitudes(structures: Sequence[AtomicData]) -> None:
    """Refuses a window of structures whose magnitudes are those of another unit.

    Raises:
        DataError: naming the label, the first structure, the unit it looks like and how to state it.
    """
    if not structures:
        return
    _check_lengths(structures)
    _check_energies(structures)
    first = structures[0].structure_id
    squares = [float((data.forces.numpy() ** 2).sum(1).mean()) for data in structures if data.has_label("forces")]
    rms = np.sqrt([square for square in squares if square > 0.0])
    if len(rms) and (median := float(np.median(rms))) > MAX_FORCE_RMS:
        unit, looks = ("meV", "meV/Å") if median > 300.0 else ("kcal/mol", "kcal/mol/Å or larger")
        raise DataError(
            f"{first}: forces of {median:.4g} eV/Å (median of the root mean square) look like {looks}; "
            f"{_remedy(f'energy: {unit}')}"
        )
    largest = [float(data.stress.abs().max()) for data in structures if data.has_label("stress")]
    if largest and float(np.median(largest)) > MAX_STRESS:
        raise DataError(
            f"{first}: stress of {np.median(largest):.4g} eV/Å³ (median of the largest component) looks like GPa or "
            f"kbar; {_remedy('stress: kbar')}"
        )


def _remedy(unit: str) -> str:
    return f"state the file's units (units: {{{unit}}}), or check_units: false if they are right"


def _check_lengths(structures: Sequence[AtomicData]) -> None:
    from scipy.spatial import cKDTree

    nearest: list[float] = []
    for data in structures:
        numbers = data.atomic_numbers.numpy()
        if bool(data.pbc.any()) or len(numbers) < 2 or not np.isin(numbers, ORGANIC).all():
            continue
        distances, _ = cKDTree(data.positions.numpy()).query(data.positions.numpy()[numbers == 1], k=2)
        nearest.extend(np.atleast_2d(distances)[:, 1].tolist() if len(distances) else [])
    if len(nearest) < 6:
        return
    median = float(np.median(nearest))
    if not X_H_DISTANCE[0] < median < X_H_DISTANCE[1]:
        unit = "bohr" if median > 1.0 else "nm"
        raise DataError(
            f"{structures[0].structure_id}: hydrogens sit {median:.3g} Å from their nearest atom, which looks like "
            f"{unit}; {_remedy(f'length: {unit}')}"
        )


def _check_energies(structures: Sequence[AtomicData]) -> None:
    per_atom: dict[bytes, list[tuple[float, str]]] = defaultdict(list)
    for data in structures:
        energy = float(data.energy)
        if np.isnan(energy):
            continue
        numbers = data.atomic_numbers.numpy()
        n, bound = len(numbers), energy_bound(numbers)
        if abs(energy) > bound:
            unit = "meV" if abs(energy) > 100 * bound else "kcal/mol"
            raise DataError(
                f"{data.structure_id}: energy of {energy / n:.4g} eV/atom is beyond what these elements can have "
                f"({bound / n:.4g}) and looks like {unit}; {_remedy(f'energy: {unit}')}"
            )
        per_atom[np.sort(numbers).tobytes()].append((energy / n, data.structure_id))
    for values in per_atom.values():
        median = float(np.median([value for value, _ in values]))
        worst, name = max(values, key=lambda item: abs(item[0] - median))
        if len(values) > 2 and abs(worst - median) > MAX_ENERGY_SPREAD:
            raise DataError(
                f"{name}: energy of {worst:.4g} eV/atom where structures of the same composition have {median:.4g}: "
                "mixed units or a failed calculation; remove it, or check_units: false if it is right"
            )
