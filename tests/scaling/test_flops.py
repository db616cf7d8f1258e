"""Operations by formula are those that PyTorch counts, and counting leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ase.build
import pytest
import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode
from torch_geometric.data import Batch

from escaip.data import AtomicData, collate
from escaip.errors import UsageError
from escaip.models import EScAIPConfig
from escaip.potential import Potential
from escaip.scaling.flops import (
    GraphShape,
    count_flops,
    flops_by_layer,
    mean_shape,
    operator_formulas,
    parameter_count,
    profile_flops,
    training_flops,
)

# Changes of the preset 300k.
MODELS: dict[str, dict[str, Any]] = {
    "300k": {},
    "1m": {"preset": "1m"},
    "wide": {"preset": "1m", "hidden_size": 256, "num_layers": 2, "num_heads": 8, "angular_channels": (12, 6, 2, 6, 6)},
    "exact distances": {"distance_table": "never"},
    "table for inference": {"distance_table": "inference"},
    "gate and mean": {"message_gate": True, "aggregation": "graph_attention"},
    "densities": {"node_density": 5, "angular_values": True},
    "network on edges": {"edge_ffn": True},
    "no angles": {"angular_channels": None, "angular_values": False},
    "heads": {"num_energy_heads": 3},
    "one layer": {"num_layers": 1, "charge": True, "spin": True, "energy_norm": False, "norm": "skip"},
    "dropout": {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth": 0.5, "boo_weighting": "uniform"},
    "multipliers": {"ffn_multiplier": 3, "readout_multiplier": 1, "output_multiplier": 4, "num_neighbors": None},
}


def make_batch() -> Batch:
    structures = [ase.build.bulk("Cu", cubic=True), ase.build.molecule("C6H6"), ase.Atoms("He")]
    for atoms in structures:
        atoms.rattle(0.05, seed=0)
    return collate([AtomicData.from_ase(atoms) for atoms in structures])


def make_config(model: str = "300k", forces: str = "conservative", **changes: Any) -> EScAIPConfig:
    return EScAIPConfig.from_dict({"preset": "300k", **MODELS[model], "forces": forces, **changes})


def train_step(potential: Potential, batch: Batch) -> None:
    prediction = potential(batch)
    (prediction.energy.square().sum() + prediction.forces.square().sum()).backward()


def counted(run: Callable[[], object], formulas: dict[Any, Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("model", MODELS)
def test_formula_is_what_pytorch_counts(model: str, forces: str) -> None:
    config, batch = make_config(model, forces), make_batch()
    modes = ["energy", "forces", "training", *(["energy_training"] if config.is_conservative else [])]
    found = {mode: count_flops(config, batch, mode) for mode in modes}
    # Within 5 % is what a study needs; there is no reason why it should not be all.
    assert found == {mode: profile_flops(config, batch, mode) for mode in found}


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("model", ["no angles", "gate and mean", "300k"])
def test_attention_costs_what_plain_matrices_cost(model: str, forces: str) -> None:
    """Where all neighborhoods are equally large nothing is padded, and PyTorch's own formulas count all."""
    config = make_config(model, forces, attention_backend="dense", num_neighbors=None, cutoff=4.0)
    batch = collate([AtomicData.from_ase(ase.build.bulk("Cu", cubic=True))] * 2)
    potential = Potential(config).train()
    assert counted(lambda: train_step(potential, batch), {}) == count_flops(config, batch)


@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_kernels_count_useful_work_alone(backend: str) -> None:
    config, batch = make_config(attention_backend=backend), make_batch()
    potential = Potential(config).train()
    found = counted(lambda: train_step(potential, batch), operator_formulas())
    assert found == count_flops(config, batch)
    without = counted(lambda: train_step(potential, batch), {})
    assert found - without == flops_by_layer(config, batch)["attention"]


@pytest.mark.parametrize("mode", ["forces", "training"])
def test_profiling_leaves_no_trace(mode: str) -> None:
    batch, random, registered = make_batch(), torch.get_rng_state(), dict(flop_counter.flop_registry)
    given = {key: value.clone() for key, value in batch.to_dict().items() if isinstance(value, Tensor)}
    profile_flops(make_config(), batch, mode)
    assert torch.equal(torch.get_rng_state(), random)
    assert flop_counter.flop_registry == registered
    assert torch.is_grad_enabled()
    for key, value in given.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=0, equal_nan=True)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("model", ["300k", "exact distances", "gate and mean", "one layer"])
def test_parameters_are_those_of_the_model(model: str, forces: str) -> None:
    config, batch = make_config(model, forces), make_batch()
    before = torch.get_rng_state()
    count = parameter_count(config)
    assert torch.equal(torch.get_rng_state(), before)
    potential = Potential(config).train()
    num_tokens = potential.graph_of(batch).num_tokens
    on_tokens = []

    def note(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs[0].shape[0] == num_tokens:
            on_tokens.append(module.weight.numel())

    for module in potential.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    potential(batch, compute_forces=False)
    named = dict(potential.model.named_parameters())
    assert count.total == sum(weight.numel() for weight in named.values())
    tables = ("element.weight", "charge.weight", "spin.weight")
    assert count.embedding == sum(weight.numel() for name, weight in named.items() if name.endswith(tables))
    assert count.non_embedding == count.total - count.embedding
    assert count.token == sum(on_tokens)


def test_a_run_is_the_sum_of_its_steps() -> None:
    config = make_config()
    molecules = [AtomicData.from_ase(ase.build.molecule(name)) for name in ("H2O", "C6H6", "CH3OH", "NH3")]
    batches = [collate(molecules[:2]), collate(molecules[2:])]
    expected = 3 * sum(count_flops(config, batch) for batch in batches)
    shape = mean_shape(molecules, config.graph)
    run = training_flops(config, shape, batch_size=2, steps=6)
    assert run == pytest.approx(expected, rel=1e-12)
    assert training_flops(config, shape, batch_size=2, steps=6, mode="energy_training") < run


def test_sizes_from_counts() -> None:
    config = make_config(forces="direct", num_neighbors=None, cutoff=4.0)
    crystal = collate([AtomicData.from_ase(ase.build.bulk("Cu", cubic=True))])
    exact = GraphShape.of_batch(crystal, config.graph)
    assert exact == GraphShape(4, 4 * 19, 4 * 19**2)  # 12 first and 6 second neighbors


@pytest.mark.bad_input
def test_what_cannot_be_counted() -> None:
    config, direct, batch = make_config(), make_config(forces="direct"), make_batch()
    for count in (count_flops, profile_flops):
        with pytest.raises(UsageError, match="mode 'train' does not exist: choose energy, forces"):
            count(config, batch, "train")
        with pytest.raises(UsageError, match="count mode training"):
            count(direct, batch, "energy_training")
