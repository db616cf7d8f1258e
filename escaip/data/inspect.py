"""What a data set holds: counts, ranges, distributions, and what looks wrong in it, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.readers import PathLike, ReadReport, check_magnitudes, expand_paths, open_source
from escaip.data.readers.policy import WINDOW
from escaip.data.statistics import fit_statistics
from escaip.data.store import Store, is_store
from escaip.errors import DataError
from escaip.files import write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from escaip.data.structure import AtomicData

MAX_OUTLIERS = 10
_ENERGY_OUTLIER = 10.0
"""Robust standard deviations from the median residual."""
_ENERGY_FLOOR = 0.5
"""eV/atom below which a residual is no outlier."""
_FORCE_OUTLIER = 50.0
"""eV/Å, and at least twenty times the median."""
MAX_STEP = 0.3
"""Å an atom may move between two structures for the trapezoid rule to mean anything."""
MIN_WORK = 1e-3
"""eV below which rounding decides."""
MIN_PAIRS = 20
MAX_PAIRS = 100_000


@dataclass
class ForceWork:
    """Ratio of ``E_b − E_a`` to ``−½ (F_a + F_b)·(r_b − r_a)`` over consecutive structures of a trajectory.

    It is 1 when ``forces = −dE/dr`` in the same units, −1 when the file holds gradients, and another factor when units
    differ. Consecutive means: the same atoms, the same cell, no atom further than 0.3 Å, more than 1 meV of work.
    """

    ratios: list[float] = field(default_factory=list)
    _last: AtomicData | None = None

    def add(self, data: AtomicData) -> None:
        """Compares the next structure of the stream with the one before."""
        last, self._last = self._last, data
        if last is None or last.num_nodes != data.num_nodes or len(self.ratios) >= MAX_PAIRS:
            return
        if not all(item.has_label("energy") and item.has_label("forces") for item in (last, data)):
            return
        if not bool((data.atomic_numbers == last.atomic_numbers).all()) or not bool((data.cell == last.cell).all()):
            return
        step = (data.positions - last.positions).numpy()
        work = -0.5 * float((step * (data.forces + last.forces).numpy()).sum())
        if float(np.abs(step).max()) < MAX_STEP and abs(work) > MIN_WORK:
            self.ratios.append(float(data.energy - last.energy) / work)

    @property
    def ratio(self) -> float | None:
        """Median ratio; None with fewer than 20 pairs, or when most pairs differ from it by more than half of it."""
        if len(self.ratios) < MIN_PAIRS:
            return None
        median = float(np.median(self.ratios))
        agreeing = np.mean(np.abs(np.array(self.ratios) - median) < 0.5 * abs(median))
        return median if agreeing > 0.5 else None

    def problem(self) -> str | None:
        """Returns what is wrong, or None."""
        ratio = self.ratio
        if ratio is None or 0.5 < ratio < 2.0:
            return None
        if ratio < 0:
            return f"forces point uphill (energy change per work of the forces {ratio:.3g}): the file holds gradients"
        return f"energies and forces are in different units (energy change per work {ratio:.4g}); state units"


@dataclass(frozen=True)
class Distribution:
    """Summary of finite numbers, in their unit."""

    minimum: float
    median: float
    mean: float
    maximum: float
    deviation: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Distribution | None:
        """Returns the summary of the finite values; None without any."""
        values = _finite(values)
        if len(values) == 0:
            return None
        return cls(*(float(f(values)) for f in (np.min, np.median, np.mean, np.max, np.std)))


@dataclass(frozen=True)
class Inspection:
    """Findings of ``inspect_structures``.

    Attributes:
        num_structures, num_skipped, num_groups, num_periodic: counts; a periodic structure has a periodic axis.
        elements, labels, charges: structures with each element (by symbol), label and total charge.
        natoms: atoms per structure.
        energy, residual: eV/atom, as given and after subtracting element references.
        force, stress: largest force (eV/Å) and largest stress component (eV/Å³) of each structure.
        force_rms: eV/Å, over components of free atoms.
        force_work: energy change per work of the forces along trajectories; 1 when both agree.
        references: eV by symbol.
        problems, outliers: a line for each implausible unit or unreadable structure, and for each structure far from
            the rest.
    """

    num_structures: int
    num_skipped: int
    num_groups: int
    num_periodic: int
    elements: dict[str, int]
    labels: dict[str, int]
    charges: dict[int, int]
    natoms: Distribution | None
    energy: Distribution | None
    residual: Distribution | None
    force: Distribution | None
    stress: Distribution | None
    force_rms: float | None
    force_work: float | None
    references: dict[str, float]
    problems: list[str] = field(default_factory=list)
    outliers: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Returns the text for a terminal."""
        listed = [", ".join(f"{name} {count}" for name, count in item.items()) for item in (self.labels, self.elements)]
        lines = [
            f"structures   {self.num_structures} ({self.num_periodic} periodic, {self.num_skipped} skipped)",
            f"groups       {self.num_groups}",
            f"labels       {listed[0]}",
            f"elements     {listed[1]}",
            f"charges      {', '.join(f'{charge:+d}: {count}' for charge, count in self.charges.items())}",
            "",
            f"{'':26}{'min':>12}{'median':>12}{'mean':>12}{'max':>12}{'std':>12}",
        ]
        rows = {
            "atoms": self.natoms, "energy (eV/atom)": self.energy, "after references (eV/atom)": self.residual,
            "largest force (eV/Å)": self.force, "largest stress (eV/Å³)": self.stress,
        }  # fmt: skip
        for name, row in rows.items():
            if row is not None:
                lines.append(f"{name:26}" + "".join(f"{value:12.5g}" for value in astuple(row)))
        if self.force_rms is not None:
            lines.append(f"force RMS over components of free atoms: {self.force_rms:.4g} eV/Å")
        if self.force_work is not None:
            told = f"{self.force_work:.4g} (1 when both agree)"
            lines.append(f"energy change per work of the forces along trajectories: {told}")
        lines += [f"problem: {text}" for text in self.problems] + [f"outlier: {text}" for text in self.outliers]
        return "\n".join(lines)


class _Collector:
    """Numbers per structure, gathered while the structures stream past the statistics."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rows: list[tuple[float, ...]] = []
        self.compositions: dict[bytes, int] = {}
        self.groups: set[str] = set()
        self.elements: Counter[int] = Counter()
        self.charges: Counter[int] = Counter()
        self.num_periodic = 0
        self.force_work = ForceWork()
        self.problems: list[str] = []

    def stream(self, structures: Iterable[AtomicData]) -> Iterable[AtomicData]:
        stream = iter(structures)
        while window := list(islice(stream, WINDOW)):
            try:
                check_magnitudes(window)
            except DataError as error:
                self.problems = self.problems or [str(error)]
            for data in window:
                self._add(data)
                yield data

    def _add(self, data: AtomicData) -> None:
        counts = np.bincount(data.atomic_numbers.numpy(), minlength=119).astype("<i4")
        kind = self.compositions.setdefault(counts.tobytes(), len(self.compositions))
        force, stress = float(data.forces.norm(dim=1).max()), float(data.stress.abs().max())
        self.names.append(data.structure_id)
        self.rows.append((data.num_nodes, kind, float(data.energy), force, stress))
        self.groups.add(data.group)
        self.elements.update(np.flatnonzero(counts).tolist())
        self.charges[int(data.charge)] += 1
        self.num_periodic += bool(data.pbc.any())
        self.force_work.add(data)

    def columns(self, references: Mapping[int, float]) -> dict[str, NDArray[np.float64]]:
        """Returns numbers per structure: atoms, eV/atom as given and after references, eV/Å and eV/Å³."""
        natoms, kinds, energy, force, stress = np.array(self.rows, dtype=np.float64).T
        vector = np.zeros(119)
        vector[list(references)] = list(references.values())
        table = np.stack([np.frombuffer(key, dtype="<i4") for key in self.compositions])
        per_atom = energy / natoms
        residual = per_atom - (table @ vector)[kinds.astype(int)] / natoms
        return {"natoms": natoms, "energy": per_atom, "residual": residual, "force": force, "stress": stress}


def inspect(
    path: PathLike | list[PathLike], *, out: PathLike | None = None, show: bool = True, **options: Any
) -> Inspection:
    """Counts, ranges and distributions of any supported data; bad structures and implausible units are reported.

    The checksums of a prepared store are compared first.

    Args:
        path: see ``escaip.data.open_source``.
        out: directory for ``inspect.json`` and ``inspect.png``; None writes no files.
        show: print the table.
        **options: of ``escaip.data.open_source`` (``format``, ``keys``, ``units``, ``limit``, ``index``, ...).

    Raises:
        DataError: a file that cannot be read, a damaged store, or 0 structures.
    """
    report = ReadReport()
    for file in expand_paths(path):
        if is_store(file):
            Store(file).verify()
    options = {"on_error": "skip", **options, "check_units": False}
    try:
        inspection, values = inspect_structures(open_source(path, report=report, **options), report)
    except DataError as error:
        if report.read == 0 and report.messages:
            reason = f"{report.skipped} were skipped, the first: {report.messages[0]}"
            raise DataError(f"0 structures could be read, {reason}") from error
        raise
    if show:
        print(inspection.table())
    if out is not None:
        write_results(out, {"inspect.png": plot_inspection(values), "inspect.json": asdict(inspection)})
    return inspection


def inspect_structures(
    structures: Iterable[AtomicData], report: ReadReport | None = None
) -> tuple[Inspection, dict[str, NDArray[np.float64]]]:
    """Returns findings, and per structure ``natoms``, ``energy``, ``residual``, ``force`` and ``stress``.

    Magnitudes of ``structures`` are unchecked; their ``report`` is looked at when they are exhausted.

    Raises:
        DataError: no structures.
    """
    from ase.data import chemical_symbols

    collector, report = _Collector(), report or ReadReport()
    statistics = fit_statistics(collector.stream(structures), require_energy=False)
    values = collector.columns(statistics.element_references)
    problem = collector.force_work.problem()
    inspection = Inspection(
        num_structures=len(collector.names),
        num_skipped=report.skipped,
        num_groups=len(collector.groups),
        num_periodic=collector.num_periodic,
        elements={chemical_symbols[z]: count for z, count in sorted(collector.elements.items())},
        labels=statistics.label_counts,
        charges=dict(sorted(collector.charges.items())),
        **{key: Distribution.of(column) for key, column in values.items()},
        force_rms=None if np.isnan(statistics.force_rms) else statistics.force_rms,
        force_work=collector.force_work.ratio,
        references={chemical_symbols[z]: energy for z, energy in statistics.element_references.items()},
        problems=collector.problems + ([problem] if problem else []) + report.messages[:MAX_OUTLIERS],
        outliers=_outliers(collector.names, values["residual"], values["force"]),
    )
    return inspection, values


def plot_inspection(values: dict[str, NDArray[np.float64]]) -> Figure:
    """Returns histograms, drawn without touching matplotlib's global state."""
    from matplotlib.figure import Figure

    panels = (
        ("natoms", "atoms per structure", False),
        ("residual", "energy after references (eV/atom)", False),
        ("force", "largest force (eV/Å)", True),
        ("stress", "largest stress component (eV/Å³)", True),
    )
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axis, (key, label, logarithmic) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        data = _finite(values[key])
        axis.set_xlabel(label)
        axis.set_ylabel("structures")
        if logarithmic:
            data = data[data > 0]
        if len(data) == 0:
            axis.text(0.5, 0.5, "none", ha="center", va="center", transform=axis.transAxes)
            continue
        wide = logarithmic and data.max() > 10 * data.min()
        axis.hist(data, bins=list(np.geomspace(data.min(), data.max(), 60)) if wide else 60)
        axis.set_xscale("log" if wide else "linear")
    return figure


def _outliers(names: list[str], residual: NDArray[np.float64], force: NDArray[np.float64]) -> list[str]:
    found: list[str] = []
    known = _finite(residual)
    if len(known) > 3:
        middle = np.median(known)
        spread = 1.4826 * np.median(np.abs(known - middle))
        distance = np.nan_to_num(np.abs(residual - middle))
        for k in np.argsort(-distance)[:MAX_OUTLIERS].tolist():
            if distance[k] > max(_ENERGY_OUTLIER * spread, _ENERGY_FLOOR):
                found.append(f"{names[k]}: energy {residual[k]:+.3g} eV/atom from the references")
    largest = np.nan_to_num(force)
    limit = max(_FORCE_OUTLIER, 20.0 * float(np.median(_finite(force)))) if np.isfinite(force).any() else np.inf
    for k in np.argsort(-largest)[:MAX_OUTLIERS].tolist():
        if largest[k] > limit:
            found.append(f"{names[k]}: a force of {largest[k]:.3g} eV/Å")
    return found


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]
