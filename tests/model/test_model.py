"""Options of the model: each builds, differentiates twice, and changes what it says it changes."""

from __future__ import annotations

from typing import Any

import ase.build
import pytest
import tiny
import torch
from tiny import batch_of

from escaip.data import AtomicData, collate
from escaip.potential import Potential

OPTIONS = [
    {},
    {"soft": False},
    {"num_neighbors": None},
    {"rank_step": "bump"},
    {"message_gate": True},
    {"aggregation": "graph_attention"},
    {"norm": "layernorm"},
    {"norm": "skip"},
    {"activation": "silu"},
    {"angular_channels": None},
    {"attention_scale": "expanded"},
    {"boo_weighting": "uniform"},
    {"charge": True, "spin": True},
    {"energy_norm": False},
    {"attention_backend": "reference"},
]


def make_potential(**overrides: Any) -> Potential:
    return tiny.make_potential(**{"dtype": torch.float32, "num_layers": 2, **overrides})


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(map(str, o)) or "default")
def test_every_option_trains_on_energy_and_forces(options: dict[str, object], forces: str) -> None:
    potential = make_potential(**{**options, "forces": forces}).train()
    prediction = potential(batch_of(), compute_stress=forces == "conservative")
    assert prediction.energy.dtype == torch.float64
    assert prediction.forces.shape == (14, 3)
    loss = prediction.energy.sum() + prediction.forces.square().sum()
    if prediction.stress is not None:
        assert torch.isnan(prediction.stress[0]).all()  # the molecule has no cell
        loss = loss + prediction.stress[1].square().sum()
    loss.backward()
    missing = [name for name, p in potential.named_parameters() if p.grad is None]
    assert not missing  # a head owns no parameter it never uses
    assert all(torch.isfinite(p.grad).all() for p in potential.parameters())


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "node_dropout", "edge_dropout",
                                  "scalar_dropout", "stochastic_depth", "vector_dropout"])  # fmt: skip
def test_regularisation_acts_in_training_only(name: str) -> None:
    potential = make_potential(**{"forces": "direct", name: 0.5})
    plain = make_potential(forces="direct")
    plain.load_state_dict(potential.state_dict())
    batch = batch_of()
    assert torch.equal(potential.eval()(batch).energy, plain.eval()(batch).energy)
    trained = [potential.train()(batch) for _ in range(6)]
    drawn = {(*x.energy.tolist(), *x.forces.flatten().tolist()) for x in trained}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    "change",
    [{"soft": False}, {"num_neighbors": None}, {"rank_step": "bump"}, {"attention_scale": "expanded"},
     {"boo_weighting": "uniform"}, {"boo_floor": 1e-2}, {"activation": "silu"}],
)  # fmt: skip
def test_options_without_parameters_change_the_function(change: dict[str, object]) -> None:
    # 3 neighbors, so that ranks matter.
    one = make_potential(num_neighbors=3).eval()
    other = make_potential(**{"num_neighbors": 3, **change}).eval()
    other.load_state_dict(one.state_dict())
    batch = batch_of()
    assert (one(batch).energy - other(batch).energy).abs().max() > 1e-6


def test_skipping_unread_edges_of_the_last_block_is_exact() -> None:
    """The conservative model computes N rows there; the direct one, with the same weights, all T."""
    direct = make_potential(forces="direct").double().eval()
    conservative = make_potential().double().eval()
    names = set(conservative.state_dict())
    conservative.load_state_dict({k: v for k, v in direct.state_dict().items() if k in names})
    batch = batch_of()
    torch.testing.assert_close(conservative(batch).energy, direct(batch).energy, rtol=1e-12, atol=1e-12)


def test_charge_and_spin_matter_only_when_asked_for() -> None:
    neutral, charged = ase.build.molecule("CH3OH"), ase.build.molecule("CH3OH")
    charged.info["charge"] = 1
    charged.info["spin_multiplicity"] = 2
    batch = collate([AtomicData.from_ase(neutral), AtomicData.from_ase(charged)])
    plain = make_potential().eval()(batch).energy
    aware = make_potential(charge=True, spin=True).eval()(batch).energy
    assert plain[0] == pytest.approx(plain[1].item(), rel=1e-6)
    assert (aware[0] - aware[1]).abs() > 1e-5


def test_per_atom_parts_are_computed_per_atom() -> None:
    """The largest input of every per-atom layer has N rows, not T."""
    potential = make_potential().eval()
    rows: dict[str, int] = {}
    for name, module in potential.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, inputs, out, name=name: rows.update({name: inputs[0].shape[0]}))
    batch = batch_of()
    potential(batch)
    num_atoms = batch.positions.shape[0]
    per_atom = ("source.", "target.", "sender", "receiver", "node_", "energy_head")
    checked = [name for name in rows if any(part in name for part in per_atom)]
    assert len(checked) > 10
    assert all(rows[name] == num_atoms for name in checked)
    assert rows["basis" if "basis" in rows else "attributes.distance_embedding"] > num_atoms


def test_forward_does_not_change_its_batch() -> None:
    batch = batch_of()
    before = batch.clone()
    make_potential().eval()(batch, compute_stress=True)
    assert set(batch.keys()) == set(before.keys())
    for key in ("positions", "cell", "atomic_numbers", "pbc"):
        assert torch.equal(batch[key], before[key])
        assert not batch[key].requires_grad
