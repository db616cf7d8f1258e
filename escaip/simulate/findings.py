"""What a check allows, found, and says of it."""

from __future__ import annotations

from dataclasses import dataclass

from escaip.errors import SimulationError


@dataclass(frozen=True)
class Tolerances:
    """What rounding explains.

    Attributes:
        energy: eV per atom, for structures that are the same.
        derivative: of the largest force in eV/Å, or of 1 eV/Å where that is less; of a stress as a virial, eV per atom.
        steps: Å, of differences of the energy: what is wrong is wrong with each.
        jump: eV; a hundred times as many eV/Å.
        leak: meV per atom in a short run, below which its energy need not fall with the timestep.
    """

    energy: float
    derivative: float
    steps: tuple[float, ...]
    jump: float
    leak: float


TOLERANCES = {
    "float64": Tolerances(energy=1e-9, derivative=1e-5, steps=(1e-4,), jump=1e-8, leak=1e-8),
    "float32": Tolerances(energy=1e-5, derivative=2e-3, steps=(1e-2, 3e-3), jump=1e-5, leak=1e-3),
    "rounded": Tolerances(energy=1e-3, derivative=0.1, steps=(5e-2,), jump=1e-3, leak=1.0),
}
"""By the model's dtype; "rounded" for products in TF32, float16 or bfloat16."""


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        name: of what was compared.
        value: found; NaN fails.
        unit: of it, empty for a number.
        limit: what is allowed; None for information.
        note: in words.
    """

    name: str
    value: float
    unit: str
    limit: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """``pass``, ``FAIL`` or ``info``."""
        if self.limit is None:
            return "info"
        return "pass" if self.value <= self.limit else "FAIL"


@dataclass(frozen=True)
class CheckReport:
    """What was found around one structure.

    Attributes:
        subject: model and structure in words.
        findings: one of each comparison.
    """

    subject: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Those outside of their limit."""
        return tuple(finding for finding in self.findings if finding.verdict == "FAIL")

    def table(self) -> str:
        """Returns it as text for people."""
        rows = [
            (f.verdict, f.name, f"{f.value:.2e}", "" if f.limit is None else f"{f.limit:.0e}", f.unit, f.note)
            for f in self.findings
        ]
        header = ("", "comparison", "found", "allowed", "", "")
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (header, *rows)]
        return "\n".join([self.subject, *(line.rstrip() for line in lines)])

    def raise_failed(self) -> None:
        """Raises SimulationError when a comparison failed."""
        if self.failed:
            names = "; ".join(finding.name for finding in self.failed)
            raise SimulationError(
                f"{len(self.failed)} of {len(self.findings)} comparisons failed: {names}: see the table; what float32 "
                "rounds, --dtype float64 does not"
            )
