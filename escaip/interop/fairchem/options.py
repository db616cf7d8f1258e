"""Translation of the options of a published EScAIP, as fairchem-core 2.24 names them, into ours."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from escaip.errors import CheckpointError, ConfigError
from escaip.models import EScAIPConfig
from escaip.ops.harmonics import PUBLISHED_FLOOR
from escaip.ops.reference import MAX_L

GRADIENT_HEAD = "EScAIPGradientEnergyForceStressHead"
ENERGY_HEAD = "EScAIPEnergyHead"
FORCE_HEAD = "EScAIPDirectForceHead"
# Registered name or class name -> class name.
_HEADS = {
    "EScAIP_grad_energy_force_stress_head": GRADIENT_HEAD,
    "EScAIP_energy_head": ENERGY_HEAD,
    "EScAIP_direct_force_head": FORCE_HEAD,
    GRADIENT_HEAD: GRADIENT_HEAD,
    ENERGY_HEAD: ENERGY_HEAD,
    FORCE_HEAD: FORCE_HEAD,
}
_WRAPPER = "DatasetSpecificSingleHeadWrapper"
_BACKBONES = ("EScAIPBackbone", "EScAIP_backbone")

# Number of candidates after the k-th that count in the soft ranks of the published code.
RANK_TRUNCATION = 20

_REQUIRED = (
    "regress_forces", "direct_forces", "hidden_size", "num_layers", "use_pbc", "max_num_elements", "max_radius",
    "knn_k", "knn_soft", "knn_sigmoid_scale", "knn_lse_scale", "knn_use_low_mem", "atten_num_heads",
)  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "activation": "gelu", "normalization": "rmsnorm", "atom_embedding_size": 128,
    "node_direction_embedding_size": 64, "node_direction_expansion_size": 10, "edge_distance_expansion_size": 600,
    "edge_distance_embedding_size": 512, "readout_hidden_layer_multiplier": 2, "output_hidden_layer_multiplier": 2,
    "ffn_hidden_layer_multiplier": 2, "use_message_gate": False, "use_frequency_embedding": True,
    "freequency_list": (20, 10, 4, 10, 20), "mlp_dropout": 0.0, "atten_dropout": 0.0, "stochastic_depth_prob": 0.0,
    "node_ffn_dropout": 0.0, "edge_ffn_dropout": 0.0, "scalar_output_dropout": 0.0, "vector_output_dropout": 0.0,
}  # fmt: skip
# Setting of EScAIPConfig -> option.
_RENAMED = {
    "hidden_size": "hidden_size", "num_layers": "num_layers", "num_heads": "atten_num_heads", "cutoff": "max_radius",
    "num_neighbors": "knn_k", "rank_scale": "knn_sigmoid_scale", "envelope_scale": "knn_lse_scale",
    "periodic": "use_pbc", "num_radial": "edge_distance_expansion_size",
    "distance_size": "edge_distance_embedding_size", "element_size": "atom_embedding_size",
    "boo_degrees": "node_direction_expansion_size", "boo_size": "node_direction_embedding_size",
    "ffn_multiplier": "ffn_hidden_layer_multiplier",
    "readout_multiplier": "readout_hidden_layer_multiplier", "output_multiplier": "output_hidden_layer_multiplier",
    "message_gate": "use_message_gate", "activation": "activation", "norm": "normalization", "dropout": "mlp_dropout",
    "attention_dropout": "atten_dropout", "node_dropout": "node_ffn_dropout", "edge_dropout": "edge_ffn_dropout",
    "scalar_dropout": "scalar_output_dropout", "vector_dropout": "vector_output_dropout",
    "stochastic_depth": "stochastic_depth_prob",
}  # fmt: skip
# Option -> the only value supported here, and why the others are not.
_ONLY: dict[str, tuple[Any, str]] = {
    "knn_soft": (True, "its hard ranks break ties by chance"),
    "knn_use_low_mem": (True, "the sum of sigmoids over all atoms has no cutoff"),
    "distance_function": ("gaussian", "there are no other basis functions here"),
    "use_envelope": (True, "the energy would jump whenever a neighbor enters or leaves"),
    "use_angle_embedding": ("none", "there is no such bias of attention here"),
    "use_graph_attention": (False, "its weights jump whenever a neighbor enters or leaves"),
    "use_global_readout": (False, "energies are sums over atoms here"),
    "energy_reduce": ("sum", "energies are sums over atoms here"),
    "use_fp16_backbone": (False, "half precision is not supported"),
}
# Options without effect on the results of a trained model.
_WITHOUT_EFFECT = (
    "model", "regress_stress", "use_compile", "use_padding", "dataset_list", "max_atoms", "max_batch_size",
    "knn_pad_size", "atten_name", "angle_expansion_size", "angle_embedding_size",
)  # fmt: skip


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Separates a model's configuration into backbone options and the class of each head.

    Args:
        config: ``{"backbone": {...}, "heads": {...}}``, or the options of the backbone alone.

    Raises:
        CheckpointError: another architecture, or heads of another architecture.
    """
    backbone = config.get("backbone", config)
    if not isinstance(backbone, Mapping):
        raise CheckpointError(f"fairchem option backbone is a {type(backbone).__name__}, expected a mapping of options")
    model = str(backbone.get("model", _BACKBONES[0])).rpartition(".")[2]
    if model not in _BACKBONES:
        raise CheckpointError(f"fairchem backbone {model} is not supported: only EScAIP can be imported")
    heads = config.get("heads") if "backbone" in config else None
    return dict(backbone), {str(name): _head_class(str(name), head) for name, head in (heads or {}).items()}


def translate(options: Mapping[str, Any], *, energy_norm: bool, distance_table: str = "never") -> EScAIPConfig:
    """Returns the configuration of an equivalent model.

    Args:
        options: of the backbone; missing ones have fairchem-core's defaults.
        energy_norm: whether the energy head has a norm (its gradient head has none).
        distance_table: of ``EScAIPConfig``.

    Raises:
        CheckpointError: an option is missing, or has a value that cannot be computed here; the message names it.
    """
    missing = [name for name in _REQUIRED if name not in options]
    if missing:
        raise CheckpointError(f"fairchem option {missing[0]} is missing: pass the whole configuration of the backbone")
    for name, (allowed, why) in _ONLY.items():
        if options.get(name, allowed) != allowed:
            raise CheckpointError(
                f"fairchem option {name}: {options[name]} is not supported ({why}): use fairchem-core for this model"
            )
    unknown = sorted(set(options) - {*_REQUIRED, *_DEFAULTS, *_ONLY, *_WITHOUT_EFFECT})
    if unknown:
        warnings.warn(f"unknown to fairchem-core 2.24 and ignored, as there: {', '.join(unknown)}", stacklevel=3)
    o = {**_DEFAULTS, **options}
    try:
        kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(EScAIPConfig)}
        return EScAIPConfig(
            **{ours: kinds[ours](o[theirs]) for ours, theirs in _RENAMED.items()},
            angular_channels=_angular_channels(o),
            attention_scale="expanded",
            rank_truncation=RANK_TRUNCATION,
            forces="direct" if is_direct(o) else "conservative",
            distance_table=distance_table,
            boo_weighting="uniform",
            boo_floor=PUBLISHED_FLOOR,
            force_weighting="uniform",
            energy_norm=energy_norm,
        )
    except ConfigError as error:
        raise CheckpointError(f"the fairchem configuration has no counterpart here: {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the fairchem configuration has a value of a wrong type: {error}") from error


def is_direct(options: Mapping[str, Any]) -> bool:
    """Whether the model has direct forces."""
    return bool(options["regress_forces"]) and bool(options["direct_forces"])


def _angular_channels(options: Mapping[str, Any]) -> tuple[int, ...] | None:
    if not options["use_frequency_embedding"]:
        return None
    channels = tuple(int(count) for count in options["freequency_list"])
    while len(channels) > 1 and channels[-1] == 0:
        channels = channels[:-1]
    if len(channels) > MAX_L + 1 or channels[0] < 1 or min(channels) < 0:
        raise CheckpointError(
            f"fairchem option freequency_list: {list(channels)} is not supported (channels for l = 0 .. {MAX_L} at "
            "most, at least one for l = 0): use fairchem-core for this model"
        )
    return channels


def _head_class(name: str, head: Any) -> str:
    if not isinstance(head, Mapping) or "module" not in head:
        raise CheckpointError(f"fairchem head {name} names no module: pass the configuration that it was built from")
    module = str(head["module"]).rpartition(".")[2]
    if module == _WRAPPER:
        module = str(head.get("head_cls", "")).rpartition(".")[2]
    if module not in _HEADS:
        raise CheckpointError(
            f"fairchem head {name} is a {module or 'wrapper without a class'}, which is not supported: only "
            f"{', '.join((GRADIENT_HEAD, ENERGY_HEAD, FORCE_HEAD))} are"
        )
    return _HEADS[module]
