"""Tiny potentials with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
from ase import Atoms

from escaip.calculators.lammps import LammpsDriver, open_lammps
from escaip.models import EScAIPConfig
from escaip.potential import Potential, PotentialMetadata

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "angular_channels": (3, 2, 1, 1, 1), "num_radial": 24,
    "distance_size": 12, "element_size": 8, "boo_size": 6, "boo_degrees": 6, "cutoff": 4.0, "num_neighbors": 8,
}  # fmt: skip

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
def make_potential() -> Callable[..., Potential]:
    def make(elements: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, **overrides: Any) -> Potential:
        torch.manual_seed(0)
        metadata = PotentialMetadata(elements=elements)
        potential = Potential(EScAIPConfig.from_dict({**SMALL, **overrides}), metadata=metadata).to(dtype).eval()
        potential.element_references.copy_(torch.linspace(-2.0, 2.0, 119, dtype=torch.float64))
        potential.scale.fill_(3.0)
        return potential

    return make


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
