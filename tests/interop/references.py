"""Reads the folders that benchmarks/fairchem/reference.py and reference_checkpoints.py write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from escaip.data import AtomicData, collate

COMMITTED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Reference:
    """One published model and what it answers.

    Attributes:
        name: of the case.
        config: options of its backbone.
        weights: its state dict, in float64, exact in float16.
        structures: of each group.
        answers: by ``precision/group/quantity``.
    """

    name: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    structures: dict[str, list[dict[str, Any]]]
    answers: dict[str, np.ndarray]

    def batch(self, group: str) -> Any:
        return collate([structure(given) for given in self.structures[group]])

    def expected(self, precision: str, group: str) -> dict[str, np.ndarray]:
        prefix = f"{precision}/{group}/"
        return {key.removeprefix(prefix): value for key, value in self.answers.items() if key.startswith(prefix)}

    def largest(self, quantity: str) -> float:
        """Largest value of a quantity in all groups."""
        found = [np.abs(v).max() for key, v in self.answers.items() if key.endswith(f"/{quantity}")]
        return float(max(found))


def structure(given: dict[str, Any]) -> AtomicData:
    return AtomicData.from_arrays(given["numbers"], given["positions"], cell=given["cell"], pbc=given["pbc"])


def case_names(folder: Path) -> list[str]:
    return list(json.loads((folder / "reference.json").read_text(encoding="utf-8"))["cases"])


def load(folder: Path, name: str) -> Reference:
    index = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    case = index["cases"][name]
    with np.load(folder / f"{name}.npz") as archive:
        answers = {key: archive[key] for key in archive.files}
    flat = torch.from_numpy(answers.pop("weights")).double()
    sizes = [int(np.prod(shape)) for shape in case["weights"].values()]
    parts = zip(case["weights"].items(), flat.split(sizes), strict=True)
    weights = {key: part.reshape(shape).clone() for (key, shape), part in parts}
    return Reference(name, case["config"], weights, {g: index["groups"][g] for g in case["groups"]}, answers)
