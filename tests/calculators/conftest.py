"""LAMMPS with a structure and a potential."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import pytest
from ase import Atoms

from escaip.calculators.lammps import LammpsDriver, open_lammps
from escaip.potential import Potential

LAMMPS = """
units {units}
boundary {boundary}
atom_style atomic
read_data {data}
pair_style zero 2.0
pair_coeff * *
neighbor 1.0 bin
neigh_modify every 1 delay 0 check no   # atoms change places at every step
fix potential all external pf/callback 1 1
thermo_style custom step pe pxx pyy pzz pxy pxz pyz vol
thermo 1
"""


@pytest.fixture
def start(make_potential: Callable[..., Potential], tmp_path: Path) -> Iterator[Callable[..., LammpsDriver]]:
    """LAMMPS with a structure and a potential, ended with the test."""
    drivers = []

    def begin(atoms: Atoms, potential: Potential | None = None, style: str = "metal", **options: Any) -> LammpsDriver:
        elements = sorted(set(atoms.symbols))
        data = tmp_path / "start.data"
        written = {"specorder": elements, "masses": True, "units": style, "velocities": atoms.has("momenta")}
        ase.io.write(data, atoms, format="lammps-data", **written)
        lammps = open_lammps(["-log", "none", "-screen", "none"])
        driver = LammpsDriver(potential or make_potential(), elements, lammps, **options)
        boundary = " ".join("p" if periodic else "s" for periodic in atoms.pbc)
        driver.commands(LAMMPS.format(units=style, boundary=boundary, data=data))
        drivers.append(driver)
        return driver

    yield begin
    for driver in drivers:
        driver.lammps.close()
