"""The whole model under torch.compile: one graph for all sizes, and eager's answers."""

from __future__ import annotations

import ase.build
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch

from escaip import EScAIPConfig, Potential
from escaip.data import AtomicData, collate
from escaip.graph import build_graph
from escaip.graph.geometry import compute_geometry

TINY = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "angular_channels": [3, 3, 2], "num_radial": 8,
    "distance_size": 8, "element_size": 4, "boo_size": 4, "boo_degrees": 3, "num_neighbors": 6,
}  # fmt: skip


def batches() -> list[Batch]:
    """Ten, no two of one size: molecules and crystals together."""
    made = []
    for seed in range(10):
        crystal = ase.build.bulk("Cu", cubic=True).repeat((1 + seed % 3, 1, 1))
        structures = [crystal, ase.build.molecule("CH3CH2OH"), *[ase.build.molecule("H2O")] * (1 + seed)]
        for atoms in structures:
            atoms.rattle(0.05, seed=seed)
        made.append(collate([AtomicData.from_ase(atoms) for atoms in structures]))
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at inputs
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_graph_serves_ten_sizes() -> None:
    """Energy, its gradient with respect to positions and weights; at most two compilations.

    On one thread as all tests here run, where Inductor's own sums over repeated indices are wrong (escaip/ops/rows.py).
    """
    potential = Potential(EScAIPConfig.from_dict(TINY)).double()
    model, settings = potential.model, potential.config.graph
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)

    def run(function: torch.nn.Module, batch: Batch) -> list[Tensor]:
        graph = build_graph(batch, settings)
        positions = batch.positions.double().requires_grad_()
        geometry = compute_geometry(positions, batch.cell.double(), batch.batch, graph, settings, torch.float64)
        arguments = (batch.atomic_numbers, graph, geometry, batch.batch, batch.charge, batch.spin_multiplicity)
        energy = function(*arguments).energy
        weights = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(energy.sum(), [positions, *weights], allow_unused=True)
        return [energy, *(g for g in gradients if g is not None)]

    for batch in batches():
        for found, expected in zip(run(compiled, batch), run(model, batch), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
