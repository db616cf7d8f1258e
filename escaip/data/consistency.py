"""Do energies and forces belong together? Energy differences along a trajectory against the work of the forces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from escaip.data.atomic_data import AtomicData

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

    _ratios: list[float] = field(default_factory=list)
    _last: AtomicData | None = None

    def add(self, data: AtomicData) -> None:
        """Looks at the next structure of the stream."""
        last, self._last = self._last, data
        if last is None or last.num_nodes != data.num_nodes or len(self._ratios) >= MAX_PAIRS:
            return
        if not all(item.has_label("energy") and item.has_label("forces") for item in (last, data)):
            return
        if not bool((data.atomic_numbers == last.atomic_numbers).all()) or not bool((data.cell == last.cell).all()):
            return
        step = (data.positions - last.positions).numpy()
        work = -0.5 * float((step * (data.forces + last.forces).numpy()).sum())
        if float(np.abs(step).max()) < MAX_STEP and abs(work) > MIN_WORK:
            self._ratios.append(float(data.energy - last.energy) / work)

    @property
    def pairs(self) -> int:
        """How many pairs of structures were compared."""
        return len(self._ratios)

    @property
    def ratio(self) -> float | None:
        """Median ratio; None with fewer than 20 pairs, or when most pairs differ from it by more than half of it."""
        if len(self._ratios) < MIN_PAIRS:
            return None
        ratios = np.array(self._ratios)
        median = float(np.median(ratios))
        agreeing = np.mean(np.abs(ratios - median) < 0.5 * abs(median))
        return median if agreeing > 0.5 else None

    def problem(self) -> str | None:
        """What is wrong, or None."""
        ratio = self.ratio
        if ratio is None or 0.5 < ratio < 2.0:
            return None
        if ratio < 0:
            return f"forces point uphill (energy change per work of the forces {ratio:.3g}): the file holds gradients"
        return f"energies and forces are in different units (energy change per work {ratio:.4g}); state units"
