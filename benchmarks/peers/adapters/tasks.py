"""What a worker does with a model, whichever peer it comes from; runs inside each peer's environment.

An adapter has ``build(options) -> Model``. A task is prepared outside of the time and run inside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

ENERGY_WEIGHT, FORCE_WEIGHT = 1.0, 10.0

Structure = dict[str, Any]
Answer = dict[str, float]


class Task(Protocol):
    """One evaluation or one training step, at positions of its own."""

    def prepare(self, positions: list[np.ndarray]) -> Any:
        """Not timed: what a loop holds in hand, or what a data loader gives."""

    def run(self, prepared: Any) -> Answer:
        """Timed."""


class Model(Protocol):
    """A peer's model with random weights, or those that its package ships."""

    parameters: int
    notes: list[str]

    def inference(self, structure: Structure) -> Task:
        """Energy and forces of one structure, as a step of molecular dynamics asks for them."""

    def training(self, structures: list[Structure]) -> Task:
        """One step of the optimizer on labelled structures."""


def to_atoms(structure: Structure, positions: np.ndarray | None = None) -> Atoms:
    chosen = structure["positions"] if positions is None else positions
    return Atoms(numbers=structure["numbers"], positions=chosen, cell=structure["cell"], pbc=structure["pbc"])


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class CalculatorTask:
    """An ASE calculator, asked for energy and forces at new positions."""

    def __init__(self, calculator: Any, structure: Structure) -> None:
        self.atoms = to_atoms(structure)
        self.atoms.calc = calculator

    def prepare(self, positions: list[np.ndarray]) -> np.ndarray:
        return positions[0]

    def run(self, prepared: np.ndarray) -> Answer:
        self.atoms.positions = prepared
        forces = self.atoms.get_forces()
        return {"energy": float(self.atoms.get_potential_energy()), "largest_force": float(np.abs(forces).max())}


class TrainingTask:
    """Forward, loss on energies and forces, backward, one step of AdamW.

    Args:
        parameters: that learn.
        structures: with labels.
        make_batch: from atoms to what the peer's data loader gives, on which no time is counted.
        forward: from that to energies ``(B,)`` and forces ``(N, 3)`` that can be differentiated.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        structures: list[Structure],
        make_batch: Callable[[list[Atoms]], Any],
        forward: Callable[[Any], tuple[Tensor, Tensor]],
    ) -> None:
        self.structures, self.make_batch, self.forward = structures, make_batch, forward
        self.sizes = torch.tensor([len(item["numbers"]) for item in structures])
        self.energies = torch.tensor([item["energy"] for item in structures])
        self.forces = torch.cat([torch.tensor(item["forces"]) for item in structures])
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def prepare(self, positions: list[np.ndarray]) -> Any:
        return self.make_batch([to_atoms(item, x) for item, x in zip(self.structures, positions)])

    def run(self, prepared: Any) -> Answer:
        self.optimizer.zero_grad()
        energies, forces = self.forward(prepared)
        loss = ENERGY_WEIGHT * ((energies.flatten() - self.energies) / self.sizes).abs().mean()
        loss = loss + FORCE_WEIGHT * torch.linalg.vector_norm(forces - self.forces, dim=-1).mean()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}
