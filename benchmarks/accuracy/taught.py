"""Crystals that the accuracy bench teaches: those of ``property_teachers.py``, and silicon by SNAP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from property_teachers import TEACHERS, Teacher

from escaip.calculators.lammps import lammps_potential


def snap() -> Any:
    """Returns linear SNAP of silicon (Zuo et al., J. Phys. Chem. A 124, 731, 2020), a file of LAMMPS's wheel."""
    files = "Si_Zuo_JPCA2020.snapcoeff Si_Zuo_JPCA2020.snapparam"
    return lammps_potential(["pair_style snap", f"pair_coeff * * {files} Si"], ["Si"])


# A cutoff of three shells, just beyond SNAP's own of 4.9 Å; the fourth is at 5.47 Å.
TAUGHT = {**TEACHERS, "silicon_snap": Teacher("Si", 5.47, 5.0, 300.0, 2.0, 0.12, 0.05, snap, "diamond")}
