"""Inference checkpoints as fairchem-core writes them, with its answers; runs in the environment of make_reference.sh.

python benchmarks/fairchem/reference_checkpoints.py --out DIR

Two tiny models with random weights: a conservative one with averaged weights, in a dataset-specific wrapper, for one
data set; a direct one without averages, for two. Configurations go the way of its training: YAML, omegaconf, pickle.
The answers are in eV and eV/Å, through its own normalizers and element references.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from omegaconf import OmegaConf
from reference import COMMITTED, DIRECT, Case, answer, build, describe, randomize, structures

TINY: dict[str, Any] = {
    **COMMITTED, "max_num_elements": 20, "hidden_size": 8, "num_layers": 1, "atten_num_heads": 1,
    "freequency_list": [2, 2, 2, 1, 1], "node_direction_embedding_size": 2, "edge_distance_embedding_size": 4,
    "edge_distance_expansion_size": 12,
}  # fmt: skip
PREFIX = "fairchem.core.models.escaip.EScAIP."
WRAPPER = "fairchem.core.models.uma.escn_moe.DatasetSpecificSingleHeadWrapper"
UNIT = "fairchem.core.units.mlip_unit.mlip_unit."
NORMALIZATION = "fairchem.core.modules.normalization."
REFERENCES = {"spice": [-0.5 * z for z in range(20)], "odac": [0.25 * z - 3.0 for z in range(20)]}


def task(name: str, kind: str, sets: list[str], rmsd: float) -> dict[str, Any]:
    given: dict[str, Any] = {
        "_target_": f"{UNIT}Task",
        "name": name,
        "level": "system" if kind == "energy" else "atom",
        "property": kind,
        "out_spec": {"_target_": f"{UNIT}OutputSpec", "dim": [1 if kind == "energy" else 3], "dtype": "float32"},
        "normalizer": {"_target_": f"{NORMALIZATION}normalizer.Normalizer", "mean": 0.0, "rmsd": rmsd},
        "datasets": sets,
    }
    if kind == "energy":
        given["element_references"] = {
            "_target_": f"{NORMALIZATION}element_references.ElementReferences",
            "element_references": {"_target_": "torch.DoubleTensor", "_args_": [REFERENCES[sets[0]]]},
        }
    return given


def as_trained(model: dict[str, Any], tasks: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The two configurations as they come out of the file that training keeps."""
    whole = {"job": {"run_name": "reference"}, "runner": {"train_eval_unit": {"model": model, "tasks": tasks}}}
    unit = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(whole))).runner.train_eval_unit
    return unit.model, unit.tasks


def write(name: str, config: dict[str, Any], heads: dict[str, Any], tasks: list[dict[str, Any]], out: Path) -> Any:
    case = Case(name, config)
    model = build(case)
    randomize(model, 7)
    plain: dict[str, Any] = dict(model.state_dict())
    averaged: dict[str, Any] = {}
    if not case.is_direct:  # as the wrapper names them, which this version cannot build around EScAIP
        old, new = "output_heads.efs.", "output_heads.energyandforcehead.head."
        plain = {key.replace(old, new): value for key, value in plain.items()}
        averaged = {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in plain.items()}}
        plain = {key: torch.ones(1).expand(value.shape) for key, value in plain.items()}  # not what is to be read
    backbone = {"model": f"{PREFIX}EScAIPBackbone", **config}
    model_config, tasks_config = as_trained(
        {"_target_": "fairchem.core.models.base.HydraModel", "backbone": backbone, "heads": heads}, tasks
    )
    checkpoint = MLIPInferenceCheckpoint(model_config, plain, averaged, tasks_config)
    torch.save(checkpoint, out / f"{name}.pt")

    answers: dict[str, Any] = {}
    for structure in ("molecule", "triclinic"):
        atoms = structures("committed")[structure]
        found = answer(case, model, [atoms], torch.float32)
        batch = _Counted(atoms)
        per_set: dict[str, Any] = {}
        for given in (hydra.utils.instantiate(item) for item in tasks_config):
            if given.property not in found:
                continue
            value = given.normalizer.denorm(torch.from_numpy(found[given.property]))
            if given.element_references is not None:
                value = given.element_references.undo_refs(batch, value)
            for set_name in given.datasets:
                per_set.setdefault(set_name, {})[given.property] = value.double().tolist()
        answers[structure] = {"structure": describe(atoms), "sets": per_set}
    return answers


class _Counted:
    """What element references read of a batch of one structure."""

    def __init__(self, atoms: Any) -> None:
        self.natoms = torch.tensor([len(atoms)])
        self.batch_full = torch.zeros(len(atoms), dtype=torch.long)
        self.atomic_numbers_full = torch.from_numpy(np.asarray(atoms.numbers, dtype=np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)
    wrapped = {
        "energyandforcehead": {
            "module": WRAPPER,
            "head_cls": f"{PREFIX}EScAIPGradientEnergyForceStressHead",
            "head_kwargs": {"wrap_property": False},
            "dataset_names": ["spice"],
        }
    }
    separate = {
        "energy": {"module": f"{PREFIX}EScAIPEnergyHead"},
        "forces": {"module": f"{PREFIX}EScAIPDirectForceHead"},
    }
    of_spice = [task("spice_energy", "energy", ["spice"], 1.7), task("spice_forces", "forces", ["spice"], 1.7)]
    of_two = [
        task("spice_energy", "energy", ["spice"], 2.5),
        task("odac_energy", "energy", ["odac"], 2.5),
        task("forces", "forces", ["spice", "odac"], 1.25),
    ]
    expected = {
        "checkpoint_conservative": write("checkpoint_conservative", TINY, wrapped, of_spice, args.out),
        "checkpoint_direct": write("checkpoint_direct", {**TINY, **DIRECT}, separate, of_two, args.out),
    }
    (args.out / "checkpoints.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
