"""The weights of a published EScAIP under our names.

Where a published layer acts on a concatenation of what belongs to a token and what belongs to its two atoms, ours acts
on the parts, so its matrix is split by columns. All else only changes its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from escaip.errors import CheckpointError
from escaip.models import MAX_ATOMIC_NUMBER, EScAIPConfig

_NUM_ELEMENTS = MAX_ATOMIC_NUMBER + 1


class Source:
    """Published tensors by name, each of which is taken once.

    Args:
        tensors: what is left of a state dict; taken from.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def take(self, name: str) -> Tensor:
        """Returns a tensor in float32.

        Raises:
            CheckpointError: there is none.
        """
        if name not in self._tensors:
            raise CheckpointError(f"fairchem weights lack {name}: the file is not whole, or of another configuration")
        return self._tensors.pop(name).detach().to(torch.float32)

    def drop(self, prefix: str) -> None:
        """Leaves out tensors that the model stores and never reads."""
        for name in [name for name in self._tensors if name.startswith(prefix)]:
            del self._tensors[name]

    def names(self) -> list[str]:
        """What has not been taken yet."""
        return list(self._tensors)


def clean_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes off what averaging and distribution put before the names, and their counters.

    Raises:
        CheckpointError: no weights of EScAIP.
    """
    tensors = {}
    for name, tensor in state_dict.items():
        plain = re.sub(r"^(module\.|_orig_mod\.)+", "", str(name))
        if plain != "n_averaged":
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"fairchem weights {name} are a {type(tensor).__name__}, expected a tensor")
            tensors[plain] = tensor
    if any(".neighborhood_attention." in name or name.endswith("charge_embedding.rand_emb.weight") for name in tensors):
        raise CheckpointError("these are weights of AllScAIP, which this version cannot import: only EScAIP can be")
    if not any(name.startswith("backbone.input_block.input_layer.") for name in tensors):
        raise CheckpointError("these are no weights of EScAIP (backbone.input_block.input_layer.* is missing)")
    return tensors


def head_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Prefixes of the weights of energy heads and of direct-force heads, by head name."""
    energy: dict[str, str] = {}
    force: dict[str, str] = {}
    for name in tensors:
        found = re.match(r"output_heads\.(.+?)\.(head\.)?(energy_layer|force_direction_layer)\.", name)
        if found:
            kind = energy if found[3] == "energy_layer" else force
            kind[found[1]] = f"output_heads.{found[1]}.{found[2] or ''}"
    return energy, force


def convert(source: Source, config: EScAIPConfig, energy_prefix: str, force_prefix: str | None) -> dict[str, Tensor]:
    """Returns the state dict of :class:`escaip.EScAIP`.

    Args:
        source: published weights; what is not read by the model stays in it.
        config: of the model.
        energy_prefix: what the names of the energy head's weights begin with.
        force_prefix: likewise of the force head; None without one.

    Raises:
        CheckpointError: a tensor is missing or has a shape that does not fit.
    """
    taken: dict[str, Tensor] = {}
    block = "backbone.input_block."
    _attributes(source, f"{block}input_layer.", "attributes.", config, taken)
    _feed_forward(source, f"{block}input_layer.edge_ffn.", "input_ffn.", taken)
    _norm(source, f"{block}norm_node", "norm_node", config, taken)
    _norm(source, f"{block}norm_edge", "norm_edge", config, taken)
    for layer in range(config.num_layers):
        _block(source, layer, config, taken)
    kinds = ["node"] if config.is_conservative else ["node", "edge"]
    for kind in kinds:
        for depth in range(config.num_layers + 1):
            ours, theirs = f"{kind}_readouts.{depth}.", f"backbone.readout_layers.{depth}."
            _feed_forward(source, f"{theirs}{kind}_ffn.", f"{ours}ffn.", taken)
            _norm(source, f"{theirs}pre_{kind}_norm", f"{ours}norm", config, taken)
        projection = "backbone.output_projection."
        _linear(source, f"{projection}{kind}_projection.0", f"{kind}_projection.linear", taken)
        _norm(source, f"{projection}output_norm_{kind}", f"{kind}_projection.norm", config, taken)
    _output(source, f"{energy_prefix}energy_layer.", "energy_head.mlp.", taken)
    if config.energy_norm:
        _norm(source, f"{energy_prefix}node_norm", "energy_head.norm", config, taken)
    if force_prefix is not None:
        _output(source, f"{force_prefix}force_direction_layer.", "force_head.vector.", taken)
        _output(source, f"{force_prefix}force_magnitude_layer.", "force_head.magnitude.", taken)
        _norm(source, f"{force_prefix}node_norm", "force_head.norm_node", config, taken)
        _norm(source, f"{force_prefix}edge_norm", "force_head.norm_edge", config, taken)
    return taken


def _block(source: Source, layer: int, config: EScAIPConfig, taken: dict[str, Tensor]) -> None:
    theirs, ours, hidden = f"backbone.transformer_blocks.{layer}.", f"blocks.{layer}.", config.hidden_size
    attention = f"{theirs}graph_attention."
    _attributes(source, attention, f"{ours}attributes.", config, taken)
    _linear(source, f"{attention}edge_hidden_linear.0", f"{ours}message.edge_hidden", taken)
    sender, receiver = _columns(source, f"{attention}node_hidden_linear.0.weight", [hidden, hidden])
    taken[f"{ours}message.sender.weight"], taken[f"{ours}message.receiver.weight"] = sender, receiver
    taken[f"{ours}message.receiver.bias"] = source.take(f"{attention}node_hidden_linear.0.bias")
    if config.message_gate:
        _linear(source, f"{attention}gate_linear.0", f"{ours}message.gate", taken)
        _linear(source, f"{attention}candidate_linear.0", f"{ours}message.candidate", taken)
    else:
        _linear(source, f"{attention}message_linear.0", f"{ours}message.mix", taken)
    _norm(source, f"{attention}message_norm", f"{ours}message.norm", config, taken)
    for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
        _linear(source, f"{attention}attn_in_proj_{short}", f"{ours}attention.{long}", taken)
    _linear(source, f"{attention}attn_out_proj", f"{ours}attention.project", taken)
    _norm(source, f"{theirs}norm_attn_node", f"{ours}norm_node", config, taken)
    _norm(source, f"{theirs}norm_attn_edge", f"{ours}norm_edge", config, taken)
    _norm(source, f"{theirs}norm_ffn_node", f"{ours}norm_node_ffn", config, taken)
    _feed_forward(source, f"{theirs}feedforward.mlp_node.", f"{ours}node_ffn.", taken)
    if layer < config.num_layers - 1 or not config.is_conservative:
        _norm(source, f"{theirs}norm_ffn_edge", f"{ours}norm_edge_ffn", config, taken)
        _feed_forward(source, f"{theirs}feedforward.mlp_edge.", f"{ours}edge_ffn.", taken)


def _attributes(source: Source, theirs: str, ours: str, config: EScAIPConfig, taken: dict[str, Tensor]) -> None:
    """One linear layer on [distance, source order, source element, target order, target element], in three parts."""
    end = config.boo_size + config.element_size
    parts = _columns(source, f"{theirs}edge_attr_linear.0.weight", [config.distance_size, end, end])
    for name, part in zip(("distance_project", "source.project", "target.project"), parts, strict=True):
        taken[f"{ours}{name}.weight"] = part
    taken[f"{ours}target.project.bias"] = source.take(f"{theirs}edge_attr_linear.0.bias")
    for side in ("source", "target"):
        table = source.take(f"{theirs}{side}_atomic_embedding.weight")[:_NUM_ELEMENTS]
        taken[f"{ours}{side}.element.weight"] = torch.nn.functional.pad(table, (0, 0, 0, _NUM_ELEMENTS - len(table)))
        _linear(source, f"{theirs}{side}_direction_embedding.0", f"{ours}{side}.order", taken)
    _linear(source, f"{theirs}edge_distance_embedding.0", f"{ours}distance_embedding", taken)
    _norm(source, f"{theirs}edge_attr_norm", f"{ours}norm", config, taken)


def _columns(source: Source, name: str, sizes: list[int]) -> list[Tensor]:
    weight = source.take(name)
    if weight.dim() != 2 or weight.shape[1] != sum(sizes):
        raise CheckpointError(
            f"fairchem weights {name} have shape {tuple(weight.shape)}, expected {sum(sizes)} columns: they are of "
            "another configuration"
        )
    return [part.contiguous() for part in weight.split(sizes, 1)]


def _linear(source: Source, theirs: str, ours: str, taken: dict[str, Tensor]) -> None:
    taken[f"{ours}.weight"] = source.take(f"{theirs}.weight")
    taken[f"{ours}.bias"] = source.take(f"{theirs}.bias")


def _feed_forward(source: Source, theirs: str, ours: str, taken: dict[str, Tensor]) -> None:
    _linear(source, f"{theirs}0.0", f"{ours}expand", taken)
    _linear(source, f"{theirs}1.0", f"{ours}contract", taken)


def _output(source: Source, theirs: str, ours: str, taken: dict[str, Tensor]) -> None:
    _feed_forward(source, f"{theirs}ffn.", f"{ours}ffn.", taken)
    taken[f"{ours}output.weight"] = source.take(f"{theirs}final_output.0.weight")


def _norm(source: Source, theirs: str, ours: str, config: EScAIPConfig, taken: dict[str, Tensor]) -> None:
    if config.norm != "skip":
        taken[f"{ours}.weight"] = source.take(f"{theirs}.weight")
    if config.norm == "layernorm":
        taken[f"{ours}.bias"] = source.take(f"{theirs}.bias")
