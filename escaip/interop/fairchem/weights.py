"""The weights of a published EScAIP under the names of ``escaip.EScAIP``.

A published layer acts on a concatenation of features of a token and of its two atoms; ours acts on each part, so its
matrix is split by columns. All other tensors only change their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from escaip.errors import CheckpointError
from escaip.models import MAX_ATOMIC_NUMBER, EScAIPConfig

_NUM_ELEMENTS = MAX_ATOMIC_NUMBER + 1


def clean_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes and counters that averaging and distributed training add to a state dict.

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
    """Returns the prefixes of the weights of energy heads and of direct-force heads, by name of the head."""
    energy: dict[str, str] = {}
    force: dict[str, str] = {}
    for name in tensors:
        found = re.match(r"output_heads\.(.+?)\.(head\.)?(energy_layer|force_direction_layer)\.", name)
        if found:
            kind = energy if found[3] == "energy_layer" else force
            kind[found[1]] = f"output_heads.{found[1]}.{found[2] or ''}"
    return energy, force


def convert(
    tensors: Mapping[str, Tensor], config: EScAIPConfig, energy_prefix: str, force_prefix: str | None
) -> dict[str, Tensor]:
    """Returns the state dict of ``escaip.EScAIP``, in float32.

    Args:
        tensors: published weights.
        config: of the model.
        energy_prefix: of the names of the energy head's weights.
        force_prefix: of the names of the force head's weights; None without one.

    Raises:
        CheckpointError: a tensor is missing, has no counterpart, or has a shape that does not fit.
    """
    conversion = _Conversion(dict(tensors), config)
    conversion.model(energy_prefix, force_prefix)
    # Tensors that the published model stores and never reads.
    unread = [] if config.energy_norm else [f"{energy_prefix}node_norm."]
    if config.is_conservative:
        last = f"backbone.transformer_blocks.{config.num_layers - 1}."
        unread += [f"{last}norm_ffn_edge.", f"{last}feedforward.mlp_edge."]
    left = [name for name in conversion.tensors if not name.startswith(tuple(unread))]
    if left:
        raise CheckpointError(
            f"fairchem weights {left[0]} have no counterpart here ({len(left)} such in all): the configuration is "
            "another one, or the model has parts that are not supported"
        )
    return conversion.converted


class _Conversion:
    """Takes published tensors one after the other; each method converts one layer, from its name to ours."""

    def __init__(self, tensors: dict[str, Tensor], config: EScAIPConfig) -> None:
        self.tensors, self.config = tensors, config
        self.converted: dict[str, Tensor] = {}

    def model(self, energy_prefix: str, force_prefix: str | None) -> None:
        block = "backbone.input_block."
        self.attributes(f"{block}input_layer.", "attributes.")
        self.feed_forward(f"{block}input_layer.edge_ffn.", "input_ffn.")
        self.norm(f"{block}norm_node", "norm_node")
        self.norm(f"{block}norm_edge", "norm_edge")
        for layer in range(self.config.num_layers):
            self.block(f"backbone.transformer_blocks.{layer}.", f"blocks.{layer}.", layer)
        for kind in ("node",) if self.config.is_conservative else ("node", "edge"):
            for depth in range(self.config.num_layers + 1):
                ours, theirs = f"{kind}_readouts.{depth}.", f"backbone.readout_layers.{depth}."
                self.feed_forward(f"{theirs}{kind}_ffn.", f"{ours}ffn.")
                self.norm(f"{theirs}pre_{kind}_norm", f"{ours}norm")
            self.linear(f"backbone.output_projection.{kind}_projection.0", f"{kind}_projection.linear")
            self.norm(f"backbone.output_projection.output_norm_{kind}", f"{kind}_projection.norm")
        self.output(f"{energy_prefix}energy_layer.", "energy_head.mlp.")
        if self.config.energy_norm:
            self.norm(f"{energy_prefix}node_norm", "energy_head.norm")
        if force_prefix is not None:
            self.output(f"{force_prefix}force_direction_layer.", "force_head.vector.")
            self.output(f"{force_prefix}force_magnitude_layer.", "force_head.magnitude.")
            self.norm(f"{force_prefix}node_norm", "force_head.norm_node")
            self.norm(f"{force_prefix}edge_norm", "force_head.norm_edge")

    def block(self, theirs: str, ours: str, layer: int) -> None:
        attention, hidden = f"{theirs}graph_attention.", self.config.hidden_size
        self.attributes(attention, f"{ours}attributes.")
        self.linear(f"{attention}edge_hidden_linear.0", f"{ours}message.edge_hidden")
        senders = [f"{ours}message.sender.weight", f"{ours}message.receiver.weight"]
        self.columns(f"{attention}node_hidden_linear.0.weight", senders, [hidden, hidden])
        self.rename(f"{attention}node_hidden_linear.0.bias", f"{ours}message.receiver.bias")
        for name in ("gate", "candidate") if self.config.message_gate else ("message",):
            self.linear(f"{attention}{name}_linear.0", f"{ours}message.{'mix' if name == 'message' else name}")
        self.norm(f"{attention}message_norm", f"{ours}message.norm")
        for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
            self.linear(f"{attention}attn_in_proj_{short}", f"{ours}attention.{long}")
        self.linear(f"{attention}attn_out_proj", f"{ours}attention.project")
        self.norm(f"{theirs}norm_attn_node", f"{ours}norm_node")
        self.norm(f"{theirs}norm_attn_edge", f"{ours}norm_edge")
        for kind in ("node", "edge"):
            if kind == "node" or layer < self.config.num_layers - 1 or not self.config.is_conservative:
                self.norm(f"{theirs}norm_ffn_{kind}", f"{ours}norm_{kind}_ffn")
                self.feed_forward(f"{theirs}feedforward.mlp_{kind}.", f"{ours}{kind}_ffn.")

    def attributes(self, theirs: str, ours: str) -> None:
        """Splits a layer on [distance, source order, source element, target order, target element] in three."""
        parts = [f"{ours}{name}.weight" for name in ("distance_project", "source.project", "target.project")]
        end = self.config.boo_size + self.config.element_size
        self.columns(f"{theirs}edge_attr_linear.0.weight", parts, [self.config.distance_size, end, end])
        self.rename(f"{theirs}edge_attr_linear.0.bias", f"{ours}target.project.bias")
        for side in ("source", "target"):
            table = self.take(f"{theirs}{side}_atomic_embedding.weight")[:_NUM_ELEMENTS]
            padded = torch.nn.functional.pad(table, (0, 0, 0, _NUM_ELEMENTS - len(table)))
            self.converted[f"{ours}{side}.element.weight"] = padded
            self.linear(f"{theirs}{side}_direction_embedding.0", f"{ours}{side}.order")
        self.linear(f"{theirs}edge_distance_embedding.0", f"{ours}distance_embedding")
        self.norm(f"{theirs}edge_attr_norm", f"{ours}norm")

    def columns(self, theirs: str, ours: list[str], sizes: list[int]) -> None:
        weight = self.take(theirs)
        if weight.dim() != 2 or weight.shape[1] != sum(sizes):
            raise CheckpointError(
                f"fairchem weights {theirs} have shape {tuple(weight.shape)}, expected {sum(sizes)} columns: they are "
                "of another configuration"
            )
        for name, part in zip(ours, weight.split(sizes, 1), strict=True):
            self.converted[name] = part.contiguous()

    def output(self, theirs: str, ours: str) -> None:
        self.feed_forward(f"{theirs}ffn.", f"{ours}ffn.")
        self.rename(f"{theirs}final_output.0.weight", f"{ours}output.weight")

    def feed_forward(self, theirs: str, ours: str) -> None:
        self.linear(f"{theirs}0.0", f"{ours}expand")
        self.linear(f"{theirs}1.0", f"{ours}contract")

    def linear(self, theirs: str, ours: str) -> None:
        self.rename(f"{theirs}.weight", f"{ours}.weight")
        self.rename(f"{theirs}.bias", f"{ours}.bias")

    def norm(self, theirs: str, ours: str) -> None:
        for kind in {"skip": (), "layernorm": ("weight", "bias")}.get(self.config.norm, ("weight",)):
            self.rename(f"{theirs}.{kind}", f"{ours}.{kind}")

    def rename(self, theirs: str, ours: str) -> None:
        self.converted[ours] = self.take(theirs)

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"fairchem weights lack {name}: the file is not whole, or of another configuration")
        return self.tensors.pop(name).detach().to(torch.float32)
