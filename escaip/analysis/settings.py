"""What is asked of a trajectory, checked before it is read."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from escaip.errors import ConfigError

QUANTITIES = ("rdf", "msd", "vacf", "density", "temperature", "pressure", "drift")


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of an analysis; times in fs, distances in Å.

    Attributes:
        quantities: some of :data:`QUANTITIES`; None for all that the trajectory allows.
        start, stop, every: which frames; ``stop`` is excluded.
        timestep: fs between frames of the file, for files that do not say.
        log: of the run; by default the ``.csv`` beside the trajectory.
        r_max: of radial distributions; by default half the smallest width of the cell, at most 10.
        bin_width: of radial distributions.
        fit: first and last lag of the linear fit to the mean-square displacement; by default 0.1 to 0.5 of a block.
        num_blocks: parts in time that give the error of diffusion coefficients.
        unwrap: follow atoms through periodic boundaries; without, positions count as they are.
        remove_drift: take the motion of the center of mass off displacements, unless an atom is fixed or there is one
            atom only.
        vacf_length: of the velocity autocorrelation; by default half of the trajectory, at most 5000.
        mass_weighted: whether the spectrum weights atoms with their masses.

    Raises:
        ConfigError: a value is out of range.
    """

    quantities: tuple[str, ...] | None = None
    start: int = 0
    stop: int | None = None
    every: int = 1
    timestep: float | None = None
    log: str | os.PathLike[str] | None = None
    r_max: float | None = None
    bin_width: float = 0.05
    fit: tuple[float, float] | None = None
    num_blocks: int = 5
    unwrap: bool = True
    remove_drift: bool = True
    vacf_length: float | None = None
    mass_weighted: bool = True

    def __post_init__(self) -> None:
        for name in self.quantities or ():
            if name not in QUANTITIES:
                raise ConfigError(f"quantity {name!r} is unknown: choose {', '.join(QUANTITIES)}")
        if self.quantities is not None and not self.quantities:
            raise ConfigError(f"no quantity is asked for: choose {', '.join(QUANTITIES)}")
        for name in ("timestep", "r_max", "bin_width", "vacf_length"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} is {value}: it must be above 0")
        if self.num_blocks < 1:
            raise ConfigError(f"num_blocks is {self.num_blocks}: it must be at least 1")
