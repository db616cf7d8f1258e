"""The tiny potential and the structures that tests of all areas share: ``from tiny import make_potential``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ase.build
import torch
from ase import Atoms
from torch_geometric.data import Batch

from escaip.data import AtomicData, collate
from escaip.models import EScAIPConfig
from escaip.potential import Potential, PotentialMetadata

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "angular_channels": (3, 2, 1, 1, 1), "num_radial": 24,
    "distance_size": 12, "element_size": 8, "boo_size": 6, "boo_degrees": 4, "cutoff": 4.0, "num_neighbors": 8,
}  # fmt: skip
TABLE: dict[str, Any] = {"num_radial": 12, "radial_width": 1.0, "distance_table": "always", "distance_knots": 96}
"""Distance embeddings from a spline table."""


def make_potential(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    elements: tuple[int, ...] = (),
    metadata: PotentialMetadata | None = None,
    kind: type[Potential] = Potential,
    **config_overrides: Any,
) -> Any:
    """Returns a potential with random weights, atomic energies of −2 to 2 eV and a scale of 3 eV, in evaluation mode.

    Where it has several energy heads, the last is chosen.

    Args:
        seed: of the weights.
        dtype: of the weights, which are drawn in float32.
        elements: that it supports; empty for all.
        metadata: in the place of ``elements``.
        kind: class of the potential.
        config_overrides: settings of the model instead of those of ``SMALL``.
    """
    torch.manual_seed(seed)
    config = EScAIPConfig.from_dict({**SMALL, **config_overrides})
    potential = kind(config, metadata=metadata or PotentialMetadata(elements=elements)).to(dtype).eval()
    potential.element_references.copy_(torch.linspace(-2.0, 2.0, 119, dtype=torch.float64))
    potential.scale.fill_(3.0)
    if potential.datasets:
        potential.choose_dataset(potential.datasets[-1])
    if potential.model.density is not None:
        density = potential.model.density
        for table in (density.channel, density.coefficients, density.mean):
            table.normal_(0.0, 0.1)
        density.spread.uniform_(0.5, 2.0)
    return potential


def methanol() -> Atoms:
    atoms = ase.build.molecule("CH3OH")
    atoms.rattle(0.05, seed=0)
    return atoms


def crystal() -> Atoms:
    """Rock salt, eight atoms off their sites."""
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def odd_structures() -> list[Atoms]:
    """One isolated atom, two out of reach of each other, a pair, a molecule, a cell of one atom."""
    apart = Atoms("CuH", positions=[[0, 0, 0], [0, 0, 50.0]])
    pair = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]])
    return rattled(Atoms("Cu"), apart, pair, ase.build.molecule("CH3CH2OH"), ase.build.bulk("Cu"))


def rattled(*structures: Atoms, width: float = 0.05) -> list[Atoms]:
    """Displaces atoms in place, differently in each structure."""
    for seed, atoms in enumerate(structures):
        atoms.rattle(width, seed=seed)
    return list(structures)


def batch_of(*structures: Atoms) -> Batch:
    """Returns a batch of structures; of methanol and the crystal without any."""
    return collate([AtomicData.from_ase(atoms) for atoms in structures or (methanol(), crystal())])


def same_bits_on_threads(function: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Asserts that a function gives the same bits when it is called again and on any number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(function())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for again in found[1:] for x, y in zip(found[0], again, strict=True))
    return found[0]
