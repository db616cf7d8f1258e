"""Lower precision rounds products of tokens, and nothing else; what is set around an evaluation is restored."""

from __future__ import annotations

import ase.build
import pytest
import torch
from torch_geometric.data import Batch

from escaip import EScAIPCalculator, EScAIPConfig, Potential
from escaip.data import AtomicData, collate
from escaip.errors import ConfigError


def make_potential(forces: str = "conservative") -> Potential:
    torch.manual_seed(0)
    return Potential(EScAIPConfig.preset("1m", forces=forces, num_layers=2)).eval()


def make_batch() -> Batch:
    structures = [ase.build.bulk("Cu", cubic=True).repeat((2, 1, 1)), ase.build.molecule("C6H6")]
    for atoms in structures:
        atoms.rattle(0.1, seed=0)
    return collate([AtomicData.from_ase(atoms) for atoms in structures])


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("how", ["option", "autocast"])
def test_bfloat16_is_close_and_returns_full_precision(forces: str, how: str) -> None:
    potential, batch = make_potential(forces), make_batch()
    exact = make_potential(forces).double()(batch)
    if how == "option":
        potential.precision = "bfloat16"
        found = potential(batch)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = potential(batch)
    assert found.energy.dtype == torch.float64
    assert found.forces.dtype == torch.float32
    error = (found.forces.double() - exact.forces).norm() / exact.forces.norm()
    assert 1e-5 < error < 0.1  # rounded, and no more than products of eight bits are
    spread = (exact.atomic_energies - exact.atomic_energies.mean()).norm()
    assert (found.atomic_energies - exact.atomic_energies).norm() < 0.02 * spread


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_a_training_step_under_autocast_has_gradients_of_the_weights_dtype(forces: str) -> None:
    potential, batch = make_potential(forces).train(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        prediction = potential(batch)
        loss = prediction.energy.sum() + prediction.forces.square().sum()
    loss.backward()
    assert all(
        w.grad is None or (w.grad.dtype == w.dtype and torch.isfinite(w.grad).all()) for w in potential.parameters()
    )


def test_float64_is_left_alone_and_settings_are_restored() -> None:
    potential, batch = make_potential().double(), make_batch()
    expected = potential(batch).forces
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(potential(batch).forces, expected)
        assert torch.is_autocast_enabled("cpu")
    single = make_potential()
    single.precision = "bfloat16"
    single(batch)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.bad_input
def test_precisions_that_cannot_be() -> None:
    potential, batch = make_potential(), make_batch()
    potential.precision = "half"
    with pytest.raises(ConfigError, match="precision 'half' does not exist"):
        potential(batch)
    potential.precision = "tf32"
    with pytest.raises(ConfigError, match="exists on CUDA devices"):
        potential(batch)
    with pytest.raises(ConfigError, match="is for float32 models"):
        EScAIPCalculator(make_potential().double(), device="cpu", precision="bfloat16")
