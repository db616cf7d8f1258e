"""Energy over volume and the third-order Birch–Murnaghan equation of state (Birch, Phys. Rev. 71, 809, 1947)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import ase.eos
import numpy as np
from ase import Atoms, units
from scipy.optimize import OptimizeWarning

from escaip.errors import ConfigError, SimulationError
from escaip.files import write_results
from escaip.properties.common import MODEL, at_rest, check_crystal, deformed, new_figure, table
from escaip.simulate.output import freeze


@dataclass(frozen=True)
class EquationOfState:
    """A Birch–Murnaghan fit.

    Attributes:
        frames: structures computed, by volume, with energy and forces.
        volumes: (m,) Å³, of the cell.
        energies: (m,) eV, of the cell.
        volume: Å³, at the minimum.
        energy: eV, at the minimum.
        bulk_modulus: GPa, at the minimum.
        derivative: ∂B/∂p at the minimum.
        residual: meV per atom, root mean square of the fit.
    """

    frames: list[Atoms]
    volumes: np.ndarray
    energies: np.ndarray
    volume: float
    energy: float
    bulk_modulus: float
    derivative: float
    residual: float

    @property
    def atoms(self) -> Atoms:
        """The cell scaled to the volume of the minimum, without calculator or further relaxation."""
        nearest = self.frames[int(np.abs(self.volumes - self.volume).argmin())].copy()
        nearest.set_cell(nearest.cell * (self.volume / nearest.get_volume()) ** (1 / 3), scale_atoms=True)
        return nearest

    def __call__(self, volume: np.ndarray) -> np.ndarray:
        """Returns energies of the fit, eV, at volumes in Å³."""
        modulus = self.bulk_modulus * units.GPa
        return np.asarray(ase.eos.birchmurnaghan(volume, self.energy, modulus, self.derivative, self.volume))

    def summary(self) -> str:
        """Returns a table of the fitted values."""
        lengths = ", ".join(f"{length:.4f}" for length in self.atoms.cell.lengths())
        count = len(self.frames[0])
        return table([
            ["V0", f"{self.volume:.4f} Å³", f"{self.volume / count:.4f} Å³/atom"],
            ["cell at V0", f"{lengths} Å", ""],
            ["E0", f"{self.energy:.6f} eV", f"{self.energy / count:.6f} eV/atom"],
            ["B0", f"{self.bulk_modulus:.2f} GPa", ""], ["B'", f"{self.derivative:.3f}", ""],
            ["fit", f"{self.residual:.2g} meV/atom", f"{len(self.volumes)} volumes"],
        ])  # fmt: skip

    def write(self, folder: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> None:
        """Writes ``eos.json``, ``eos.png`` and the structures, ``eos.extxyz``.

        ``about``, such as the origin of the model, stands first in the JSON.
        """
        figure = new_figure()
        axis = figure.subplots()
        count = len(self.frames[0])
        dense = np.linspace(self.volumes.min(), self.volumes.max(), 200)
        axis.plot(dense / count, 1e3 * (self(dense) - self.energy) / count, color=MODEL)
        axis.plot(self.volumes / count, 1e3 * (self.energies - self.energy) / count, "o", color=MODEL)
        axis.set(xlabel="volume (Å³/atom)", ylabel="energy above the minimum (meV/atom)")
        axis.set_title(f"V0 {self.volume / count:.3f} Å³/atom, B0 {self.bulk_modulus:.1f} GPa")
        values = {
            **(about or {}),
            "formula": self.frames[0].get_chemical_formula(), "form": "Birch-Murnaghan, third order",
            "V0_A3": self.volume, "E0_eV": self.energy, "B0_GPa": self.bulk_modulus, "B_prime": self.derivative,
            "residual_meV/atom": self.residual, "volumes_A3": self.volumes, "energies_eV": self.energies,
            "structure": self.atoms,
        }  # fmt: skip
        write_results(folder, {"eos.json": values, "eos.png": figure, "eos.extxyz": self.frames})


def fit_equation_of_state(
    atoms: Atoms, *, relaxation: str = "full", span: float = 0.06, points: int = 9, fmax: float = 1e-3, steps: int = 500
) -> EquationOfState:
    """Fits a Birch–Murnaghan equation to the energies of a crystal at several volumes.

    The cell keeps its shape, which a crystal that is not cubic would change under pressure: B0 is then the Voigt
    average of its elastic constants, which lies above the Reuss average, the modulus measured under pressure.

    Args:
        atoms: structure with a calculator; it is not changed.
        relaxation: ``"full"``: atoms and cell first, then atoms at each volume; ``"ions"``: atoms at each volume;
            ``"none"``: cell and fractional positions as they are, scaled.
        span: volumes lie within ``(1 ± span)`` of the start.
        points: number of volumes, at least 5.
        fmax: largest force at the end, eV/Å.
        steps: largest number of steps of each relaxation.

    Raises:
        ConfigError: not a crystal, no calculator, or a setting out of range.
        SimulationError: a relaxation did not converge, or the minimum is not among the volumes.
    """
    check_crystal(atoms, "equations of state")
    if not 0 < span < 0.5:
        raise ConfigError(f"span is {span}: it must be above 0 and below 0.5")
    if points < 5:
        raise ConfigError(f"points is {points}: four numbers are fitted, so it must be at least 5")
    start = at_rest(atoms, relaxation, fmax, steps)
    frames = []
    for ratio in np.linspace(1 - span, 1 + span, points):
        scaled = deformed(start, np.eye(3) * ratio ** (1 / 3))
        within = "none" if relaxation == "none" else "ions"
        frames.append(freeze(at_rest(scaled, within, fmax, steps, f"the structure at {ratio:.3f} of its volume")))
    volumes = np.array([frame.get_volume() for frame in frames])
    energies = np.array([frame.get_potential_energy() for frame in frames])
    lowest = int(energies.argmin())
    if lowest in (0, points - 1):
        raise SimulationError(
            f"the energy still falls at {volumes[lowest]:.3f} Å³, the {'smallest' if lowest == 0 else 'largest'} "
            "volume: start nearer to the minimum, relax the cell first, or raise span"
        )
    zero = float(energies.min())  # energies of thousands of eV would leave the fit no digits
    curve = ase.eos.EquationOfState(volumes, energies - zero, eos="birchmurnaghan")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # about the covariance, which is not used
            curve.fit(warn=False)
    except RuntimeError as error:
        raise SimulationError("no Birch-Murnaghan curve fits these energies: look at them, or lower span") from error
    energy, modulus, derivative, volume = (float(value) for value in curve.eos_parameters)
    if not (modulus > 0 and volumes.min() < volume < volumes.max()):
        raise SimulationError(
            f"the fit puts the minimum at {volume:.3f} Å³ with {modulus / units.GPa:.1f} GPa, which these volumes do "
            "not hold: relax the cell first, or raise span"
        )
    misfit = energies - zero - ase.eos.birchmurnaghan(volumes, energy, modulus, derivative, volume)
    residual = 1e3 * float(np.sqrt((misfit**2).mean())) / len(frames[0])
    return EquationOfState(frames, volumes, energies, volume, energy + zero, modulus / units.GPa, derivative, residual)
