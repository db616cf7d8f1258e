"""Where structures enter: units, skipping and its counts, in one place for every source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from escaip.errors import ConfigError, DataError
from escaip.units import Units

if TYPE_CHECKING:
    from escaip.data.atomic_data import AtomicData

MAX_MESSAGES = 20
ON_ERROR = ("raise", "skip")


@dataclass
class ReadReport:
    """What came through the door and what did not.

    Attributes:
        read: structures yielded.
        skipped: structures refused under ``on_error: skip``, and malformed ones that a layout is known for.
        filtered: structures left out by a filter that was asked for (``max_force``).
        messages: why, for the first of them.
        log: called with every message, where all of them are wanted.
    """

    read: int = 0
    skipped: int = 0
    filtered: int = 0
    messages: list[str] = field(default_factory=list)
    log: Callable[[str], object] | None = None

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
        return f"{text} (first: {self.messages[0]})" if self.messages else text

    def _note(self, message: str) -> None:
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)
        if self.log is not None:
            self.log(message)


@dataclass(frozen=True)
class Door:
    """Converts, admits or refuses the structures of a source.

    Attributes:
        stated_units: units the user states for the source; None for the source's own.
        on_error: ``"raise"`` stops at the first bad structure, ``"skip"`` counts it and goes on.
        report: receives the counts.
        required: labels each structure must carry.
        max_force: eV/Å; structures with a larger force on any free atom are left out and counted. None keeps all.
    """

    stated_units: Units | None = None
    on_error: str = "raise"
    report: ReadReport = field(default_factory=ReadReport)
    required: tuple[str, ...] = ()
    max_force: float | None = None

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"on_error: {self.on_error!r} is not one of {', '.join(ON_ERROR)}")
        for name in self.required:
            if name not in ("energy", "forces", "stress"):
                raise ConfigError(f"required_labels: {name!r} is not one of energy, forces, stress")
        if self.max_force is not None and not self.max_force > 0:
            raise ConfigError(f"max_force: {self.max_force} is not a positive number of eV/Å")

    @property
    def units(self) -> Units:
        """The units stated, else Å and eV."""
        return self.stated_units or Units()

    def admit(self, build: Callable[[], AtomicData], describe: Callable[[], str] | None = None) -> AtomicData | None:
        """The structure that ``build`` makes, or None when it is skipped.

        Args:
            build: makes the structure, raising DataError for a bad one.
            describe: what labels the source holds, for the message about a missing one.

        Raises:
            DataError: a bad structure under ``on_error: raise``.
        """
        try:
            data = build()
            for name in self.required:
                if not data.has_label(name):
                    found = f"; found {describe()}" if describe is not None else ""
                    raise DataError(
                        f"{data.structure_id}: has no {name}, which required_labels asks for{found}; "
                        f"name it (keys: {{{name}: KEY}}) or drop it from required_labels"
                    )
        except DataError as error:
            if self.on_error == "raise":
                raise
            self.report.skip(str(error))
            return None
        if self.max_force is not None and data.has_label("forces"):
            force = largest_force(data)
            if force > self.max_force:
                self.report.filter(f"{data.structure_id}: force of {force:.4g} eV/Å, above max_force {self.max_force}")
                return None
        self.report.read += 1
        return data


def largest_force(data: AtomicData) -> float:
    """Largest force on a free atom in eV/Å; 0 where all are fixed."""
    free = data.forces[~data.fixed]
    return float(free.norm(dim=1).max()) if len(free) else 0.0
