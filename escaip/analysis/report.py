"""The numbers of an analysis, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escaip.analysis.averages import Average
from escaip.analysis.radial import RadialDistribution
from escaip.analysis.spectra import Vibrations
from escaip.analysis.thermo import RunLog
from escaip.analysis.transport import Diffusion, Transport
from escaip.simulate.analysis import EnergyDrift

_MOST_LAGS = 1000
_DIFFUSIVE = 0.2


@dataclass(frozen=True)
class Analysis:
    """Result of :func:`escaip.analysis.analyze`; what was not asked for, or not possible, is None.

    Attributes:
        trajectory: the file.
        formula: of the system.
        num_atoms, num_frames: that were read.
        interval: fs between the frames read; None where nothing asked for it.
        radial: radial distribution functions.
        transport: mean-square displacements and diffusion.
        drift_removed: whether displacements are relative to the center of mass.
        vibrations: velocity autocorrelation and spectrum.
        density: g/cm³.
        temperature: K.
        pressure: GPa.
        drift: of the conserved energy.
        log: the lines of the log that were used.
        notes: what was left out and why, and what to be careful with.
    """

    trajectory: str
    formula: str
    num_atoms: int
    num_frames: int
    interval: float | None
    radial: RadialDistribution | None
    transport: Transport | None
    drift_removed: bool
    vibrations: Vibrations | None
    density: Average | None
    temperature: Average | None
    pressure: Average | None
    drift: EnergyDrift | None
    log: RunLog | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, the unit in each name; what is unknown is None."""
        values: dict[str, Any] = {
            "trajectory": self.trajectory,
            "formula": self.formula,
            "num_atoms": self.num_atoms,
            "num_frames": self.num_frames,
            "frame_interval_fs": self.interval,
            "density": _average(self.density, "g_per_cm3"),
            "temperature": _average(self.temperature, "K"),
            "pressure": _average(self.pressure, "GPa"),
            "drift": None,
            "rdf": _radial(self.radial),
            "msd": _transport(self.transport, self.drift_removed),
            "vacf": _vibrations(self.vibrations),
            "notes": list(self.notes),
        }
        if self.drift is not None:
            values["drift"] = {
                "slope_meV_per_atom_per_ps": self.drift.slope,
                "error_meV_per_atom_per_ps": self.drift.error,
                "fluctuation_meV_per_atom": self.drift.fluctuation,
            }
        return values

    def table(self) -> str:
        """Returns a table for a terminal."""
        head = f"{self.num_frames} frames of {self.formula} ({self.num_atoms} atoms)"
        if self.interval is not None:
            head += f", {self.interval:g} fs apart, {(self.num_frames - 1) * self.interval * 1e-3:g} ps"
        rows: list[tuple[str, str]] = []
        for name, average, unit in (
            ("density", self.density, "g/cm³"),
            ("temperature", self.temperature, "K"),
            ("pressure", self.pressure, "GPa"),
        ):
            if average is not None:
                rows.append((name, f"{_with_error(average.mean, average.error)} {unit}"))
        if self.drift is not None:
            rows.append(("energy drift", f"{self.drift.slope:+.3g} ± {self.drift.error:.2g} meV/atom/ps"))
        rows += self._shells() + self._diffusion() + self._frequencies()
        lines = [head, "", *(f"{name:<20}{text}" for name, text in rows)]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)

    def _shells(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        if self.radial is None:
            return rows
        for pair in shown(self.radial.g):
            shell = self.radial.first_shell(pair)
            if shell is not None:
                text = f"peak {shell.peak:.2f} Å, {shell.coordination:.2f} neighbors within {shell.end:.2f} Å"
                rows.append((f"g(r) {pair}", text))
        return rows

    def _diffusion(self) -> list[tuple[str, str]]:
        if self.transport is None:
            return []
        low, high = self.transport.window
        rows = [("diffusion", f"fitted from {low:g} to {high:g} fs, {self.transport.num_blocks} blocks")]
        for name in shown(self.transport.diffusion):
            found = self.transport.diffusion[name]
            rows.append((f"  D {name}", f"{_with_error(found.coefficient, found.error)} cm²/s{_warn(found)}"))
        return rows

    def _frequencies(self) -> list[tuple[str, str]]:
        found = self.vibrations
        if found is None:
            return []
        peaks = ", ".join(f"{peak:.0f}" for peak in np.sort(found.peaks[:8])) or "none"
        text = f"peaks {peaks} cm⁻¹; resolved to {found.resolution:.2g}, up to {found.highest:.0f} cm⁻¹"
        return [("vibrations", text)]


def shown(names: Iterable[str]) -> list[str]:
    """Names of groups or pairs without repetition: where there is one element, it and "all" are the same."""
    found = list(names)
    return found if len(found) > 2 else found[:1]


def _warn(found: Diffusion) -> str:
    if found.exponent is None or abs(found.exponent - 1) <= _DIFFUSIVE:
        return ""
    return f" (not diffusive: MSD grows as t^{found.exponent:.2f})"


def _with_error(value: float, error: float | None) -> str:
    if error is None:
        return f"{value:.4g} (too short for an error)"
    if not error > 0:
        return f"{value:.6g}"
    digits = max(2, 2 + int(np.floor(np.log10(max(abs(value), error)))) - int(np.floor(np.log10(error))))
    return f"{value:.{min(digits, 9)}g} ± {error:.2g}"


def _average(average: Average | None, unit: str) -> dict[str, Any] | None:
    if average is None:
        return None
    return {
        f"mean_{unit}": average.mean,
        f"error_{unit}": average.error,
        f"deviation_{unit}": average.deviation,
        "num_samples": average.num_samples,
    }


def _radial(found: RadialDistribution | None) -> dict[str, Any] | None:
    if found is None:
        return None
    pairs: dict[str, Any] = {}
    for pair, g in found.g.items():
        shell = found.first_shell(pair)
        pairs[pair] = {
            "g": _numbers(g),
            "neighbors_within_edge": _numbers(found.neighbors[pair]),
            "first_shell": None
            if shell is None
            else {"peak_A": shell.peak, "end_A": shell.end, "coordination": shell.coordination},
        }
    edges = _numbers(found.edges)
    return {"num_frames": found.num_frames, "distance_A": _numbers(found.distance), "edge_A": edges, "pairs": pairs}


def _transport(found: Transport | None, drift_removed: bool) -> dict[str, Any] | None:
    if found is None:
        return None
    chosen = thinned(len(found.lag))
    groups = {
        name: {
            "diffusion_cm2_per_s": diffusion.coefficient,
            "error_cm2_per_s": diffusion.error,
            "exponent": diffusion.exponent,
            "msd_A2": _numbers(found.msd[name][chosen]),
        }
        for name, diffusion in found.diffusion.items()
    }
    return {
        "center_of_mass_removed": drift_removed,
        "fit_from_fs": found.window[0],
        "fit_to_fs": found.window[1],
        "num_blocks": found.num_blocks,
        "lag_fs": _numbers(found.lag[chosen]),
        "groups": groups,
    }


def _vibrations(found: Vibrations | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "mass_weighted": found.mass_weighted,
        "resolution_per_cm": found.resolution,
        "highest_per_cm": found.highest,
        "peaks_per_cm": _numbers(found.peaks),
        "lag_fs": _numbers(found.lag),
        "vacf_A2_per_fs2": {name: _numbers(values) for name, values in found.vacf.items()},
        "frequency_per_cm": _numbers(found.frequency),
        "spectrum_cm": {name: _numbers(values) for name, values in found.spectrum.items()},
    }


def thinned(count: int) -> NDArray[np.int64]:
    """At most a thousand evenly spaced indices."""
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_LAGS)).astype(np.int64))


def _numbers(values: NDArray[np.float64]) -> list[float]:
    found: list[float] = values.tolist()
    return found
