"""Names, shapes, options and tasks of published models: what is taken, and the one line for what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import COMMITTED, load
from torch import Tensor

from escaip import Potential
from escaip.errors import CheckpointError, DataError, UnsupportedElementError
from escaip.interop import from_fairchem
from escaip.interop.fairchem.options import RANK_TRUNCATION

CONSERVATIVE, DIRECT = load(COMMITTED, "conservative"), load(COMMITTED, "direct")
GRADIENT = "fairchem.core.models.escaip.EScAIP.EScAIPGradientEnergyForceStressHead"


def energy_of(potential: Potential, group: str = "triclinic") -> Tensor:
    return potential(CONSERVATIVE.batch(group)).energy.detach()


def task(kind: str, rmsd: Any = 1.0, mean: Any = 0.0, **more: Any) -> dict[str, Any]:
    return {"name": f"the_{kind}", "property": kind, "normalizer": {"mean": mean, "rmsd": rmsd}, **more}


def refuses(message: str, weights: Any = None, config: Any = None, tasks: Any = None) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_fairchem(weights or CONSERVATIVE.weights, config or CONSERVATIVE.config, tasks=tasks)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_recorded() -> None:
    config = from_fairchem(CONSERVATIVE.weights, CONSERVATIVE.config).config
    assert config.rank_truncation == RANK_TRUNCATION == 20
    assert (config.boo_weighting, config.force_weighting, config.attention_scale) == ("uniform", "uniform", "expanded")
    assert not config.energy_norm
    assert config.periodic
    assert config.distance_table == "never"
    assert from_fairchem(DIRECT.weights, DIRECT.config).config.energy_norm


def test_weights_keep_their_values_and_the_given_ones_are_not_changed() -> None:
    before = {name: tensor.clone() for name, tensor in CONSERVATIVE.weights.items()}
    state = from_fairchem(CONSERVATIVE.weights, CONSERVATIVE.config).model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in CONSERVATIVE.weights.items())
    unused = "output_heads.efs.node_norm.weight"
    padding = 2 * (2 + 1) * (119 - 32) * 4  # two tables in the input layer and in each of two blocks
    assert sum(t.numel() for t in state.values()) == padding + sum(
        t.numel() for name, t in before.items() if name != unused
    )


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod."])
def test_averaged_and_wrapped_names(prefix: str) -> None:
    old, new = "output_heads.efs.", "output_heads.any name.head."
    weights = {f"{prefix}{name.replace(old, new)}": tensor for name, tensor in CONSERVATIVE.weights.items()}
    weights["n_averaged"] = torch.tensor(12)
    plain = from_fairchem(CONSERVATIVE.weights, CONSERVATIVE.config)
    assert torch.equal(energy_of(from_fairchem(weights, CONSERVATIVE.config)), energy_of(plain))
    wrapped = {"module": "x.y.DatasetSpecificSingleHeadWrapper", "head_cls": GRADIENT}
    config = {"backbone": CONSERVATIVE.config, "heads": {"any name": wrapped}}
    assert torch.equal(energy_of(from_fairchem(weights, config)), energy_of(plain))


def test_an_energy_head_without_gradients_has_its_norm() -> None:
    """Trained for energies alone: the norm of the head counts, and edges of the last block are stored but not read."""
    options = {**CONSERVATIVE.config, "regress_forces": False}
    last = "backbone.transformer_blocks.1."
    first = {n: t for n, t in CONSERVATIVE.weights.items() if "blocks.0." in n and ("mlp_edge" in n or "ffn_edge" in n)}
    weights = {**CONSERVATIVE.weights, **{name.replace("blocks.0.", "blocks.1."): t for name, t in first.items()}}
    assert any(name.startswith(f"{last}norm_ffn_edge") for name in weights)
    potential = from_fairchem(weights, options)
    assert potential.config.energy_norm
    norm = potential.model.energy_head.norm.weight.double()
    assert torch.equal(norm, CONSERVATIVE.weights["output_heads.efs.node_norm.weight"])
    assert not torch.equal(energy_of(potential), energy_of(from_fairchem(CONSERVATIVE.weights, CONSERVATIVE.config)))


def test_tables_of_more_elements_than_exist() -> None:
    weights = dict(CONSERVATIVE.weights)
    for name, table in CONSERVATIVE.weights.items():
        if "atomic_embedding" in name:
            weights[name] = torch.cat([table, torch.ones(130 - len(table), table.shape[1])])
    potential = from_fairchem(weights, CONSERVATIVE.config)
    assert potential.metadata.elements == tuple(range(1, 119))
    assert torch.equal(energy_of(potential), energy_of(from_fairchem(CONSERVATIVE.weights, CONSERVATIVE.config)))


@pytest.mark.bad_input
def test_elements_without_a_row_are_refused() -> None:
    potential = from_fairchem(CONSERVATIVE.weights, CONSERVATIVE.config)
    assert potential.metadata.elements == tuple(range(1, 32))
    batch = CONSERVATIVE.batch("molecule")
    batch.atomic_numbers[0] = 32
    with pytest.raises(UnsupportedElementError, match="Ge"):
        potential(batch)


@pytest.mark.bad_input
def test_a_model_without_periodicity_refuses_periodic_structures() -> None:
    options = {**CONSERVATIVE.config, "use_pbc": False}
    potential = from_fairchem(CONSERVATIVE.weights, options)
    batch = CONSERVATIVE.batch("molecule")
    with pytest.raises(DataError, match="system 0 is periodic, but the model treats every structure as open"):
        potential(batch)
    batch.pbc[:] = False
    boxed = from_fairchem(CONSERVATIVE.weights, CONSERVATIVE.config)
    torch.testing.assert_close(potential(batch).energy, boxed(CONSERVATIVE.batch("molecule")).energy)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("knn_soft", False), ("knn_use_low_mem", False), ("distance_function", "silu"), ("use_envelope", False),
        ("use_angle_embedding", "bias"), ("use_graph_attention", True), ("use_global_readout", True),
        ("energy_reduce", "mean"), ("use_fp16_backbone", True), ("freequency_list", [3, 1, 1, 1, 1, 1]),
        ("freequency_list", [0, 4, 4]),
    ],
)  # fmt: skip
def test_options_that_cannot_be_computed(name: str, value: Any) -> None:
    refuses(f"fairchem option {name}: {value} is not supported (", config={**CONSERVATIVE.config, name: value})


@pytest.mark.bad_input
def test_configurations_that_are_none() -> None:
    incomplete = {key: value for key, value in CONSERVATIVE.config.items() if key != "knn_k"}
    refuses("fairchem option knn_k is missing", config=incomplete)
    refuses("activation 'relu' has a kink", config={**CONSERVATIVE.config, "activation": "relu"})
    refuses("'smelu' does not exist", config={**CONSERVATIVE.config, "activation": "smelu"})
    refuses("value of a wrong type", config={**CONSERVATIVE.config, "num_layers": "many"})
    refuses("boo_degrees is 12", config={**CONSERVATIVE.config, "node_direction_expansion_size": 12})
    refuses(
        "backbone AllScAIPBackbone is not supported",
        config={**CONSERVATIVE.config, "model": "fairchem.core.models.allscaip.AllScAIP.AllScAIPBackbone"},
    )
    heads = {"efs": {"module": "fairchem.core.models.uma.escn_md.MLP_EFS_Head"}}
    refuses("head efs is a MLP_EFS_Head", config={"backbone": CONSERVATIVE.config, "heads": heads})
    refuses("names no module", config={"backbone": CONSERVATIVE.config, "heads": {"efs": None}})
    with pytest.warns(UserWarning, match="ignored, as there: a_new_option"):
        from_fairchem(CONSERVATIVE.weights, {**CONSERVATIVE.config, "a_new_option": 1})


@pytest.mark.bad_input
def test_weights_that_do_not_fit() -> None:
    weights = CONSERVATIVE.weights
    name = "backbone.transformer_blocks.1.graph_attention.attn_in_proj_q.weight"
    refuses(f"lack {name}", weights={key: value for key, value in weights.items() if key != name})
    extra = "output_heads.efs.extra.weight"
    refuses(f"{extra} have no counterpart", weights={**weights, extra: torch.ones(2)})
    refuses("have shape (3, 16), the configuration asks for (16, 16)", weights={**weights, name: torch.ones(3, 16)})
    joined = name.replace("attn_in_proj_q", "node_hidden_linear.0")
    refuses("expected 32 columns", weights={**weights, joined: torch.ones(16, 30)})
    refuses("no counterpart", config={**CONSERVATIVE.config, "num_layers": 1})
    for option in ("edge_distance_expansion_size", "ffn_hidden_layer_multiplier"):
        refuses("the configuration asks for (", config={**CONSERVATIVE.config, option: 10**9})
    refuses("these are no weights of EScAIP", weights={"backbone.blocks.0.weight": torch.ones(2)})
    refuses("are a str, expected a tensor", weights={**weights, name: "text"})
    allscaip = "backbone.transformer_blocks.0.neighborhood_attention.src_attn_res_scale"
    refuses("weights of AllScAIP", weights={allscaip: torch.ones(())})


@pytest.mark.bad_input
def test_heads_that_do_not_fit() -> None:
    two = {n.replace("heads.efs", "heads.other"): t for n, t in CONSERVATIVE.weights.items() if "heads" in n}
    refuses("EScAIP heads efs, other", weights={**CONSERVATIVE.weights, **two})
    no_force = {name: t for name, t in DIRECT.weights.items() if "heads.forces" not in name}
    refuses("direct_forces is True but the model has no head", weights=no_force, config=DIRECT.config)
    refuses("direct_forces is False but the model has a head", weights=DIRECT.weights)
    heads = {"energy": {"module": GRADIENT}}
    refuses("takes gradients beside direct forces", DIRECT.weights, {"backbone": DIRECT.config, "heads": heads})


def test_tasks_set_scale_and_references() -> None:
    references = [0.5 * z for z in range(25)]
    tasks = [task("energy", 2.5, element_references={"element_references": references}), task("forces", 2.5)]
    potential = from_fairchem(CONSERVATIVE.weights, CONSERVATIVE.config, tasks=tasks)
    bare = from_fairchem(CONSERVATIVE.weights, CONSERVATIVE.config)
    batch = CONSERVATIVE.batch("triclinic")
    expected = 2.5 * energy_of(bare) + 0.5 * batch.atomic_numbers.sum()
    torch.testing.assert_close(energy_of(potential), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(potential(batch).forces, 2.5 * bare(batch).forces)
    assert potential.metadata.elements == tuple(range(1, 25))


def test_direct_forces_may_have_a_scale_of_their_own() -> None:
    bare = from_fairchem(DIRECT.weights, DIRECT.config)
    tasks = [task("energy", 4.0), task("forces", 0.5)]
    potential = from_fairchem(DIRECT.weights, DIRECT.config, tasks=tasks)
    batch = DIRECT.batch("triclinic")
    torch.testing.assert_close(potential(batch).forces, 0.5 * bare(batch).forces)
    torch.testing.assert_close(potential(batch).energy, 4.0 * bare(batch).energy)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task("energy", 2.0, 3.0)], "the_energy adds its mean 3 to each energy"),
        ([task("energy"), task("forces", 1.0, 0.1)], "the_forces adds its mean 0.1 to each component"),
        ([task("energy", 2.0), task("forces", 1.0)], "the_forces scales forces by 1 but energies by 2"),
        ([task("energy", 2.0), task("stress", 1.0)], "the_stress scales stress by 1 but energies by 2"),
        ([task("energy"), task("energy")], "give the data set default two energies"),
        ([task("forces")], "no fairchem task has the property energy"),
        ([task("energy", -1.0)], "has rmsd -1"),
        ([task("energy", "wide")], "has a normalizer of str"),
        ([{**task("energy"), "normalizer": {"file": "normalizers.pt"}}], "has a normalizer given by file"),
        ([{**task("energy"), "normalizer": 3}], "has a normalizer that is no mapping"),
        ([task("energy", element_references={"file": "refs.pt"})], "element references that are no numbers"),
        ([task("energy", element_references={"element_references": {"_target_": "os.system"}})], "no numbers"),
        (["energy"], "a fairchem task is a str"),
    ],
)
def test_tasks_that_a_potential_cannot_represent(tasks: Any, message: str) -> None:
    refuses(message, tasks=tasks)


@pytest.mark.bad_input
def test_sets_that_scale_direct_forces_differently() -> None:
    tasks = [
        task("energy", 2.0, datasets=["a"]),
        task("energy", 3.0, datasets=["b"]),
        task("forces", datasets=["a", "b"]),
    ]
    tasks[1]["name"] = "b_energy"
    refuses("scale the forces of a, b differently", DIRECT.weights, DIRECT.config, tasks)
