"""Training on conservative forces through the Triton kernels (in their interpreter without a GPU) and the reference."""

from __future__ import annotations

import ase.build
import pytest
import torch
from tiny import batch_of, make_potential

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def losses(backend: str, steps: int) -> list[float]:
    options = {"num_heads": 1, "angular_channels": (8, 4, 4), "attention_backend": backend}
    potential = make_potential(dtype=torch.float32, **options).to(DEVICE).train()
    potential.element_references.zero_()
    molecule = ase.build.molecule("CO")
    molecule.rattle(0.1, seed=1)
    batch = batch_of(molecule).to(DEVICE)
    bond = batch.positions[1] - batch.positions[0]
    target = 0.5 * torch.stack([bond, -bond]).float()  # what a gradient of an energy can be
    optimizer = torch.optim.Adam(potential.parameters(), lr=5e-3)
    seen = []
    for _ in range(steps):
        prediction = potential(batch, create_graph=True)
        loss = (prediction.forces - target).square().mean() + 0.1 * prediction.energy.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


@pytest.mark.slow
def test_steps_give_the_losses_of_the_reference() -> None:
    fused, plain = losses("triton", 12), losses("reference", 12)
    assert plain[-1] < 0.8 * plain[0]
    # float32 in another order of sums: rounding, which a dozen steps of Adam do not blow up.
    assert fused == pytest.approx(plain, abs=1e-3 * plain[0])
