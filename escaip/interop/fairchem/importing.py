"""EScAIP models of fairchem-core as potentials of this package (docs/howto/fairchem.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escaip.errors import CheckpointError
from escaip.interop.fairchem.checkpoint_file import read_checkpoint
from escaip.interop.fairchem.options import ENERGY_HEAD, GRADIENT_HEAD, is_direct, split_config, translate
from escaip.interop.fairchem.tasks import Normalization, read_tasks
from escaip.interop.fairchem.weights import clean_names, convert, head_prefixes
from escaip.models import MAX_ATOMIC_NUMBER, EScAIP
from escaip.potential import Potential, PotentialMetadata


def read_fairchem(path: str | os.PathLike[str], *, distance_table: str = "never") -> Potential:
    """Reads an inference checkpoint of fairchem-core without running code from it, with averaged weights if present.

    Args:
        path: the file.
        distance_table: of ``from_fairchem``.

    Raises:
        CheckpointError: missing, damaged, unsafe, of another architecture, or with an option that cannot be computed
            here; the message says which.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    try:
        tasks = checkpoint.tasks or None
        return from_fairchem(checkpoint.weights, checkpoint.config, tasks=tasks, distance_table=distance_table)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def from_fairchem(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    tasks: Sequence[Mapping[str, Any]] | None = None,
    distance_table: str = "never",
) -> Potential:
    """Builds a potential with the energies and forces of a published EScAIP.

    Args:
        state_dict: of fairchem-core's ``HydraModelV2`` (or ``HydraModel``), or of its average (names that begin with
            ``module.``); not changed.
        config: ``{"backbone": {...}, "heads": {...}}``, or the options of the backbone alone. Without heads, a model
            whose forces are not direct has the gradient head.
        tasks: configurations of its tasks, for scale and element references; None for bare outputs.
        distance_table: ``"never"`` for the same function; ``"inference"`` or ``"always"`` for a faster approximation,
            see ``EScAIPConfig``.

    Returns:
        The potential in float32, in evaluation mode.

    Raises:
        CheckpointError: another architecture, weights that do not fit, or an option or task that cannot be computed
            here; the message names it.
    """
    tensors = clean_names(state_dict)
    options, heads = split_config(config)
    energy_prefix, force_prefix, energy_norm = _choose_heads(tensors, options, heads)
    model_config = translate(options, energy_norm=energy_norm, distance_table=distance_table)
    weights = convert(tensors, model_config, energy_prefix, force_prefix)

    with torch.device("meta"):  # shapes before memory: a configuration can ask for any size
        expected = EScAIP(model_config).state_dict()
    _check_shapes(weights, expected)
    potential = Potential(model_config)
    potential.model.load_state_dict(weights)
    num_elements = len(tensors["backbone.input_block.input_layer.source_atomic_embedding.weight"])
    elements = range(1, min(num_elements, MAX_ATOMIC_NUMBER + 1))
    normalizations = read_tasks(tasks, conservative=model_config.is_conservative) if tasks else {}
    _normalize(potential, normalizations, options, elements)
    return potential.eval()


def _choose_heads(
    tensors: Mapping[str, Tensor], options: Mapping[str, Any], heads: Mapping[str, str]
) -> tuple[str, str | None, bool]:
    """Returns the prefixes of the energy and the force head, and whether the energy head has a norm."""
    energy, force = head_prefixes(tensors)
    if len(energy) != 1 or len(force) > 1:
        names = ", ".join([*energy, *force]) or "none"
        raise CheckpointError(
            f"the fairchem model has the EScAIP heads {names}: expected one for energies and at most one for forces"
        )
    (name, energy_prefix), direct = next(iter(energy.items())), is_direct(options)
    if direct != bool(force):
        raise CheckpointError(
            f"fairchem option direct_forces is {direct} but the model has {'a' if force else 'no'} head for direct "
            "forces: pass the configuration that it was trained with"
        )
    by_option = ENERGY_HEAD if direct or not options["regress_forces"] else GRADIENT_HEAD
    kind = heads.get(name, by_option)
    if direct and kind == GRADIENT_HEAD:
        raise CheckpointError(f"fairchem head {name} takes gradients beside direct forces: {ENERGY_HEAD} is expected")
    return energy_prefix, next(iter(force.values()), None), kind == ENERGY_HEAD


def _check_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if name not in expected or tensor.shape != expected[name].shape:
            wanted = tuple(expected[name].shape) if name in expected else "nothing"
            raise CheckpointError(
                f"fairchem weights for {name} have shape {tuple(tensor.shape)}, the configuration asks for {wanted}: "
                "pass the configuration that the model was trained with"
            )


def _normalize(
    potential: Potential, sets: Mapping[str, Normalization], options: Mapping[str, Any], elements: Sequence[int]
) -> None:
    """Sets references, scale and metadata; ratios of forces to energies go into the last layer of direct forces."""
    if sets:
        references = torch.stack([item.references for item in sets.values()])
        scale = torch.tensor([item.scale for item in sets.values()], dtype=torch.float64)
        has_reference = ~torch.isnan(references).all(dim=0)
        elements = [number for number in elements if has_reference[number]]
        factors = [item.force_factor for item in sets.values()]
        if max(factors) - min(factors) > 1e-6 * max(factors):
            raise CheckpointError(
                f"fairchem tasks scale the forces of {', '.join(sets)} differently against their energies, which one "
                "model cannot: pass the tasks of one data set"
            )
        if not potential.config.is_conservative:
            with torch.no_grad():
                potential.model.get_parameter("force_head.magnitude.output.weight").mul_(factors[0])
        if len(sets) == 1:
            references, scale = references[0].nan_to_num(0.0), scale[0]
        potential.set_references(references, scale)
    values = {name: value for name, value in options.items() if isinstance(value, bool | int | float | str | list)}
    provenance = {"imported_from": "fairchem-core EScAIP", "fairchem_options": values}
    potential.set_metadata(PotentialMetadata(tuple(elements), datasets=tuple(sets), provenance=provenance))
