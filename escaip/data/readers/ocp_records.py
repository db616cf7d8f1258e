"""Records of the Open Catalyst layouts as structures, and a check of the energies that the user states them to have.

Chanussot et al., ACS Catal. 11, 6059 (2021), doi:10.1021/acscatal.0c04525; Tran et al., ACS Catal. 13, 3066 (2023),
doi:10.1021/acscatal.2c05426.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from escaip.data.readers.pickled import attributes, plain, unpickle
from escaip.data.readers.policy import WINDOW, ReadPolicy, Record
from escaip.data.structure import LABELS, AtomicData, floats, hill_formula, integers
from escaip.data.validation import check_choice
from escaip.errors import ConfigError, DataError
from escaip.types import TARGETS
from escaip.units import Units

ENERGIES = ("adsorption", "total")
GEOMETRIES = ("initial", "relaxed")

BOUND_PER_ATOM = -0.7
"""eV per atom between total energies of slabs, from −1 (alkali metals) to −11, and adsorption energies over atoms."""

MAX_ADSORPTION = 50.0
"""eV, median over a window of the magnitude of adsorption energies."""

MIN_WINDOW = 8
"""Structures at the end of a file that are too few to be judged alone."""


def check_energy_option(path: Path, energy: str | None) -> None:
    """Refuses anything but a statement."""
    if energy is None:
        raise ConfigError(
            f"{path}: energy is not stated; state energy: total (as computed) or energy: adsorption (less a "
            "reference), whichever the file holds"
        )
    check_choice(f"{path}: energy", energy, ENERGIES)


@dataclass
class EnergyCheck:
    """Looks at energies in windows, before structures of the window get through.

    Attributes:
        path: of the file, for messages.
        kind: what the energies are said to be; None judges nothing.
        seen: energy of the file in eV and number of atoms of each structure of the window.
    """

    path: Path
    kind: str | None
    seen: list[tuple[float, int]] = field(default_factory=list)
    _judged: bool = False

    def windows(self, stream: Iterator[AtomicData]) -> Iterator[AtomicData]:
        """Yields the same structures."""
        while window := list(itertools.islice(stream, WINDOW)):
            self._judge()
            yield from window

    def _judge(self) -> None:
        seen, self.seen = self.seen, []
        if self.kind is None or not seen or (self._judged and len(seen) < MIN_WINDOW):
            return
        self._judged = True
        energies, counts = np.array(seen, dtype=np.float64).T
        total, size = float(np.median(energies / counts)), float(np.median(np.abs(energies)))
        found = f"{total:.3g} eV per atom and {size:.3g} eV in magnitude (medians of {len(seen)} structures)"
        if self.kind == "total" and total > BOUND_PER_ATOM:
            raise DataError(
                f"{self.path}: energies stated as total are {found}, too weak for bound solids; adsorption energies "
                "look like that: state energy: adsorption, or see that the file is what it should be"
            )
        if self.kind == "adsorption" and (total < BOUND_PER_ATOM or size > MAX_ADSORPTION):
            raise DataError(
                f"{self.path}: energies stated as adsorption energies are {found}, which is far beyond them; total "
                "energies look like that: state energy: total, or give the references that belong to the file"
            )


class OcpFile:
    """Turns the records of one file into structures; the options say what the file does not."""

    def __init__(
        self,
        path: Path,
        name: str,
        policy: ReadPolicy,
        energy: str | None,
        is2re: str | None,
        reference: str | Path | None,
    ) -> None:
        """Checks the options, which are those of ``read_ocp_lmdb``, and reads the reference."""
        if energy is not None:
            check_energy_option(path, energy)
        if is2re is not None:
            check_choice(f"{path}: is2re", is2re, GEOMETRIES)
        if reference is not None and energy != "adsorption":
            raise ConfigError(f"{path}: reference is added to adsorption energies; state energy: adsorption with it")
        self.path, self.name, self.energy, self.is2re = path, name, energy, is2re
        self.reference = None if reference is None else load_reference(Path(reference))
        self.units = policy.units or Units()
        self.policy, self.check = policy, EnergyCheck(path, energy)

    def structures(self, records: Iterator[Record]) -> Iterator[AtomicData]:
        """Yields those that the policy takes, after a look at their energies."""
        return self.check.windows(self.policy.admit(records))

    def record(self, value: Any, key: str, where: str) -> Record:
        """The record of an object or dictionary, or of the pickle of one; None is a missing one."""
        held: dict[str, Any] = {}

        def build() -> AtomicData:
            if value is None:
                raise DataError(f"{where} is missing; unpack the file again")
            held.update(attributes(unpickle(value, where) if isinstance(value, bytes) else value, where))
            return self.structure(held, key)

        return Record(build, lambda: f"record keys {listed(held)}")

    def structure(self, record: Mapping[str, Any], key: str) -> AtomicData:
        """Builds the structure of the record ``key`` of the file.

        Its attributes: ``pos (n, 3)``, ``atomic_numbers (n,)``, ``cell (1, 3, 3)``, ``natoms``, ``tags``, ``fixed``,
        ``sid``, ``fid``, ``pbc``; ``y`` and ``force``, or ``energy`` and ``forces``; ``y_relaxed`` and ``pos_relaxed``
        in records of relaxations; further targets under their names. Others, such as neighbor lists, are ignored.
        """
        place = f"{self.name}: record {key}"
        if "pos" not in record or "atomic_numbers" not in record:
            raise DataError(f"{place}: has no pos and atomic_numbers, which records have; found {listed(record)}")
        name, group = self._names(record, key, place)
        relaxation = self._is_relaxation(record, place)
        numbers = integers(record["atomic_numbers"], "atomic_numbers", name).ravel()
        if "natoms" in record and int(integers(record["natoms"], "natoms", name).sum()) != len(numbers):
            raise DataError(f"{name}: natoms is {record['natoms']}, but there are {len(numbers)} atomic_numbers")
        tags = integers(record.get("tags", np.zeros(len(numbers))), "tags", name)
        cell = floats(record["cell"], "cell", name) if "cell" in record else None
        if cell is not None and cell.size == 9:
            cell = cell.reshape(3, 3)
        # Slabs of OC20 and OC22 are periodic along all axes, and their files do not say so.
        pbc = integers(record.get("pbc", cell is not None), "pbc", name).ravel() != 0
        if pbc.size not in (1, 3):
            raise DataError(f"{name}: pbc has {pbc.size} values, expected 3")
        energy = _one_of(record, ("y_relaxed",) if relaxation else ("energy", "y"), name)
        if energy is not None:
            marked = bool(integers(record.get("oc22", 0), "oc22", name).any())
            if self.energy is None and pbc.any() and tags.any() and not marked:
                check_energy_option(self.path, None)
            if self.energy == "adsorption" and marked:
                raise ConfigError(f"{name}: is marked as OC22, whose energies are total; state energy: total")
            energy = _scalar(energy, "energy", name) * self.units.energy
            self.check.seen.append((energy, len(numbers)))
            energy = (energy + self._reference_of(record.get("sid"), name)) / self.units.energy
        return AtomicData.from_arrays(
            numbers,
            floats(record["pos_relaxed" if self.is2re == "relaxed" and relaxation else "pos"], "pos", name),
            cell=cell,
            pbc=pbc,
            energy=energy,
            forces=None if relaxation else _one_of(record, ("forces", "force"), name),
            labels={target: record[target] for target in TARGETS if target in record and target not in LABELS},
            fixed=integers(record["fixed"], "fixed", name) if "fixed" in record else None,
            tags=tags,
            structure_id=name,
            group=group if group is not None else hill_formula(numbers),
            units=self.units,
        )

    def _names(self, record: Mapping[str, Any], key: str, place: str) -> tuple[str, str | None]:
        """Id and group: the system is what must not be split; None where the record names none."""
        sid, fid = (_label(record.get(what), what, place) for what in ("sid", "fid"))
        if sid is None:
            return f"{self.name}:{key}", None
        system = f"sid{sid}" if isinstance(sid, int) else sid
        if fid is None and ("y_relaxed" in record or "pos_relaxed" in record):
            return f"{self.name}:{system}", system
        return f"{self.name}:{system}:{key if fid is None else fid}", system

    def _is_relaxation(self, record: Mapping[str, Any], place: str) -> bool:
        held = [key for key in ("y_relaxed", "pos_relaxed") if key in record]
        if not held:
            if self.is2re is not None and any(key in record for key in ("y", "energy", "force", "forces")):
                raise ConfigError(
                    f"{place}: is2re: {self.is2re} is for records of whole relaxations, with y_relaxed and "
                    f"pos_relaxed; found {listed(record)}; drop is2re"
                )
            return False
        if self.is2re is None:
            raise ConfigError(
                f"{place}: holds a whole relaxation; state is2re: initial (initial structure with the energy of the "
                "relaxed one) or is2re: relaxed (relaxed structure with its energy)"
            )
        if "y_relaxed" not in held or (self.is2re == "relaxed" and len(held) < 2):
            raise DataError(f"{place}: is2re: {self.is2re} needs more than {held[0]}; found {listed(record)}")
        return True

    def _reference_of(self, sid: Any, name: str) -> float:
        """The energy to be added, in eV."""
        if self.reference is None:
            return 0.0
        system = _bare(_label(sid, "sid", name))
        if system not in self.reference:
            raise DataError(f"{name}: the reference has no energy for its system; use the reference of this data set")
        return _scalar(plain(self.reference[system]), "reference energy", name)


def listed(record: Mapping[str, Any]) -> str:
    """Returns the names that a record holds, for messages."""
    return ", ".join(sorted(record)[:30]) or "nothing"


def _bare(system: Any) -> str:
    """The number of a system: ``12`` of 12, ``"12"`` and ``"random12"``."""
    return str(system).removeprefix("random")


def load_reference(path: Path) -> Mapping[str, Any]:
    """Reads reference energies in eV by number of the system from a pickle such as ``oc20_ref.pkl``."""
    try:
        stat = path.stat()
        return _load_reference(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise DataError(f"{path}: reference cannot be read ({error.strerror})") from error


@lru_cache(maxsize=1)
def _load_reference(path: Path, changed: int, size: int) -> Mapping[str, Any]:
    """Kept for the next file and part of the same data set: there are hundreds of thousands of systems."""
    content = unpickle(path.read_bytes(), str(path))
    if type(content) is not dict or not content:
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a dict of reference energies by sid")
    return {_bare(system): energy for system, energy in content.items()}


def _label(value: Any, what: str, place: str) -> int | str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, str) or np.size(value) != 1:
        raise DataError(f"{place}: {what} is {value!r}, expected a number or a name")
    return int(integers(value, what, place).ravel()[0])


def _one_of(record: Mapping[str, Any], keys: tuple[str, ...], name: str) -> Any:
    held = [key for key in keys if key in record]
    if len(held) > 1 and not np.array_equal(record[held[0]], record[held[1]]):
        raise DataError(f"{name}: has {held[0]} and {held[1]}, which differ; remove one of them")
    return record[held[0]] if held else None


def _scalar(value: ArrayLike, what: str, name: str) -> float:
    array = floats(value, what, name)
    if array.size != 1 or not np.isfinite(array).all():
        raise DataError(f"{name}: {what} is {str(value)[:60]!r}, expected one finite number")
    return float(array.ravel()[0])
